import numpy as np
import pytest
from PIL import Image

from dynamixer.plots import confusion_picture, curves_picture, prediction_sheet


def drawn(figure, path):
    figure.savefig(path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_curves_change_with_the_rows(tmp_path):
    rows = [
        {"epoch": i, "train_loss": 2 / i, "train_top1": 20.0 * i, "val_loss": 2.1 / i, "val_top1": 19.0 * i}
        for i in (1, 2, 3)
    ]
    both = drawn(curves_picture(rows, "x"), tmp_path / "a.png")
    less = drawn(
        curves_picture([{k: v for k, v in r.items() if "val" not in k} for r in rows], "x"), tmp_path / "b.png"
    )
    assert both.shape == less.shape
    assert (both != less).any()


@pytest.mark.parametrize("n", [2, 10, 30, 100])
def test_the_confusion_matrix_is_darkest_where_the_counts_are(tmp_path, n):
    counts = np.eye(n, dtype=int) * 50
    right = drawn(confusion_picture(counts, [f"class {i}" for i in range(n)]), tmp_path / "a.png")
    wrong = drawn(confusion_picture(counts[::-1], [f"class {i}" for i in range(n)]), tmp_path / "b.png")
    assert (right != wrong).any()


@pytest.mark.parametrize("n", [1, 5, 24])
def test_a_sheet_shows_every_picture(tmp_path, n):
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    sheet = drawn(prediction_sheet([(red, f"{i}.png", [("a", 0.9), ("b", 0.1)]) for i in range(n)]), tmp_path / "a.png")
    assert ((sheet[..., 0] > 200) & (sheet[..., 1:].max(-1) < 60)).mean() > 0.1
