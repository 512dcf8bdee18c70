"""What the API writes is what `dynamixer.explain` takes, for models with any option."""

import base64
import json
from dataclasses import astuple

import numpy as np
import pytest
import timm
import torch

from dynamixer.explain import average, look
from dynamixer.serve.mixing import layouts, written
from helpers import sharpen
from serve.world import SMALL

OPTIONS = [
    {}, {"generator": "static"}, {"generator": "dense"}, {"softmax": False}, {"static": True}, {"row": False},
    {"column": False}, {"channel": False}, {"reweight": False}, {"shared": True}, {"img_size": (48, 80)},
    {"stem": "overlap"}, {"enlarge": True},
]  # fmt: skip
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=str)


def made(options):
    """A model, and pictures that it takes."""
    model = sharpen(timm.create_model("dynamixer_nano", **SMALL | options)).eval()
    size = (50, 44) if options.get("enlarge") else model.img_size
    return model, torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))


def numbers(axis):
    return torch.from_numpy(np.frombuffer(base64.b64decode(axis["data"]), "<f4").reshape(axis["shape"]).copy())


def agrees(block, axis, expected, options):
    """Whether an axis of the answer has the matrices [lines, S, K, K], those of a static model once."""
    if expected is None:
        return block[axis] is None
    if options.get("generator") == "static":
        assert expected.shape[0] > 1
        expected = expected[:1]
    return torch.equal(numbers(block[axis]), expected)


@EVERY
def test_what_is_written_is_what_was_mixed_with(options):
    model, pictures = made(options)
    seen, known = look(model, pictures[:1]), layouts(model, torch.zeros_like(pictures[:1]))
    answer = json.loads(json.dumps(written(seen.blocks, known, "float32")))
    assert [block["block"] for block in answer["blocks"]] == [0, 1, 2]
    assert [block["stage"] for block in answer["blocks"]] == [0, 0, 1]
    for block, mixing, layout in zip(answer["blocks"], seen.blocks, known, strict=True):
        assert block["grid"] == list(mixing.grid)
        assert agrees(block, "row", None if mixing.row is None else mixing.row[0], options)
        assert agrees(block, "column", None if mixing.column is None else mixing.column[0], options)
        assert layout.weights == sum(numbers(block[axis]).numel() for axis in ("row", "column") if block[axis])
        if mixing.branch_weights is None:
            assert block["branches"] is None
        else:
            assert list(block["branches"]) == list(mixing.branches)
            expected = mixing.branch_weights[0].mean(0)
            assert torch.allclose(torch.tensor(list(block["branches"].values())), expected, atol=1e-6)
        for cells, side in zip(
            mixing.grid, block["cell"], strict=True
        ):  # whole tokens cover the picture, none lies outside
            assert (cells - 1) * side < 1 <= cells * side + 1e-9


@EVERY
def test_an_average_is_one(options):
    model, pictures = made(options)
    known = layouts(model, pictures[:1])
    answer = written(average(model, [pictures]).blocks, known, "float32")
    every = look(model, pictures).blocks
    for block, mixing in zip(answer["blocks"], every, strict=True):
        for axis in ("row", "column"):
            if mixing.matrices(axis) is None:
                assert block[axis] is None
                continue
            mean, first = mixing.matrices(axis).mean(0), mixing.matrices(axis)[0]
            got = numbers(block[axis])
            assert torch.allclose(got, mean[: len(got)], atol=1e-6)
            assert options.get("generator") == "static" or not torch.allclose(got, first, atol=1e-2)
        if mixing.branch_weights is not None:
            means = torch.tensor(list(block["branches"].values()))
            assert torch.allclose(means, mixing.branch_weights.mean((0, 1)), atol=1e-6)


def test_a_layout_needs_no_numbers():
    model, pictures = made({})
    known = layouts(model, pictures[:1])
    with torch.device("meta"):
        empty = timm.create_model("dynamixer_nano", **SMALL).eval()
    assert [astuple(layout) for layout in layouts(empty, pictures[:1].to("meta"))] == [astuple(one) for one in known]
