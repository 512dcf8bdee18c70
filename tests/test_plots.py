import numpy as np
import pytest
from PIL import Image

from dynamixer.plots import (
    confused_pairs_picture,
    confused_sheet,
    confusion_picture,
    curves_picture,
    prediction_sheet,
    reliability_picture,
)


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


LONG = "Cypripedium-calceolus of the $eastern$ high mountains, number_{}"


def words(figure):
    """Every text in a picture with its place in pixels, once it is drawn; not the numbers of an axis."""
    figure.canvas.draw()
    texts = {text: text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_window_extent") and
             hasattr(part, "get_text") and part.get_visible())}  # fmt: skip
    return [(said, text.get_window_extent()) for text, said in texts.items() if said and not said.isdecimal()]


def assert_nothing_is_clipped(figure):
    width, height = figure.canvas.get_width_height()
    for text, box in words(figure):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} is at {box.extents} in a picture of {width}x{height}"


def assert_nothing_overlaps(figure, among):
    boxes = [(text, box) for text, box in words(figure) if among(text)]
    for i, (text, box) in enumerate(boxes):
        for other, place in boxes[:i]:
            assert not box.overlaps(place), f"{text!r} is over {other!r}"


def test_the_reliability_picture_shows_accuracy_and_gap():
    bins = np.zeros((15, 3))
    bins[3] = 10, 2.4, 6  # underconfident
    bins[12] = 30, 25.0, 15  # overconfident
    figure = reliability_picture(bins, 26.5)
    upper, lower = figure.axes
    accuracy, gap = upper.containers
    assert [bar.get_height() for bar in accuracy] == pytest.approx([60, 50])
    assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx([24, 100 * 25 / 30])
    assert [bar.get_x() + bar.get_width() / 2 for bar in accuracy] == pytest.approx([350 / 15, 1250 / 15])
    heights = [bar.get_height() for bar in lower.containers[0]]
    assert (heights[3], heights[12], sum(heights)) == pytest.approx((25, 75, 100))
    assert figure.get_suptitle() == "expected calibration error 26.5 %"
    assert_nothing_is_clipped(figure)
    empty = reliability_picture(np.zeros((15, 3)), 0.0)
    assert_nothing_is_clipped(empty)


@pytest.mark.parametrize(
    ("n", "name", "size"),
    [(1, LONG, (20, 20)), (2, "cat", (300, 100)), (4, LONG, (100, 300)), (7, "cat", (20, 20)), (30, LONG, (300, 100))],
)
def test_the_wrong_pictures_have_captions_that_can_be_read(tmp_path, n, name, size):
    red = Image.new("RGB", size, (255, 0, 0))
    figure = confused_sheet([(red, name.format(i), "dog", 0.997) for i in range(n)])
    captions = [text.get_text() for text in figure.texts]
    assert len(captions) == min(24, n)
    assert all("99\N{NO-BREAK SPACE}%" in caption for caption in captions)
    if name == "cat":
        assert captions[0] == "cat taken for dog, 99\N{NO-BREAK SPACE}%"
    assert_nothing_is_clipped(figure)
    assert_nothing_overlaps(figure, lambda text: "taken" in text)
    sheet = drawn(figure, tmp_path / "a.png")
    assert ((sheet[..., 0] > 200) & (sheet[..., 1:].max(-1) < 60)).mean() > 0.08


@pytest.mark.parametrize(("n", "name"), [(2, "{}"), (10, "class {}"), (100, LONG)])
def test_the_most_frequent_confusions_come_first(n, name):
    counts = np.random.default_rng(0).integers(0, 1200, (n, n))
    classes = [name.format(i) for i in range(n)]
    figure = confused_pairs_picture(counts, classes)
    (axes,) = figure.axes
    widths = [bar.get_width() for bar in axes.containers[0]]
    off = counts[~np.eye(n, dtype=bool)]
    assert widths == sorted(off, reverse=True)[:15]
    first = axes.get_yticklabels()[0].get_text()
    i, j = np.argwhere((counts == widths[0]) & ~np.eye(n, dtype=bool))[0]
    assert first.endswith(classes[j][-12:])
    assert f"{classes[i][-12:]} → " in first
    assert_nothing_is_clipped(figure)
    assert_nothing_overlaps(figure, lambda text: "→" in text)


def test_fewer_pairs_are_asked_for_or_there():
    counts = np.diag([5, 5, 5])
    counts[0, 2], counts[1, 0] = 3, 4
    labels = [label.get_text() for label in confused_pairs_picture(counts, "abc").axes[0].get_yticklabels()]
    assert labels == ["b → a", "a → c"]
    assert len(confused_pairs_picture(counts, "abc", top=1).axes[0].get_yticklabels()) == 1


def test_no_wrong_picture_is_said_in_words():
    for figure in (confused_pairs_picture(np.eye(3, dtype=int), "abc"), confused_sheet([])):
        assert [text for text, _ in words(figure)] == ["No picture was taken for another class."]
        assert_nothing_is_clipped(figure)


def test_names_are_not_read_as_formulas(tmp_path):
    classes = ["$5_{", "a $x^ b", "price_$5_and_$6"]
    picture = Image.new("RGB", (20, 20))
    figures = [
        curves_picture([{"epoch": 1, "train_loss": 1.0, "train_top1": 50.0}], classes[2]),
        confusion_picture(np.arange(9).reshape(3, 3), classes),
        confused_pairs_picture(np.arange(9).reshape(3, 3), classes),
        confused_sheet([(picture, classes[0], classes[2], 0.5)]),
        prediction_sheet([(picture, classes[2], [(name, 0.3) for name in classes])]),
    ]
    for figure in figures:
        drawn(figure, tmp_path / "a.png")
        assert "$" in "".join(text for text, _ in words(figure))
