"""Data sets of Hugging Face from local folders: there is no network here."""

import io
import json
import pickle
import sys

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dynamixer import RunError, UserError
from dynamixer.data import BadImage, open_data


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory, monkeypatch):
    """The libraries read their environment when they are imported, and other tests import them."""
    cache = tmp_path_factory.mktemp("hf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, cache / name)
    datasets.disable_progress_bars()


def encoded(colour):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, "PNG")
    return out.getvalue()


def image_folder(root, splits=("train", "validation"), classes=("cat", "dog"), each=2):
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{i}.png").write_bytes(encoded((label * 100, i * 20, 7)))
    return root


def parquet(path, labels, features, names=("image", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [{"bytes": encoded((i * 30, 5, 5)), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table(dict(zip(names, (values, labels), strict=True)))
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


IMAGE, NUMBER, WORD = (
    {"_type": "Image"},
    {"_type": "Value", "dtype": "int64"},
    {"_type": "Value", "dtype": "string"},
)


def test_an_image_folder(tmp_path):
    splits = open_data(f"hf:{image_folder(tmp_path)}")
    assert (len(splits.train), len(splits.val), splits.test) == (4, 4, None)
    source = splits.train
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.picture(3).getpixel((0, 0)) == (100, 20, 7)
    assert source.encoded(1) == encoded((0, 20, 7))
    assert source.title(3) == f"hf:{tmp_path} train row 3"


@pytest.mark.parametrize(
    ("labels", "feature", "name", "classes"),
    [
        ([1, 0, 1], {"_type": "ClassLabel", "names": ["a", "b"]}, "anything", ("a", "b")),
        ([1, 0, 1], NUMBER, "label", ("0", "1")),
        (["b", "a", "b"], WORD, "target", ("a", "b")),
    ],
)
def test_parquet_files(tmp_path, labels, feature, name, classes):
    parquet(tmp_path / "data" / "train-0.parquet", labels, {"picture": IMAGE, name: feature}, ("picture", name))
    splits = open_data(f"hf:{tmp_path}")
    assert splits.for_evaluation()[0] == "all"
    assert splits.train.classes == classes
    assert splits.train.labels.tolist() == [1, 0, 1]
    assert splits.train.picture(2).getpixel((0, 0)) == (60, 5, 5)


def test_a_split_without_labels_is_left_out(tmp_path, capsys):
    features = {"image": IMAGE, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    parquet(tmp_path / "train-0.parquet", [0, 1], features)
    parquet(tmp_path / "test-0.parquet", [-1, -1], features)
    splits = open_data(f"hf:{tmp_path}")
    assert splits.test is None
    assert "left out test (no labels" in capsys.readouterr().err


def test_what_was_saved_to_disk_is_read(tmp_path):
    datasets.load_dataset(str(image_folder(tmp_path / "a"))).save_to_disk(tmp_path / "b")
    assert len(open_data(f"hf:{tmp_path / 'b'}").val) == 4


def test_a_configuration_is_chosen(tmp_path):
    for name, count in (("small", 2), ("large", 5)):
        parquet(tmp_path / name / "train.parquet", [0, 1] * count, {"image": IMAGE, "label": NUMBER})
    configs = "".join(
        f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/*.parquet\n" for n in ("small", "large")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(open_data(f"hf:{tmp_path}@large").train) == 10
    with pytest.raises(UserError, match=r"cannot be opened: .*small"):
        open_data(f"hf:{tmp_path}")
    with pytest.raises(UserError, match=r"cannot be opened: BuilderConfig 'none' not found"):
        open_data(f"hf:{tmp_path}@none")


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_read_the_same_pictures(tmp_path, workers):
    source = open_data(f"hf:{image_folder(tmp_path)}").train
    loader = DataLoader(_Encoded(source), num_workers=workers, collate_fn=list)
    assert [item for batch in loader for item in batch] == [source.encoded(i) for i in range(4)]
    assert pickle.loads(pickle.dumps(source)).encoded(2) == source.encoded(2)


class _Encoded:
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source.encoded(index)


def test_a_bad_picture_is_named(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"oops")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    source = open_data(f"hf:{tmp_path}").train
    with pytest.raises(BadImage, match="train row 0 is not a picture"):
        source.picture(0)
    with pytest.raises(BadImage, match="train row 1 is empty"):
        source.picture(1)
    (tmp_path / "train" / "dog" / "0.png").unlink()
    with pytest.raises(BadImage, match="train row 2 does not exist"):
        source.picture(2)


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("owner/nothing", RunError, r"hf:owner/nothing could not be loaded: Couldn't reach .* A folder or a Parquet"),
        ("/no/where", UserError, "hf:/no/where is no data set that can be found"),
        ("", UserError, "needs the name of a data set"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(name, kind, sentence):
    with pytest.raises(kind, match=sentence):
        open_data(f"hf:{name}")


def test_data_without_pictures_names_its_columns(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(UserError, match="columns text, label; one of pictures and one of labels"):
        open_data(f"hf:{tmp_path}")


def test_a_script_that_comes_with_data_is_not_run(tmp_path):
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises((UserError, RunError)):
        open_data(f"hf:{folder}")
    assert not (tmp_path / "sprung").exists()


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install 'datasets>="):
        open_data("hf:owner/name")
