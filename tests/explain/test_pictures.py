import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from dynamixer.explain import average, look, receptive
from dynamixer.explain.pictures import (
    COLOURS,
    Photo,
    branches_picture,
    dynamic_picture,
    entropy_picture,
    matrices_picture,
    receptive_picture,
    token_picture,
)
from small_models import pictures, small
from test_plots import words


def photo(size=(16, 16)):
    return Photo(Image.effect_noise((size[1] * 8, size[0] * 8), 60).convert("RGB"), size)


def assert_nothing_is_clipped(figure):
    """Of the words: a colour bar has numbers beyond its ends that are not drawn."""
    width, height = figure.canvas.get_width_height()
    for text, box in words(figure):
        if not text.lstrip("\N{MINUS SIGN}").replace(".", "").isdecimal():
            assert box.x0 >= 0, text
            assert box.y0 >= 0, text
            assert box.x1 <= width, text
            assert box.y1 <= height, text


def panels(figure):
    """Axes that show a segment, in order."""
    return [axes for axes in figure.axes if axes.get_title().startswith("segment")]


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (16, 16)), ({"softmax": False}, (12, 20)), ({"row": False}, (12, 20)), ({"generator": "static"}, (16, 16))],
)
def test_heat_maps_are_the_matrices_of_the_tokens_row_and_column(options, size):
    mixing = look(small(**options), pictures(size, 1)).blocks[0]
    figure = matrices_picture(mixing, (3, 5))
    shown = panels(figure)
    expected = [] if mixing.row is None else list(mixing.row[0, 3].numpy())
    expected += list(mixing.column[0, 5].numpy())
    assert len(shown) == len(expected)
    for axes, matrix in zip(shown, expected, strict=True):
        (image,) = axes.get_images()
        assert np.array_equal(image.get_array(), matrix)
        low, high = image.get_clim()
        assert (low == -high) if not mixing.softmax else (low == 0)
    frames = [axes.patches[0].get_y() + 0.5 for axes in shown]
    assert frames == [5] * (0 if mixing.row is None else mixing.segments) + [3] * mixing.segments
    said = [text for text, _ in words(figure)]
    assert ("block 0, the same for every picture" in said) is (not mixing.content)
    assert any("negative" in text for text in said) is (not mixing.softmax)
    assert any("row 3" in text for text in said) is (mixing.row is not None)
    assert any("column 5" in text for text in said)
    assert_nothing_is_clipped(figure)


@pytest.mark.parametrize("size", [(16, 16), (13, 20)])
def test_the_overlay_lies_on_the_tokens_row_and_column_and_follows_the_weights(size):
    model = small()
    seen = look(model, pictures(size, 1))
    mixing = seen.blocks[0]
    figure = token_picture(photo(size), mixing, (3, 5), seen.token_side(mixing))
    shown = panels(figure)
    assert len(shown) == mixing.segments
    for s, axes in enumerate(shown):
        ground, row, column = axes.get_images()
        assert tuple(ground.get_extent()) == (0, size[1], size[0], 0)
        height, width = mixing.grid
        assert tuple(row.get_extent()) == (0, width * 2, height * 2, 0)
        assert axes.get_xlim() == (0, size[1])
        for image, weights, line in (
            (row, mixing.row[0, 3, s, 5], np.s_[3, :]),
            (column, mixing.column[0, 5, s, 3], np.s_[:, 5]),
        ):
            alpha = np.asarray(image.get_array())[..., 3]
            along = alpha[line].copy()
            assert (np.argsort(along) == np.argsort(weights.numpy())).all()
            alpha[line] = 0
            assert alpha.max() == 0
        frame = axes.patches[0]
        assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (10, 6, 2, 2)
    assert_nothing_is_clipped(figure)


def test_negative_weights_are_blue_and_positive_ones_red():
    seen = look(small(softmax=False), pictures(count=1))
    mixing = seen.blocks[0]
    (axes, *_) = panels(token_picture(photo(), mixing, (3, 5), 2))
    rgba = np.asarray(axes.get_images()[1].get_array())[3]
    weights = mixing.row[0, 3, 0, 5].numpy()
    assert (weights < -0.05).any()
    assert (weights > 0.05).any()
    assert (rgba[weights > 0.05, 0] > rgba[weights > 0.05, 2]).all()
    assert (rgba[weights < -0.05, 0] < rgba[weights < -0.05, 2]).all()


def test_the_receptive_field_is_drawn_on_the_first_grid_and_the_token_on_its_own():
    model = small()
    seen = look(model, pictures(count=1))
    found = receptive(model, pictures(count=1), (1, 2))
    figure = receptive_picture(photo(), found, 4, 2)
    _, rolled, gradient = figure.axes
    for axes, values in ((rolled, found.rollout), (gradient, found.gradient)):
        alpha = np.asarray(axes.get_images()[1].get_array())[..., 3]
        assert alpha.shape == seen.blocks[0].grid
        assert alpha.flatten().argmax() == int(values.flatten().argmax())
        frame = axes.patches[0]
        assert (frame.get_x(), frame.get_y(), frame.get_width()) == (8, 4, 4)
    assert f"{found.rank_correlation:.2f}" in gradient.get_title()
    assert_nothing_is_clipped(figure)


def test_entropy_and_branches_are_those_of_the_blocks():
    seen = look(small(), pictures(count=1))
    (axes,) = entropy_picture(seen).axes
    for axis in ("row", "column"):
        (line,) = [line for line in axes.lines if line.get_label() == axis]
        assert line.get_color() == COLOURS[axis]
        assert line.get_ydata() == pytest.approx([float(b.entropy(axis)[0].mean()) for b in seen.blocks])
    figure = branches_picture(seen)
    (axes,) = figure.axes
    for i, bars in enumerate(axes.containers):
        branch = ("column", "row", "channel")[i]
        assert to_rgb(bars[0].get_facecolor()) == pytest.approx(to_rgb(COLOURS[branch]))
        expected = [float(b.branch_weights[0, :, i].mean()) for b in seen.blocks]
        assert [bar.get_height() for bar in bars] == pytest.approx(expected)
    assert [text for text, _ in words(figure) if "tokens" in text] == ["8x8 tokens", "4x4 tokens"]
    assert_nothing_is_clipped(figure)


def test_what_changes_is_drawn_in_percent_and_in_even_weights():
    found = average(small(), [pictures(count=4)])
    figure = dynamic_picture(found)
    shares, changes = figure.axes
    assert [bar.get_height() for bar in shares.containers[0]] == pytest.approx(
        [100 * b.row.dynamic for b in found.blocks]
    )
    assert [bar.get_height() for bar in changes.containers[1]] == pytest.approx([b.column.change for b in found.blocks])
    assert "over 4 pictures" in [text for text, _ in words(figure)]
    assert_nothing_is_clipped(figure)


def test_a_missing_branch_leaves_no_empty_legend():
    model = small(row=False, channel=False, reweight=False)
    for figure in (entropy_picture(look(model, pictures())), dynamic_picture(average(model, [pictures()]))):
        labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
        assert set(labels) == {"column"}
