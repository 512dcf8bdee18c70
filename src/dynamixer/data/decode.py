"""One decoder for training, evaluation, prediction and serving: bytes or a file -> an upright 8-bit RGB picture."""

import errno
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dynamixer.errors import RunError, UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # beyond them Pillow refuses
_AWAY = """EMFILE ENFILE ENOMEM ESTALE EIO EBUSY EAGAIN ENODEV ENXIO EREMOTEIO ETIMEDOUT
    ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ENOTCONN ECONNRESET ECONNABORTED ECONNREFUSED"""
# What the system says when files cannot be opened for now, or their disk or network is away; not all systems know all.
OF_THE_MACHINE = {getattr(errno, name) for name in _AWAY.split() if hasattr(errno, name)}
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class BadImage(UserError):  # noqa: N818 - named for what it is about
    """A file that cannot be used as a picture; the message says which and why, `kind` the latter in a word.

    The kinds are "unreadable" (the bytes cannot be had), "empty", "absurd-size", "not-a-picture" and "truncated" (the
    header is in order and what follows is not).
    """

    def __init__(self, message: str, kind: str = "unreadable"):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """What is refused before anything is decoded, from the size of the file and its header."""

    file_bytes: int = 64 * 2**20
    pixels: int = 100_000_000
    side: int = 30_000
    aspect: int = 100  # longer side over shorter one


DEFAULT_LIMITS = Limits()


def decode(
    source: bytes | str | Path,
    *,
    name: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode a picture to RGB, the same way everywhere.

    The EXIF orientation is applied; of an animation the first frame is taken; CMYK, palette, grey and 16-bit pictures are
    converted; what is transparent is laid over white.

    Args:
        source: the encoded bytes, or a file.
        name: what to call the picture in an error; a file's path by default.
        limits: what is refused before decoding.
        at_least: the height and width that will do. A larger JPEG is decoded at a half, a quarter or an eighth of its
            size, which costs less, as long as no side becomes shorter than this.

    Raises:
        BadImage: missing, unreadable, truncated, too large, or not a picture of a known format.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    encoded = source if isinstance(source, bytes) else read_file(Path(source), name=name, limits=limits)
    if not encoded:
        raise BadImage(f"{name} is empty (zero bytes).", "empty")
    check_bytes(len(encoded), name, limits)
    opened = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused or converted below
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
                opened = True
                _check_size(picture.size, name, limits)
                if at_least is not None:
                    _draft(picture, at_least)
                picture.load()
                return _to_rgb(ImageOps.exif_transpose(picture))
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(
            f"{name} has more pixels than the {min(limits.pixels, MOST_PIXELS):,} that are accepted.", "absurd-size"
        ) from None
    except UnidentifiedImageError:
        raise BadImage(f"{name} is not a picture of a known format ({', '.join(FORMATS)}).", "not-a-picture") from None
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on bad bytes
        raise BadImage(f"{name} cannot be decoded: {error}.", "truncated" if opened else "not-a-picture") from None


def check_bytes(size: int, name: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuse a file by its size, before it is read.

    Raises:
        BadImage: too large.
    """
    if size > limits.file_bytes:
        raise BadImage(f"{name} has {size:,} bytes; at most {limits.file_bytes:,} are accepted.", "absurd-size")


def raise_for_machine(error: Exception, name: str) -> None:
    """Raise a RunError if a file could not be read for a reason that is not its own and may be over the next time.

    Of the errors of a disk and of a network's (EIO) no one can tell which it is: a run stops, with the file's name.
    """
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        raise RunError(f"{name} cannot be read: {error.strerror}; start again, without it if it is the file.") from None


def read_file(path: Path, *, name: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a file, `name` in an error.

    Raises:
        BadImage: missing, unreadable or too large.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BadImage(f"{name} is not a file{' but a folder' if path.is_dir() else ''}.")
        check_bytes(size, name, limits)
        return path.read_bytes()
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage(f"{name} does not exist.") from None
    except (OSError, ValueError) as error:  # a ValueError for a zero byte in the name
        raise_for_machine(error, name)
        raise BadImage(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    width, height = size
    if max(size) > limits.side or width * height > limits.pixels:
        raise BadImage(
            f"{name} is {width}x{height} pixels; "
            f"at most {limits.side:,} a side and {limits.pixels:,} in all are accepted.",
            "absurd-size",
        )
    if max(size) > limits.aspect * min(size):
        raise BadImage(
            f"{name} is {width}x{height} pixels; one side may be at most {limits.aspect} times the other.",
            "absurd-size",
        )


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none. From 5 on the sides are swapped."""
    value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _draft(picture: Image.Image, at_least: tuple[int, int]) -> None:
    """Have a JPEG decoded at the smallest scale whose sides are, once upright, not shorter than `at_least`."""
    height, width = at_least
    picture.draft(None, (height, width) if orientation(picture) >= 5 else (width, height))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(("I", "F")):  # 16-bit grey comes as I;16 or, from PNG, I; floats (TIFF) as F
        values = np.asarray(picture)
        if picture.mode == "F":
            values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
            values *= 255 / max(1.0, float(values.max(initial=0.0)))
        elif picture.mode != "I" or values.max(initial=0) > 255:  # 32-bit files hold 8-bit values too
            values = (values.clip(0, 65535).astype(np.uint32) + 128) // 257  # 65535 -> 255, rounded
        if isinstance(clear := picture.info.get("transparency"), int):  # the grey that is no picture, on white
            values = np.where(np.asarray(picture) == clear, 255, values)
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
