"""The pictures that the page offers, and those over which it averages: from a folder, or those that ship."""

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dynamixer.data.decode import Limits
from dynamixer.data.sources import EMBEDDED, files_in, open_data
from dynamixer.errors import UserError
from dynamixer.logs import log
from dynamixer.serve.limits import open_picture
from dynamixer.serve.settings import Refused

SHOWN, AVERAGED = 12, 64
PHOTOS = Path(__file__).parent / "photos"


@dataclass(frozen=True)
class Sample:
    """A picture as it lies on the disk, with a name to show and a thumbnail as data URL."""

    name: str
    encoded: bytes
    thumbnail: str


def find_samples(folder: Path | None, limits: Limits, classes: tuple[str, ...]) -> list[Sample]:
    """At most 64 pictures, the first 12 of which are for showing; both evenly from all folders within `folder`
    that are not hidden.

    Without a folder: clothes for a model that knows their classes, else the photographs that ship.

    Raises:
        UserError: the folder is not there or has no picture that the server accepts.
    """
    if folder is not None:
        samples = _accepted(_from_folder(folder), limits)
    else:
        clothes, theirs = _clothes()
        samples = [] if theirs == classes else _accepted(_from_folder(PHOTOS), limits)
        samples = samples or _accepted(clothes, limits)
    if folder is not None and not samples:
        raise UserError(f"{folder} has no picture that the server accepts: JPEG, PNG, WebP or BMP, one frame.")
    return samples


def _accepted(found: Iterable[tuple[str, bytes]], limits: Limits) -> list[Sample]:
    samples: list[Sample] = []
    for name, encoded in found:
        if len(samples) == AVERAGED:
            break
        try:
            picture = open_picture(encoded, limits)
        except Refused as error:
            log(f"sample {name} is left out: {error.sentence}")
            continue
        samples.append(Sample(name, encoded, _thumbnail(picture)))
    return samples


def _clothes() -> tuple[list[tuple[str, bytes]], tuple[str, ...]]:
    """Pictures of the subset of Fashion-MNIST, all classes in turn, and its classes."""
    source = open_data(EMBEDDED).test
    assert source is not None
    each: dict[int, list[int]] = {}
    for index, label in enumerate(source.labels):
        each.setdefault(int(label), []).append(index)
    chosen = [each[label][i] for i in range(8) for label in sorted(each) if i < len(each[label])]
    pictures = [(source.classes[int(source.labels[i])], source.encoded(i) or b"") for i in chosen[:AVERAGED]]
    return pictures, source.classes


def _from_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: --samples takes a folder of pictures.")
    files, _ = files_in(folder)
    groups: dict[Path, list[Path]] = {}
    for file in files:
        groups.setdefault(file.parent, []).append(file)
    rounds = max((len(group) for group in groups.values()), default=0)
    turn = (group[i] for i in range(rounds) for group in groups.values() if i < len(group))
    return ((file.stem.replace("_", " "), file.read_bytes()) for file in turn)


def _thumbnail(picture: Image.Image) -> str:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((112, 112), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
