"""A data set with one of everything: each thing is found, under its name, and the rest is left alone."""

import errno
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynamixer import RunError, UserError
from dynamixer.data import decode
from dynamixer.data import verify as module
from dynamixer.data.verify import ERRORS, NOTES, verify


def picture(seed, size=(24, 16), mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def wide_png():
    """A PNG with 16 bits a channel in colour, which Pillow opens as RGB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(i, i + 24)) for i in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(8), "JPEG", exif=exif)


def files():
    """Name, content and expected findings."""
    moving = {"save_all": True, "append_images": [picture(3)]}
    return [
        ("train/cat/fine.png", encoded(picture(1)), []),
        ("train/cat/fine.jpg", encoded(picture(2), "JPEG"), []),
        ("train/cat/again.png", encoded(picture(1)), []),  # the first of the two, as names are sorted
        ("train/cat/empty.png", b"", ["empty"]),
        ("train/cat/empty2.png", b"", ["empty"]),
        ("train/cat/text.jpg", b"<html>not found</html>", ["not-a-picture"]),
        ("train/cat/cut.jpg", encoded(picture(4, (200, 200)), "JPEG")[:5000], ["truncated"]),
        ("train/cat/cut.png", encoded(picture(5, (200, 200)))[:5000], ["truncated"]),
        ("train/cat/thin.png", encoded(picture(6, (600, 2))), ["absurd-size"]),
        ("train/dog/named.jpg", encoded(picture(7)), ["wrong-suffix"]),
        ("train/dog/ink.jpg", encoded(picture(9, mode="CMYK"), "JPEG"), ["cmyk"]),
        ("train/dog/deep.png", encoded(Image.fromarray(np.full((9, 9), 9000, np.uint16))), ["16-bit"]),
        ("train/dog/wide.png", wide_png(), ["16-bit"]),
        ("train/dog/table.png", encoded(picture(10).quantize(8)), ["palette"]),
        ("train/dog/moving.webp", encoded(picture(11), "WEBP", **moving), ["animated"]),
        ("train/dog/turned.jpeg", turned(), ["exif-rotated"]),
        ("train/dog/both.jpg", encoded(picture(12), "GIF", **moving), ["wrong-suffix", "palette", "animated"]),
        ("train/dog/other.png", encoded(picture(2), "JPEG"), ["wrong-suffix", "duplicate"]),
        ("test/cat/a.png", encoded(picture(1)), ["in-two-splits"]),
        ("test/cat/b.png", encoded(picture(20)), []),
        ("test/dog/a.png", encoded(picture(21)), []),
    ]


@pytest.fixture
def broken(tmp_path):
    expected = {}
    for name, content, findings in files():
        path = tmp_path / "broken" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        expected[str(path)] = findings
    expected[str(tmp_path / "broken/train/cat/fine.png")] = ["duplicate"]
    (tmp_path / "broken/train/dog/notes.txt").write_text("x")
    (tmp_path / "broken/train/dog/gone.png").symlink_to("nowhere.png")
    return tmp_path / "broken", expected


def lines(report):
    return [json.loads(line) for line in report.manifest.read_text().splitlines()]


def test_everything_is_found_and_nothing_else(broken, tmp_path):
    root, expected = broken
    report = verify(root, out=tmp_path / "out.jsonl")
    records = {record["name"]: record for record in lines(report)}
    assert {name: sorted(f["name"] for f in record["findings"]) for name, record in records.items()} == {
        name: sorted(findings) for name, findings in expected.items()
    }
    counts = {name: sum(f.count(name) for f in expected.values()) for name in (ERRORS | NOTES)}
    counts |= {"not-used": 2}
    assert report.findings == {name: count for name, count in counts.items() if count}
    assert report.pictures == len(expected)
    assert report.errors == sum(counts[name] for name in ERRORS)
    assert report.notes == sum(counts[name] for name in NOTES)
    assert set(report.findings) == {*ERRORS, *NOTES} - {"unreadable"}
    assert report.examples["not-used"] == [str(root / "train/dog/gone.png"), str(root / "train/dog/notes.txt")]
    for record in records.values():
        severities = {f["name"]: f["severity"] for f in record["findings"]}
        assert all(severity == ("error" if name in ERRORS else "note") for name, severity in severities.items())


def test_the_manifest_says_what_each_picture_is(broken, tmp_path):
    root, _ = broken
    records = {record["name"]: record for record in lines(verify(root, out=tmp_path / "out.jsonl"))}
    record = records[str(root / "test/cat/a.png")]
    assert list(record) == [
        "split", "name", "class", "sha256", "bytes", "format", "mode", "width", "height", "findings",
    ]  # fmt: skip
    assert (record["split"], record["class"]) == ("test", "cat")
    assert (record["format"], record["mode"], record["width"], record["height"]) == ("PNG", "RGB", 24, 16)
    assert record["bytes"] == (root / "test/cat/a.png").stat().st_size
    assert record["findings"][0]["detail"] == f"the same bytes as {root / 'train/cat/again.png'} (train)"
    twin = records[str(root / "train/dog/other.png")]["findings"]
    assert twin[1]["detail"] == f"the same bytes as {root / 'train/cat/fine.jpg'} (train), where its class is cat"
    cut = records[str(root / "train/cat/cut.jpg")]
    assert (cut["format"], cut["width"]) == ("JPEG", 200)
    assert "cut.jpg cannot be decoded: " in cut["findings"][0]["detail"]
    thin = records[str(root / "train/cat/thin.png")]
    assert (thin["width"], thin["height"]) == (600, 2)
    assert records[str(root / "train/cat/text.jpg")]["format"] is None
    assert [r["split"] for r in records.values()] == ["train"] * 18 + ["test"] * 3


def test_the_number_of_workers_changes_nothing(broken, tmp_path):
    root, _ = broken
    reports = [verify(root, out=tmp_path / f"{workers}.jsonl", workers=workers) for workers in (0, 1, 3)]
    for other in reports[1:]:
        assert other.manifest.read_bytes() == reports[0].manifest.read_bytes()
        assert {**other.to_dict(), "manifest": 0} == {**reports[0].to_dict(), "manifest": 0}


def test_what_decoding_accepts_is_no_error(broken):
    for name, findings in broken[1].items():
        if set(findings) <= {*NOTES, "in-two-splits"}:
            decode(name)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_cannot_be_read_is_found(tmp_path, monkeypatch, workers):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.png").write_bytes(encoded(picture(i)))
    whole = Path.read_bytes

    def broken(path):
        if path.parent.name == "cat":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    report = verify(tmp_path / "data", out=tmp_path / "out.jsonl", workers=workers)
    assert (report.pictures, report.findings) == (2, {"unreadable": 1})
    assert "cat/a.png cannot be read: Input/output error" in lines(report)[0]["findings"][0]["detail"]


def test_files_that_cannot_be_read_are_found(tmp_path, monkeypatch):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.png").write_bytes(encoded(picture(i)))
    splits = module._splits(tmp_path / "data")
    (tmp_path / "data" / "cat" / "a.png").unlink()  # after the folder was listed; root may read what is forbidden
    monkeypatch.setattr(module, "_splits", lambda data: splits)
    report = verify(tmp_path / "data", out=tmp_path / "out.jsonl")
    assert report.findings == {"unreadable": 1}
    missing, fine = lines(report)
    assert missing["sha256"] is None
    assert "does not exist" in missing["findings"][0]["detail"]
    assert fine["findings"] == []


def test_too_many_bytes_are_not_read(tmp_path):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.png").write_bytes(encoded(picture(i)))
    with (tmp_path / "data" / "dog" / "huge.png").open("wb") as file:
        file.truncate(2**40)
    assert verify(tmp_path / "data", out=tmp_path / "out.jsonl").findings == {"absurd-size": 1}


def test_pictures_that_lie_loose_are_verified_without_classes(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i // 2)))
    (tmp_path / "notes.txt").touch()
    report = verify(tmp_path, out=tmp_path / "out" / "m.jsonl")
    assert report.findings == {"not-used": 1, "duplicate": 1}
    assert {(r["split"], r["class"]) for r in lines(report)} == {("all", None)}


def test_the_data_that_ships_is_without_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = verify("fashion-mnist-mini")
    assert (report.pictures, report.errors) == (12_000, 0)
    assert str(report.manifest) == "fashion-mnist-mini-manifest.jsonl"
    assert [p.name for p in tmp_path.iterdir()] == ["fashion-mnist-mini-manifest.jsonl"]


def test_pixels_are_compared_where_there_are_no_files(tmp_path, monkeypatch):
    class Pixels(module.Source):
        def encoded(self, index):
            return None

        def picture(self, index, at_least=None):
            return picture(index % 2)

        def title(self, index):
            return f"{self.name} {index}"

    parts = {name: Pixels(name, ("a", "b"), [0, 1]) for name in ("train", "test")}
    monkeypatch.setattr(module, "_splits", lambda data: parts)
    report = verify("x", out=tmp_path / "m.jsonl")
    assert report.findings == {"in-two-splits": 2}
    assert lines(report)[0] | {"sha256": 0} == {
        "split": "train", "name": "train 0", "class": "a", "sha256": 0, "bytes": None, "format": None, "mode": "RGB",
        "width": 24, "height": 16, "findings": [],
    }  # fmt: skip


def test_mistakes_are_sentences(broken, tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a folder: give the manifest a file name"):
        verify(broken[0], out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not be written"):
        verify(broken[0], out=tmp_path / "file" / "m.jsonl")


def test_a_manifest_is_whole_or_not_there(broken, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        verify(broken[0], out=out / "m.jsonl")
    assert list(out.iterdir()) == []


def test_the_table_names_the_first_three(broken, tmp_path):
    root, _ = broken
    for i in range(5):
        (root / "train" / "cat" / f"z{i}.png").write_bytes(b"")
    text = verify(root, out=tmp_path / "m.jsonl").to_text()
    row = text.splitlines().index(next(line for line in text.splitlines() if "  zero bytes" in line))
    assert text.splitlines()[row].split()[:3] == ["error", "empty", "7"]
    assert text.splitlines()[row + 1].strip() == ", ".join(
        [str(root / "train/cat" / name) for name in ("empty.png", "empty2.png", "z0.png")] + ["..."]
    )
    assert text.splitlines()[-1] == f"manifest: {tmp_path / 'm.jsonl'}"
