"""Shards as webdataset writes them are read by number; what is none is refused, and nothing in them is run."""

import gzip
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dynamixer import UserError
from dynamixer.data import BadImage, open_data


def picture(colour, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, kind)
    return out.getvalue()


def shard(path, members):
    """A tar file of (name, bytes) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(labels, start=0, label="cls"):
    """Pictures in numbered colours, each with its label."""
    for i, value in enumerate(labels, start):
        yield f"some/{i:04}.png", picture((i, 0, 0))
        text = json.dumps({"label": value}) if label == "json" else f"{value}\n"
        yield f"some/{i:04}.{label}", text.encode()


def reds(source):
    return [source.picture(i).getpixel((0, 0))[0] for i in range(len(source))]


@pytest.mark.parametrize("label", ["cls", "json"])
def test_a_shard_is_read_by_number(tmp_path, label):
    path = shard(tmp_path / "a.tar", samples([0, 2, 1, 2], label=label))
    source = open_data(path).train
    assert source.labels.tolist() == [0, 2, 1, 2]
    assert source.classes == ("0", "1", "2")
    assert reds(source) == [0, 1, 2, 3]
    assert source.encoded(1) == picture((1, 0, 0))
    assert source.title(3) == f"{path}: some/0003.png"


def test_shards_are_one_source_in_the_order_of_their_names(tmp_path):
    for i in range(3):
        shard(tmp_path / f"train-{i}.tar", samples(["dog", "cat"], start=10 * i))
    shard(tmp_path / "val-0.tar", samples(["cat"], start=90))
    splits = open_data(tmp_path)
    assert reds(splits.train) == [0, 1, 10, 11, 20, 21]
    assert splits.train.labels.tolist() == [1, 0] * 3
    assert reds(splits.val) == [90]
    assert splits.val.classes == splits.train.classes == ("cat", "dog")
    assert reds(open_data(str(tmp_path / "train-*.tar")).train) == [0, 1, 10, 11, 20, 21]


def test_loose_shards_are_all_of_the_data(tmp_path):
    shard(tmp_path / "b.tar", samples([1], start=1))
    shard(tmp_path / "a.tar", samples([0]))
    assert open_data(tmp_path).for_evaluation()[0] == "all"
    assert reds(open_data(tmp_path).train) == [0, 1]


def test_an_archive_beside_class_folders_is_not_the_data(tmp_path):
    shard(tmp_path / "train.tar", samples([0, 1]))
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture((9, 9, 9)))
    assert open_data(tmp_path).train.classes == ("cat", "dog")


def test_numbered_splits_share_the_largest_number_of_classes(tmp_path):
    shard(tmp_path / "train.tar", samples([0, 1, 2]))
    shard(tmp_path / "test.tar", samples([0, 1]))
    assert open_data(tmp_path).test.classes == ("0", "1", "2")


def test_class_names_come_from_a_file_beside_the_shards(tmp_path):
    (tmp_path / "classes.txt").write_text("zebra\nant\n\n")
    numbered = open_data(shard(tmp_path / "a.tar", samples([1, 0]))).train
    assert numbered.classes == ("zebra", "ant")
    assert numbered.labels.tolist() == [1, 0]
    assert open_data(shard(tmp_path / "b.tar", samples(["ant", "zebra"]))).train.labels.tolist() == [1, 0]


def test_members_of_one_sample_need_not_be_neighbours_and_others_are_left_aside(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = pickle.dumps(Trap())
    members = [
        ("x.v1.cls", b"7"),  # belongs to the key x: all after the first dot is the suffix
        ("x.cls", b"0"),
        ("y.JPG", picture((200, 0, 0), "JPEG")),
        ("x.pyd", trap),
        ("x.pickle", trap),
        ("y.pkl", trap),
        ("x.png", picture((5, 0, 0))),
        ("x.txt", b"a caption"),
        ("y.json", b'{"label": 1, "more": [true]}'),
        ("z.cls", b"1"),
        (".DS_Store", b"?"),
    ]
    source = open_data(shard(tmp_path / "a.tar", members)).train
    assert source.labels.tolist() == [0, 1]
    assert source.picture(0).getpixel((0, 0)) == (5, 0, 0)
    assert not (tmp_path / "sprung").exists()
    assert "left out 1 samples without a picture" in capsys.readouterr().err


def test_long_names_and_folders_are_read(tmp_path):
    name = "f" * 180
    members = [(f"{name}/a.png", picture((1, 0, 0))), (f"{name}/a.cls", b"0"), *samples([1], start=2)]
    source = open_data(shard(tmp_path / "a.tar", members)).train
    assert reds(source) == [1, 2]
    assert source.title(0).endswith(f"{name}/a.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_read_the_same_pictures(tmp_path, workers):
    for i in range(2):
        shard(tmp_path / f"{i}.tar", samples([0, 1] * 5, start=10 * i))
    source = open_data(tmp_path).train
    assert reds(source)[:2] == [0, 1]  # handles of the parent are open when the workers are forked
    loader = DataLoader(_Reds(source), batch_size=3, num_workers=workers, collate_fn=list)
    assert [red for batch in loader for red in batch] == list(range(20))


class _Reds:
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source.picture(index).getpixel((0, 0))[0]


def test_a_source_can_be_pickled(tmp_path):
    source = open_data(shard(tmp_path / "a.tar", samples([0, 1]))).train
    assert reds(source) == reds(pickle.loads(pickle.dumps(source)))


def test_more_shards_than_are_kept_open(tmp_path, capsys):
    for i in range(70):
        shard(tmp_path / f"{i:02}.tar", samples([i % 2], start=i))
    before = len(os.listdir("/proc/self/fd"))
    source = open_data(tmp_path).train
    assert "reading where the pictures lie in 70 tar files" in capsys.readouterr().err
    assert reds(source) == list(range(70))
    assert reds(source)[::-1] == list(range(70))[::-1]
    assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_the_index_is_small(tmp_path):
    source = open_data(shard(tmp_path / "a.tar", samples([0, 1] * 100))).train
    assert len(pickle.dumps(source)) / len(source) < 100  # bytes a picture


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("a.png", b"x")], r"1 pictures without a label \(.cls, or .json with \"label\"\), first a.png"),
        ([("a.png", b"x"), ("a.json", b"{}")], "1 pictures without a label"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], "1 pictures without a label"),
        ([("a.png", b"x"), ("a.json", b'{"label": 0.5}')], "1 pictures without a label"),
        ([("a.png", b"x"), ("a.json", b"{")], "a.json is not JSON"),
        ([("a.png", b"x"), ("a.json", b"[" * 100_000)], "a.json is not JSON"),
        ([("a.png", b"x"), ("a.cls", b"\xff")], "a.cls is not text"),
        ([("a.png", b"x"), ("a.cls", b"0" * 2**21)], "too many for a label"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")], "two pictures for one sample: a.png and a.jpg"),
        ([("a.cls", b"0")], "has no pictures"),
        ([], "has no pictures"),
        ([*samples([0, 0])], "one class only"),
        ([*samples([0, 1, -1])], "labels from -1 to 1"),
        ([*samples([0, 10**12])], "labels up to 1000000000000: number the classes from 0"),
    ],
)
def test_shards_without_labelled_pictures_are_refused(tmp_path, members, sentence):
    with pytest.raises(UserError, match=sentence):
        open_data(shard(tmp_path / "a.tar", members))


def test_labels_have_to_be_known(tmp_path):
    shard(tmp_path / "train.tar", samples(["cat", "dog"]))
    shard(tmp_path / "test.tar", samples(["cow"]))
    with pytest.raises(UserError, match="the label 'cow', which is none of the 2 classes"):
        open_data(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(UserError, match="names a class twice"):
        open_data(tmp_path)


@pytest.mark.parametrize("where", ["in the data", "between members", "in a header", "in the end"])
def test_a_truncated_shard_is_named(tmp_path, where):
    path = shard(tmp_path / "whole.tar", samples([0, 1]))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-2]
    cut = {
        "in the data": last.offset_data + 20,
        "between members": last.offset,
        "in a header": last.offset + 100,
        "in the end": len(path.read_bytes().rstrip(b"\0")) + 1,
    }[where]
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"cut.tar is (truncated|not a whole tar file)"):
        open_data(tmp_path / "cut.tar")


def test_a_damaged_shard_is_named(tmp_path):
    path = shard(tmp_path / "a.tar", samples([0, 1]))
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    whole[second : second + 4] = b"oops"
    path.write_bytes(whole)
    with pytest.raises(UserError, match=f"a.tar is truncated or damaged at byte {second:,}"):
        open_data(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"a.tar is not a whole tar file"):
        open_data(path)


def test_a_negative_size_does_not_loop(tmp_path):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(4096))
    with pytest.raises(UserError, match=r"negative size|not a whole tar file|truncated or damaged"):
        open_data(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_shard_says_how_to_unpack_it(tmp_path, name):
    whole = shard(tmp_path / "whole.tar", samples([0, 1])).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=rf"{name} is compressed, .* unpack it with gunzip"):
        open_data(tmp_path / name)


def test_a_shard_that_changes_or_goes_is_a_bad_picture(tmp_path):
    path = shard(tmp_path / "a.tar", samples([0, 1]))
    changed, gone = open_data(path).train, open_data(path).train
    shard(path, samples([0, 1, 1]))
    with pytest.raises(BadImage, match=r"a.tar has changed since it was opened"):
        changed.picture(0)
    path.unlink()
    with pytest.raises(BadImage, match=r"0000.png cannot be read: No such file"):
        gone.picture(0)


def test_a_bad_picture_is_named(tmp_path):
    source = open_data(shard(tmp_path / "a.tar", [("a.png", b"?"), ("a.cls", b"0"), *samples([1])])).train
    with pytest.raises(BadImage, match=r"a.tar: a.png is not a picture"):
        source.picture(0)
    source.sizes[0] = 2**30
    with pytest.raises(BadImage, match=r"a.png has 1,073,741,824 bytes"):
        source.picture(0)


def test_a_picture_may_be_asked_for_smaller(tmp_path):
    y, x = np.mgrid[:64, :96]
    out = io.BytesIO()
    Image.fromarray(np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8)).save(out, "JPEG")
    source = open_data(shard(tmp_path / "a.tar", [("a.jpg", out.getvalue()), ("a.cls", b"0"), *samples([1])])).train
    assert source.picture(0).size == (96, 64)
    assert source.picture(0, (30, 30)).size == (48, 32)
