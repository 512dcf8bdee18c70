import errno
import os
import stat
from pathlib import Path

import pytest

from dynamixer import RunError, UserError
from dynamixer.files import check_place, is_leftover, reason, whole_file, write_text


def test_a_file_appears_whole_with_the_usual_mode(tmp_path):
    write_text(tmp_path / "deeper" / "a.txt", "text")
    assert (tmp_path / "deeper" / "a.txt").read_text() == "text"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "deeper" / "a.txt").stat().st_mode) == 0o666 & ~mask


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def write(error):
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(RunError, match=r"a.txt could not be written: there is no space left on the disk"):
        write(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ZeroDivisionError):
        write(ZeroDivisionError())
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/a.txt could not be written"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_a_pipe_stays_one_and_a_link_is_followed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is a device or a pipe: the name of a file is needed"):
        write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to("elsewhere.txt")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere.txt").read_text() == "x"


def test_only_what_whole_file_leaves_is_a_leftover(tmp_path):
    with whole_file(tmp_path / "a.b.json") as temporary:
        assert is_leftover(temporary)
    for name in (
        ".config.yaml.swp",
        ".my.notes.txt",
        ".a.json.abcdefgh.yaml",
        "a.json.abcdefgh.json",
        ".json.abc.json",
    ):
        (tmp_path / name).touch()
        assert not is_leftover(tmp_path / name)


def test_reasons_are_words():
    assert reason(OSError(errno.EACCES, "Permission denied")) == "Permission denied"
    assert reason(OSError("odd")) == "odd"


def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(tmp_path):
    check_place(tmp_path / "new/folder/x.png")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/x.png", Path("/proc/x.png")):
        with pytest.raises(UserError, match="cannot be written"):
            check_place(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
