import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision import datasets

import dynamixer
from dynamixer import RunError, UserError
from dynamixer.data import BadImage, open_data
from dynamixer.data.sources import EMBEDDED
from dynamixer.data.unlabelled import ParquetRows, open_pictures
from helpers import shared_data


def save(path, colour=(200, 30, 30), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def folder(root, classes=("cat", "dog"), each=3):
    for label, name in enumerate(classes):
        for i in range(each):
            save(root / name / f"{i}.png", (label * 100, i * 20, 7))
    return root


def parquet(path, names=("cat", "dog"), labels=(0, 1, 1), metadata=True, label_type=None, image_type="struct"):
    source = path.parent / "tmp.png"
    rows = [save(source, (i * 60, 5, 5)).read_bytes() for i in range(len(labels))]
    values = [{"bytes": row, "path": None} for row in rows] if image_type == "struct" else rows
    table = pa.table({"image": values, "label": pa.array(labels, label_type)})
    if metadata:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    source.unlink()
    return path


def test_class_folders(tmp_path, capsys):
    folder(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    save(tmp_path / "dog" / "deeper" / "more.JPG")
    source = open_data(tmp_path).train
    assert open_data(tmp_path).for_evaluation()[0] == "all"
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert source.picture(1).getpixel((0, 0)) == (0, 20, 7)
    assert source.title(0).endswith("cat/0.png")
    assert "left out what is not a picture: 1 in " in capsys.readouterr().err


def test_a_class_may_be_called_train(tmp_path):
    folder(tmp_path, classes=("car", "plane", "train"))
    assert open_data(tmp_path).train.classes == ("car", "plane", "train")


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"image": 3}}}'])
def test_damaged_metadata_is_left_aside(tmp_path, metadata):
    path = parquet(tmp_path / "x.parquet")
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"huggingface": metadata}), path)
    assert open_data(path).train.classes == ("0", "1")


def test_folders_of_splits(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "validation", each=1)
    splits = open_data(tmp_path)
    assert (len(splits.train), len(splits.val), splits.test) == (6, 2, None)
    assert splits.for_evaluation()[0] == "val"
    assert splits.for_evaluation("train")[1] is splits.train
    with pytest.raises(UserError, match="no test split; it has train, val"):
        splits.for_evaluation("test")
    with pytest.raises(UserError, match="unknown split 'tset': did you mean 'test'"):
        splits.for_evaluation("tset")


def test_splits_have_to_have_the_same_classes(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "test", classes=("cat", "cow"))
    with pytest.raises(UserError, match="different classes"):
        open_data(tmp_path)


@pytest.mark.parametrize("image_type", ["struct", "bytes"])
def test_parquet_in_the_hugging_face_layout(tmp_path, image_type):
    source = open_data(parquet(tmp_path / "x.parquet", image_type=image_type)).train
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.picture(2).getpixel((0, 0)) == (120, 5, 5)
    assert source.title(2).endswith("x.parquet row 2")


def test_parquet_without_metadata(tmp_path):
    assert open_data(parquet(tmp_path / "x.parquet", metadata=False)).train.classes == ("0", "1")
    texts = open_data(parquet(tmp_path / "y.parquet", labels=("dog", "cat", "dog"), metadata=False)).train
    assert texts.classes == ("cat", "dog")
    assert texts.labels.tolist() == [1, 0, 1]


def test_a_folder_of_parquet_files(tmp_path):
    parquet(tmp_path / "train-00000-of-00002.parquet")
    parquet(tmp_path / "train-00001-of-00002.parquet")
    parquet(tmp_path / "test.parquet")
    splits = open_data(tmp_path)
    assert (len(splits.train), len(splits.test)) == (6, 3)
    assert splits.for_evaluation()[0] == "test"


def test_the_embedded_data_set_is_balanced_and_whole():
    splits = open_data(EMBEDDED)
    for source, each in ((splits.train, 1000), (splits.test, 200)):
        assert np.bincount(source.labels).tolist() == [each] * 10
        for i in (0, len(source) - 1):
            assert source.picture(i).size == (28, 28)
    assert splits.train.classes[9] == "ankle boot"
    # A picture of each class differs from the mean of another: labels and pictures belong together.
    means = np.stack(
        [
            np.mean(
                [np.asarray(splits.train.picture(i))[..., 0] for i in np.flatnonzero(splits.train.labels == c)[:30]], 0
            )
            for c in range(10)
        ]
    ).reshape(10, -1)
    test = np.flatnonzero(splits.test.labels >= 0)[::20]
    guesses = [
        int(np.linalg.norm(means - np.asarray(splits.test.picture(i))[..., 0].reshape(1, -1), axis=1).argmin())
        for i in test
    ]
    assert np.mean(np.array(guesses) == splits.test.labels[test]) > 0.5


def test_the_developers_data(tmp_path):
    cifar = open_data(shared_data("cifar10/train.parquet")).train
    assert len(cifar) == 50_000
    assert cifar.classes[3] == "cat"
    assert cifar.picture(7).size == (32, 32)
    splits = open_data(shared_data("imagenette128"))
    assert (len(splits.train), len(splits.val)) == (9469, 3925)


def test_torchvision_names_read_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIXER_CACHE", str(tmp_path))
    raw = tmp_path / "torchvision" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 4), ("t10k", 2)):
        images = np.arange(n * 28 * 28, dtype=np.uint8).tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3, *(0, 0, 0, n), *(0, 0, 0, 28) * 2]) + images
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, *(0, 0, 0, n), *range(n)]))
    splits = open_data("fashionmnist")
    assert (len(splits.train), len(splits.test)) == (4, 2)
    assert splits.train.labels.tolist() == [0, 1, 2, 3]
    assert splits.train.picture(1).mode == "RGB"
    assert splits.train.classes[1] == "Trouser"
    assert splits.train.title(1) == "fashionmnist train 1"
    assert splits.train.encoded(1) is None
    assert splits.train.picture(1, at_least=(7, 7)).size == (28, 28)


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIXER_CACHE", str(tmp_path))

    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(
        RunError, match=r"CIFAR10 could not be downloaded .*no route to host.*A folder or a Parquet file"
    ):
        open_data("CIFAR10")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda t: t / "nothing", "no file or folder .*nothing, and no data set of that name"),
        (lambda t: "CIFAR11", "did you mean 'CIFAR10'"),
        (lambda t: t, "no class folders with pictures"),
        (lambda t: save(t / "a.png").parent, "lie loose; put each class into a folder of its own"),
        (lambda t: folder(t, classes=("cat",)), r"one class only \(cat\)"),
        (lambda t: save(t / "a.png"), "is not a data set: give a folder"),
        (lambda t: parquet(t / "x.parquet", labels=(0, 5, 1)), "labels from 0 to 5, and 2 classes"),
        (lambda t: parquet(t / "x.parquet", labels=(0, 0), names=("cat",)), "one class only"),
        (lambda t: parquet(t / "x.parquet", labels=(0, None, 1), label_type=pa.int64()), "1 pictures without a label"),
        (lambda t: parquet(t / "x.parquet", labels=(0.0, 1.0), metadata=False), "labels of type double"),
        (lambda t: (t / "x.parquet", (t / "x.parquet").write_bytes(b"PAR1 not"))[0], "cannot be read as Parquet"),
    ],
)
def test_what_is_no_data_set_is_refused_with_a_sentence(tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence):
        open_data(make(tmp_path))


def test_parquet_without_the_columns_names_those_it_has(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="columns text, label; an image column"):
        open_data(tmp_path / "x.parquet")
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "y.parquet"
    )
    with pytest.raises(UserError, match="has no pictures"):
        open_data(tmp_path / "y.parquet")


def test_the_encoded_bytes_are_those_of_the_file(tmp_path):
    folder(tmp_path / "a")
    assert open_data(tmp_path / "a").train.encoded(4) == (tmp_path / "a" / "dog" / "1.png").read_bytes()
    picture = Image.open(io.BytesIO(open_data(parquet(tmp_path / "x.parquet")).train.encoded(2)))
    assert picture.getpixel((0, 0)) == (120, 5, 5)


def test_a_picture_may_be_asked_for_smaller(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / name / "a.jpg", size=(96, 64))
    source = open_data(tmp_path).train
    assert source.picture(0).size == (96, 64)
    assert source.picture(0, (30, 30)).size == source.picture(0, at_least=(32, 48)).size == (48, 32)


def test_a_pattern_of_parquet_files(tmp_path):
    for i in range(3):
        parquet(tmp_path / f"train-{i}.parquet")
    parquet(tmp_path / "val-0.parquet")
    pattern = str(tmp_path / "train-*.parquet")
    source = open_data(pattern).train
    assert len(source) == 9
    assert source.title(8) == f"{pattern} row 8"
    (tmp_path / "train-9.txt").touch()
    with pytest.raises(UserError, match=r"train-9.txt is not a data set"):
        open_data(str(tmp_path / "train-*"))
    with pytest.raises(UserError, match="no file matches"):
        open_data(str(tmp_path / "test-*.parquet"))


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    assert len(open_data(folder(tmp_path / "a[1]*")).train) == 6


@pytest.mark.parametrize("name", ["pipe:cat x.tar", "https://example.org/x.tar", "s3://bucket/train.parquet"])
def test_commands_and_addresses_are_refused(name):
    with pytest.raises(UserError, match="is a command or an address, and data is read from files only"):
        open_data(name)


def test_links_that_lead_nowhere_are_left_out(tmp_path, capsys):
    folder(tmp_path)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_data(tmp_path).train
    assert len(source) == 6
    assert source.unused == [tmp_path / "cat" / "gone.png"]
    assert "left out what is not a picture: 1 in " in capsys.readouterr().err


def test_a_bad_picture_is_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(BadImage, match=r"cat/1.png is not a picture"):
        open_data(tmp_path).train.picture(1)
    path = parquet(tmp_path / "x.parquet")
    table = pq.read_table(path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    empty = pa.array([{"bytes": None, "path": "elsewhere.png"}] * 3, kind)
    pq.write_table(table.set_column(0, "image", empty), path)
    with pytest.raises(BadImage, match="row 0 has no bytes"):
        open_data(path).train.picture(0)


def test_what_is_named_like_a_split_and_is_none_is_said(tmp_path, capsys):
    folder(tmp_path / "train")
    save(tmp_path / "test" / "1.png")
    assert set(open_data(tmp_path).named()) == {"train"}
    assert "test left out beside train, being no folders of class folders" in capsys.readouterr().err.replace("\n", " ")


def test_hidden_folders_are_left_out(tmp_path):
    folder(tmp_path)
    save(tmp_path / "cat/.ipynb_checkpoints/0-checkpoint.png")
    assert len(open_data(tmp_path).train) == 6


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path))
    assert open_data(".").train
    for opened in (open_data, dynamixer.load):
        with pytest.raises(UserError, match="empty"):
            opened("")


def test_a_split_may_lack_a_class_of_the_train_split(tmp_path, capsys):
    folder(tmp_path / "train", classes=("ant", "cat", "dog"))
    folder(tmp_path / "val", classes=("ant", "dog"))
    splits = open_data(tmp_path)
    assert splits.val.classes == splits.train.classes == ("ant", "cat", "dog")
    assert splits.val.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert "no pictures of 1 of 3 classes, such as cat" in capsys.readouterr().err


def test_splits_that_number_their_classes_differently_are_numbered_as_the_train_split(tmp_path):
    parquet(tmp_path / "train.parquet", names=("cat", "dog"), labels=(0, 1, 1))
    parquet(tmp_path / "test.parquet", names=("dog", "cat"), labels=(0, 1, 1))
    test = open_data(tmp_path).test
    assert (test.classes, test.labels.tolist()) == (("cat", "dog"), [1, 0, 0])


def test_linked_folders_are_read_and_links_back_end(tmp_path):
    folder(tmp_path / "elsewhere", classes=("dog",))
    folder(tmp_path / "data", classes=("cat",))
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "elsewhere" / "dog" / "back").symlink_to(tmp_path / "data" / "cat")
    source = open_data(tmp_path / "data").train
    assert source.classes == ("cat", "dog")
    # cat: its own and those of the linked dog; dog: its own and those of cat behind the link; no further
    assert source.labels.tolist() == [0] * 6 + [1] * 6


def test_what_lies_beside_the_folders_that_are_read_is_named(tmp_path, capsys):
    folder(tmp_path / "a")
    save(tmp_path / "a" / "loose.png")
    open_data(tmp_path / "a")
    assert f"left out 1 pictures that lie in {tmp_path / 'a'} itself" in capsys.readouterr().err
    folder(tmp_path / "b" / "train")
    folder(tmp_path / "b", classes=("bird",))
    open_data(tmp_path / "b")
    assert "bird left out beside train" in capsys.readouterr().err


def test_a_choice_between_columns_is_named(tmp_path, capsys):
    path = parquet(tmp_path / "x.parquet", metadata=False)
    table = pq.read_table(path)
    pq.write_table(table.append_column("fine_label", pa.array([3, 4, 5])), path)
    assert open_data(path).train.labels.tolist() == [0, 1, 1]
    assert "several columns of labels: label is taken, and fine_label left out" in capsys.readouterr().err


def test_pictures_of_parquet_files_are_read_when_they_are_wanted(tmp_path, monkeypatch):
    parquet(tmp_path / "train.parquet")
    read = []
    whole = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda file, columns: read.extend(columns) or whole(file, columns=columns))
    source = open_data(tmp_path).train
    assert read == ["label"]
    source.prepare()
    source.prepare()
    assert read == ["label", "image"]
    again = open_data(tmp_path).train
    parquet(tmp_path / "train.parquet", labels=(0, 1))
    with pytest.raises(UserError, match="has changed since it was opened"):
        again.picture(0)


@pytest.mark.parametrize("what", ["folder", "tar"])
def test_titles_are_utf8_where_names_are_not(tmp_path, what):
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    if what == "folder":
        pictures = open_data(folder(Path(place))).train
    else:
        with tarfile.open(Path(place) / "x.tar", "w") as archive:
            archive.add(save(tmp_path / "a.png"), "a.png")
        pictures = open_pictures([Path(place) / "x.tar"])[0]
    assert pictures.picture(0).size == (8, 6)
    assert "�" in pictures.title(0) or "\\xff" in pictures.title(0)
    pictures.title(0).encode()


@pytest.mark.parametrize("opened", [open_data, ParquetRows])
def test_a_parquet_file_whose_name_is_no_utf8_is_refused(tmp_path, opened):
    place = Path(os.fsdecode(os.fsencode(parquet(tmp_path / "x.parquet")) + b"\xff.parquet"))
    try:
        (tmp_path / "x.parquet").rename(place)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with pytest.raises(
        UserError, match=r"cannot be read as Parquet: .*surrogates not allowed"
    ):  # Arrow takes UTF-8 only
        opened(place)


def test_hidden_members_of_a_tar_file_are_no_pictures(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for member in ("a.png", "in/._a.png"):  # the latter as macOS writes it beside the former
            archive.add(save(tmp_path / "a.png"), member)
    assert len(open_pictures([tmp_path / "x.tar"])[0]) == 1
