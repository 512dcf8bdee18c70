"""Any Hugging Face data set of pictures, by name or local directory, through their `datasets` library (extra `hf`).

The library finds, downloads and caches; pictures are decoded by our own decoder. Code that comes with data is never run.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from dynamixer.data.base import LABEL_COLUMNS, SPLITS, Source, Splits, read_labels
from dynamixer.data.decode import BadImage, read_file
from dynamixer.errors import RunError, UserError, install
from dynamixer.logs import log

PREFIX = "hf:"


class HubSource(Source):
    """One split: `rows` is a `datasets.Dataset` with the image column alone, not decoded."""

    def __init__(self, name: str, rows: Any, labels: pa.ChunkedArray, names: list[str] | None):
        self.rows = rows
        (self.column,) = rows.column_names
        numbers, classes = read_labels(labels, names, name)
        super().__init__(name, classes, numbers)

    def encoded(self, index: int) -> bytes:
        """The bytes in the row, or those of the file that it names."""
        value = self.rows[index][self.column] or {}
        found, path = value.get("bytes"), value.get("path")
        if found is not None:
            return bytes(found)
        if not path or "://" in path:
            raise BadImage(f"{self.title(index)} has no bytes, and names no file on this machine.")
        return read_file(Path(path), name=self.title(index))

    def title(self, index: int) -> str:
        """The data set, the split and the row, counted from 0."""
        return f"{self.name} row {index}"


def open_hub(data: str) -> Splits:
    """Open "hf:owner/name", "hf:owner/name@config" or "hf:folder".

    Raises:
        UserError: there is no such data set, it has no labelled pictures, or `datasets` is not installed.
        RunError: it could not be downloaded.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise UserError(f"{data} needs the datasets library of Hugging Face: {install('hf')}") from None
    name, config = _name_and_config(data.removeprefix(PREFIX))
    with _sentences(data, library):
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
            loaded = library.load_from_disk(name)
        else:
            # From version 4 on the library has no loading scripts any more; before, they run unless this forbids it.
            forbid = {} if int(library.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
            loaded = library.load_dataset(name, config, **forbid)
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    found: dict[str, Source] = {}
    left_out = []
    for key, rows in parts.items():
        split = next((split for split, names in SPLITS.items() if key.lower() in names), None)
        if split is None and len(parts) == 1:
            split = "train"
        source = _source(f"{data} {key}", rows, library) if split and split not in found else None
        if split and source is not None:
            found[split] = source
        else:
            left_out.append(key)
    if not found:
        raise UserError(f"{data} has no labelled train, validation or test split; it has {', '.join(parts)}.")
    if left_out:
        log(f"{data}: left out {', '.join(left_out)} (no labels, or neither train, validation nor test)")
    return Splits.of(found, data)


def _name_and_config(text: str) -> tuple[str, str | None]:
    name, _, config = text.rpartition("@")
    if not name or Path(text).is_dir():
        name, config = text, ""
    if not name:
        raise UserError("hf: needs the name of a data set after it, such as hf:owner/name.")
    return name, config or None


def _source(name: str, rows: Any, library: Any) -> HubSource | None:
    """A split as a source; None where it has no labels, as the test split of a competition."""
    features = rows.features
    images = [k for k, feature in features.items() if isinstance(feature, library.Image)]
    labels = [k for k, feature in features.items() if isinstance(feature, library.ClassLabel)]
    labels = labels or [k for k in LABEL_COLUMNS if k in features]
    if not images or not labels:
        raise UserError(f"{name} has columns {', '.join(features)}; one of pictures and one of labels are needed.")
    image, label = images[0], labels[0]
    values = rows.select_columns([label]).with_format("arrow")[:].column(label)
    values = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])
    if not len(values) or values.null_count == len(values):
        return None
    if pa.types.is_integer(values.type) and not values.null_count and values.to_numpy().max() < 0:
        return None
    names = getattr(features[label], "names", None)
    pictures = rows.select_columns([image]).cast_column(image, library.Image(decode=False)).with_format(None)
    return HubSource(name, pictures, values, names)


@contextmanager
def _sentences(data: str, library: Any) -> Iterator[None]:
    """What the library raises as one sentence: a mistake in the name, or a download that failed."""
    missing = (library.exceptions.DatasetNotFoundError, FileNotFoundError)
    try:
        yield
    except missing as error:
        raise UserError(f"{data} is no data set that can be found: {_first_lines(error)}") from None
    except ValueError as error:  # an unknown configuration, or none where there are several
        raise UserError(
            f"{data} cannot be opened: {_first_lines(error, 2)} A configuration is given as hf:owner/name@config."
        ) from None
    except Exception as error:  # whatever the network, the files or the disk do
        raise RunError(
            f"{data} could not be loaded: {_first_lines(error)} A folder or a Parquet file can be given instead."
        ) from None


def _first_lines(error: Exception, count: int = 1) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:count]).rstrip(".:") + "."
