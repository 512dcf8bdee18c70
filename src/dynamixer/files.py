"""Files that are whole or not there at all."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamixer.errors import RunError, UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when all went well, else it is removed.

    Raises:
        UserError: there is a device or a pipe, which a file would replace.
        RunError: the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        place = Path(os.path.realpath(path))  # of a link, what it leads to
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise UserError(f"{path} is a device or a pipe: the name of a file is needed.")
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=place.suffix, dir=place.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, place)
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}.") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether it is what a kill left of `whole_file`, which names it .NAME.xxxxxxxx.SUFFIX."""
    return bool(re.fullmatch(r"\..+(\.[^.]+)\.[a-z0-9_]{8}\1", path.name)) and path.is_file()


def check_picture_path(path: Path) -> None:
    """Refuse a place that a PNG cannot be written to, before the work is done.

    Raises:
        UserError: another ending than .png, a folder, or a place within a file.
    """
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"{path} is not a name for a picture: it has to end in .png and not be a folder.")
    check_place(path)


def check_place(path: Path) -> None:
    """Refuse a place where no file can be made, before the work is done.

    Raises:
        UserError: it is within a file, or a folder that cannot be written to.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{path} cannot be written: {above} is no folder.")
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}.") from None


def write_text(path: Path, text: str) -> None:
    """Write a whole file of text."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def reason(error: OSError) -> str:
    """What the system says went wrong, in words."""
    if error.errno == errno.ENOSPC:
        return "there is no space left on the disk"
    return error.strerror or str(error)


def in_utf8(name: str) -> str:
    """A file's name as it can be shown, with a mark for bytes that are no UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
