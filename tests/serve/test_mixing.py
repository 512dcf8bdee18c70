"""Matrices of models with any option, taken without changing what the model says."""

import pytest
import timm
import torch

from dynamixer.serve.mixing import Average, count_numbers, observe
from helpers import sharpen
from serve.world import SMALL

OPTIONS = [
    {}, {"generator": "static"}, {"generator": "dense"}, {"softmax": False}, {"static": True}, {"row": False},
    {"column": False}, {"channel": False}, {"reweight": False}, {"shared": True}, {"img_size": (48, 80)},
    {"stem": "overlap"}, {"enlarge": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_taken_is_what_was_mixed_with(options):
    model = sharpen(timm.create_model("dynamixer_nano", **SMALL | options)).eval()
    height, width = (50, 44) if options.get("enlarge") else model.img_size
    x = torch.randn(1, 3, height, width)
    with torch.inference_mode():
        expected = model(x)
    logits, blocks = observe(model, x)
    assert torch.equal(logits, expected)
    assert [b.numbers for b in blocks] == count_numbers(model, (height, width))
    layers = [layer for stage in model.stages for layer in stage.blocks]
    entered = []
    handles = [layer.mixer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])) for layer in layers]
    with torch.inference_mode():
        model(x)
        for layer, block, tokens in zip(layers, blocks, entered, strict=True):
            mixer = layer.mixer
            column = mixer.row if mixer.shared else mixer.column
            for axis, kept, lines in ((mixer.row, block.row, tokens), (column, block.column, tokens.transpose(1, 2))):
                if axis is None:
                    assert kept is None
                    continue
                # Mixing by hand with what was taken gives what the axis gives.
                values = lines.unflatten(-1, (axis.segments, -1)).movedim(-2, -3)
                by_hand = axis.project((kept @ values).movedim(-3, -2).flatten(-2))
                assert torch.allclose(by_hand, axis(lines), atol=1e-5)
                assert not torch.allclose(
                    axis.project((kept.mT @ values).movedim(-3, -2).flatten(-2)), axis(lines), atol=1e-2
                )
            if mixer.reweight is None:
                assert block.branches is None
            else:
                weights = mixer.branch_weights(mixer.branches(tokens)).mean((0, 1))
                assert torch.allclose(torch.tensor(list(block.branches.values())), weights, atol=1e-6)
    for handle in handles:
        handle.remove()


def test_only_what_is_asked_for_is_taken_and_nothing_stays():
    model = sharpen(timm.create_model("dynamixer_nano", **SMALL)).eval()
    x = torch.randn(1, 3, 64, 64)
    _, (block,) = observe(model, x, frozenset({2}))
    assert block.stage == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_average_is_one():
    model = sharpen(timm.create_model("dynamixer_nano", **SMALL)).eval()
    mean, every = Average(), []
    for _ in range(3):
        _, blocks = observe(model, torch.randn(1, 3, 64, 64))
        mean.add(blocks)
        every.append(blocks)
    for i, block in enumerate(mean.mean()):
        assert torch.allclose(block.row, torch.stack([b[i].row for b in every]).mean(0), atol=1e-6)
        for name, share in block.branches.items():
            assert abs(share - sum(b[i].branches[name] for b in every) / 3) < 1e-6
