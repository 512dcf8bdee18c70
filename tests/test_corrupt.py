"""benchmarks/corrupt.py, as far as it needs none of its old packages."""

import importlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dynamixer.data import open_data

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src/dynamixer/data/fashion/test.parquet"


@pytest.fixture
def corrupt(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("corrupt")


def test_the_subset_is_balanced_and_by_seed(corrupt):
    labels = np.repeat(np.arange(10), 50)[np.random.default_rng(1).permutation(500)]
    numbers = corrupt.chosen(labels, 100, seed=0)
    assert (np.bincount(labels[numbers]) == 10).all()
    assert (np.diff(numbers) > 0).all()
    assert (numbers == corrupt.chosen(labels, 100, seed=0)).all()
    assert (numbers != corrupt.chosen(labels, 100, seed=1)).any()


@pytest.mark.parametrize(("count", "sentence"), [(15, "equal size"), (600, "there are not 60 pictures of class 0")])
def test_a_subset_that_cannot_be_is_a_sentence(corrupt, count, sentence):
    with pytest.raises(SystemExit, match=sentence):
        corrupt.chosen(np.repeat(np.arange(10), 50), count, 0)


def test_each_picture_has_a_seed_of_its_own(corrupt):
    every = {corrupt.seed_of(s, k, v, n) for s in (0, 1) for k in ("fog", "snow") for v in (1, 2) for n in range(50)}
    assert len(every) == 400
    assert corrupt.seed_of(0, "fog", 1, 7) == 2_463_472_062


@pytest.mark.parametrize("column", ["image", "img"])
def test_what_is_written_is_a_data_set_with_the_same_labels(corrupt, tmp_path, column):
    table, labels = corrupt.read(SHIPPED)
    metadata = table.schema.metadata[b"huggingface"].replace(b'"image"', f'"{column}"'.encode())
    table = table.rename_columns({"image": column}).replace_schema_metadata({"huggingface": metadata})
    numbers = corrupt.chosen(labels, 20, seed=0)
    inverted = [corrupt.png(255 - corrupt.pixels_of(table, int(n))) for n in numbers]
    corrupt.write(tmp_path / "fog-1.parquet", table, numbers, inverted)
    assert [path.name for path in tmp_path.iterdir()] == ["fog-1.parquet"]
    original, written = open_data("fashion-mnist-mini").test, open_data(tmp_path / "fog-1.parquet").train
    assert written.classes == original.classes
    assert (written.labels == original.labels[numbers]).all()
    for place, number in enumerate(numbers[:3]):
        assert (np.asarray(written.picture(place)) == 255 - np.asarray(original.picture(int(number)))).all()


def test_a_folder_begun_with_other_arguments_is_a_sentence(corrupt, tmp_path):
    corrupt.begin(tmp_path / "out", {"seed": 0})
    corrupt.begin(tmp_path / "out", {"seed": 0})
    with pytest.raises(SystemExit, match="was begun with other arguments or packages"):
        corrupt.begin(tmp_path / "out", {"seed": 1})


def test_other_tables_are_a_sentence(corrupt, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "png")
    pq.write_table(pa.table({"image": [picture.getvalue()]}), tmp_path / "x.parquet")
    with pytest.raises(SystemExit, match="one called label"):
        corrupt.read(tmp_path / "x.parquet")


def test_the_kinds_are_those_that_the_study_reads(corrupt):
    from dynamixer.study.measure import KINDS, SEVERITIES  # noqa: PLC0415

    assert corrupt.SEVERITIES == SEVERITIES
    assert len(KINDS) == 19
