import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch.nn import functional as F

import dynamixer
from dynamixer.errors import UserError
from dynamixer.explain import look, mixing_matrices, receptive, record
from dynamixer.explain.matrices import blocks_of
from dynamixer.layers import AxisMixer
from dynamixer.speed.kernel import kernel_if_any
from helpers import error, relative_entropy
from small_models import OPTIONS, PICTURES, pictures, small

EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
SIZES = pytest.mark.parametrize("size", PICTURES.values(), ids=PICTURES.keys())


def inputs_and_outputs(model, x):
    """What each block reads and writes."""
    kept = []
    handles = [
        block.register_forward_hook(lambda _, args, out: kept.append((args[0], out))) for _, block in blocks_of(model)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return kept


def mixed_by(matrices, lines, segments, project):
    """Matrices [B, lines, S, K, K] applied to lines [B, lines, K, C], token by token."""
    values = lines.unflatten(-1, (segments, -1))  # [B, lines, K, S, c]
    mixed = torch.stack(
        [
            sum(matrices[..., o, i, None] * values[..., i, :, :] for i in range(lines.shape[2]))  # [B, lines, S, c]
            for o in range(lines.shape[2])
        ],
        dim=2,
    )
    return F.linear(mixed.flatten(-2), project.weight, project.bias)


def block_by_hand(block, mixing, x, turned=False):
    """The block's output from the matrices and weights of its branches that were taken from it."""
    made = []
    with torch.no_grad():
        for branch in mixing.branches:
            if branch == "channel":
                made.append(block.channel(x))
                continue
            mixer = block.row if branch == "row" or block.shared else block.column
            lines = x if branch == "row" else x.transpose(1, 2)
            matrices = mixing.matrices(branch)
            out = mixed_by(matrices.mT if turned else matrices, lines, mixing.segments, mixer.project)
            made.append(out if branch == "row" else out.transpose(1, 2))
        weights = mixing.branch_weights
        if weights is not None:
            made = [part * weights[:, None, None, :, i] for i, part in enumerate(made)]
        return block.project(sum(made))


@EVERY
@SIZES
def test_matrices_applied_by_hand_give_the_blocks_output_and_transposed_do_not(options, size):
    model = small(**options)
    if options.get("shared") and size[0] != size[1]:
        size = size[0], size[0]
    x = pictures(size)
    seen = look(model, x)
    for mixing, (_, block), (read, written) in zip(
        seen.blocks, blocks_of(model), inputs_and_outputs(model, x), strict=True
    ):
        assert mixing.grid == read.shape[1:3]
        assert error(block_by_hand(block, mixing, read), written) < 1e-5
        assert error(block_by_hand(block, mixing, read, turned=True), written) > 0.02


@EVERY
@pytest.mark.parametrize("by_kernels", [False, True])
def test_the_logits_stay_what_they_are_to_the_bit(options, by_kernels):
    model = small(**options)
    if by_kernels:
        model = kernel_if_any(model)
    for x in (pictures(), pictures((20, 20))):
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(look(model, x).logits, expected)
            with record(model) as seen:
                assert torch.equal(model(x), expected)
            assert len(seen) == 3
            assert torch.equal(model(x), expected)


def test_training_goes_on_as_if_nobody_looked():
    model = small(drop_path_rate=0.5, drop_rate=0.3).train()
    model.stages[1].eval()
    x = pictures()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    with record(model):
        logits = model(x)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    evaluated = look(model, x).logits
    assert torch.equal(evaluated, model.eval()(x))  # `look` is of the evaluated model
    model.train()
    model.stages[1].eval()
    modes = [m.training for m in model.modules()]
    look(model, x)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_is_not_asked_for_is_neither_made_nor_kept(monkeypatch):
    model, made = small(), []
    true = AxisMixer.matrices_for
    monkeypatch.setattr(AxisMixer, "matrices_for", lambda self, x: made.append(self) or true(self, x))
    monkeypatch.setattr(
        type(blocks_of(model)[0][1]), "branch_weights", lambda *_: pytest.fail("not asked for"), raising=True
    )
    model.stages[0].blocks[0].mixer.reweight = model.stages[1].blocks[0].mixer.reweight = None
    model.stages[1].blocks[1].mixer.reweight = None
    (mixing,) = mixing_matrices(model, pictures(), blocks=[-1], axes=["row"])
    assert made == [model.stages[1].blocks[1].mixer.row]
    assert (mixing.block, mixing.name) == (2, "stages.1.blocks.1")
    assert mixing.column is None
    assert mixing.entropy("column") is None
    assert mixing.branch_weights is None
    assert mixing.row.shape == (2, 4, 4, 4, 4)
    assert not mixing.row.requires_grad


@EVERY
def test_rows_sum_to_one_with_the_softmax_and_need_not_without(options):
    mixings = mixing_matrices(small(**options), pictures())
    assert [m.block for m in mixings] == [0, 1, 2]
    for mixing in mixings:
        for axis in ("row", "column"):
            matrices = mixing.matrices(axis)
            assert (matrices is None) == (options.get(axis) is False)
            if matrices is not None and mixing.softmax:
                assert torch.allclose(matrices.sum(-1), torch.ones(()), atol=1e-5)
                assert (matrices.sum(-2) - 1).abs().max() > 0.3  # of output tokens: not of input tokens too
            elif matrices is not None:
                assert matrices.min() < -0.1


def test_static_matrices_have_no_content_and_say_so():
    for options, content in (({"generator": "static"}, False), ({}, True), ({"static": True}, True)):
        for mixing in mixing_matrices(small(**options), pictures()):
            assert mixing.content is content
            assert torch.equal(mixing.row[0], mixing.row[1]) is not content
            assert torch.equal(mixing.row[:, 0], mixing.row[:, 1]) is not content


def test_a_line_of_matrices_belongs_to_that_line_of_the_grid():
    model, x = small(depths=(1,), dims=(8,), segments=(2,)), pictures(count=1)
    (before,) = mixing_matrices(model, x)
    x[:, :, 4:6] += 1.0  # the pixels of row 2 of tokens
    (after,) = mixing_matrices(model, x)
    changed = (before.row - after.row).abs().amax((0, 2, 3, 4)) > 1e-3
    assert changed.tolist() == [i == 2 for i in range(8)]
    assert ((before.column - after.column).abs().amax((0, 2, 3, 4)) > 1e-3).all()


def test_entropy_is_that_of_the_rows():
    model = small()
    for mixing in mixing_matrices(model, pictures()):
        assert float(mixing.entropy("row").mean()) == pytest.approx(relative_entropy(mixing.row), abs=1e-5)
        assert float(mixing.entropy("row").mean()) < 0.9
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, AxisMixer):
                part.generate.weight.zero_()
                part.generate.bias.zero_()
        even = mixing_matrices(model, pictures(), blocks=[0])[0]
        model.stages[0].blocks[0].mixer.row.generate.bias.view(8, 8).copy_(100 * torch.eye(8))
        one = mixing_matrices(model, pictures(), blocks=[0])[0]
    assert even.entropy("row") == pytest.approx(torch.ones(2, 2))
    assert one.entropy("row") == pytest.approx(torch.zeros(2, 2), abs=1e-6)
    assert one.entropy("column") == pytest.approx(torch.ones(2, 2))
    signed = mixing_matrices(small(softmax=False), pictures())[0]
    p = signed.row.abs() / signed.row.abs().sum(-1, keepdim=True)
    expected = -(p * p.log()).sum(-1).mean((1, 3)) / math.log(8)
    assert signed.entropy("row") == pytest.approx(expected, abs=1e-5)


@EVERY
def test_shares_sum_to_one(options):
    for mixing in look(small(**options), pictures()).blocks:
        assert set(mixing.shares) == set(mixing.branches)
        whole = sum(share if share.ndim == 1 else share.sum(1) for share in mixing.shares.values())
        assert torch.allclose(whole, torch.ones(2), atol=1e-5)


def test_a_segment_or_branch_without_projection_has_no_share():
    model = small(reweight=False)
    block = model.stages[0].blocks[0].mixer
    with torch.no_grad():
        block.column.project.weight.zero_()
        block.row.project.weight[:, :4] = 0  # segment 0
        block.row.project.weight[:, 4:] = 1.0
        block.channel.weight.zero_()
        block.channel.weight[:, 0] = 2.0
    shares = look(model, pictures()).blocks[0].shares
    assert shares["column"].tolist() == [[0, 0], [0, 0]]
    assert shares["row"] == pytest.approx(torch.tensor([[0, 2 / 3], [0, 2 / 3]]))
    assert shares["channel"] == pytest.approx(torch.tensor([1 / 3, 1 / 3]))
    with torch.no_grad():
        block.row.project.weight.zero_()
        block.channel.weight.zero_()
    assert sum(float(share.sum()) for share in look(model, pictures()).blocks[0].shares.values()) == 0


def test_shares_follow_the_reweighting():
    model = small()
    block = model.stages[0].blocks[0].mixer
    with torch.no_grad():
        for linear in (block.column.project, block.row.project, block.channel):
            linear.weight.fill_(0.5)
    mixing = look(model, pictures()).blocks[0]
    weights = mixing.branch_weights  # [B, C, branches]
    assert (weights.mean(1)[0] - weights.mean(1)[1]).abs().max() > 1e-3
    for i, branch in enumerate(("column", "row", "channel")):
        share = mixing.shares[branch]
        assert (share if branch == "channel" else share.sum(1)) == pytest.approx(weights[..., i].mean(1), abs=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (33, 16), (5, 5), (1, 40), (13, 13)])
@pytest.mark.parametrize("enlarge", [False, True])
def test_the_side_of_a_token_in_pixels(size, enlarge):
    model = small(dims=(8, 16, 32), depths=(1, 1, 1), segments=(2, 4, 4), enlarge=enlarge)
    seen = look(model, pictures(size, 1))
    assert seen.size == (size if not enlarge else seen.size)
    assert all(a >= b for a, b in zip(seen.size, (16, 16) if enlarge else size, strict=True))
    for mixing, side in zip(seen.blocks, (2, 4, 8), strict=True):
        assert mixing.grid == tuple(-(-pixels // side) for pixels in seen.size)
        if max(mixing.grid) > 1:
            assert seen.token_side(mixing) == side


def test_blocks_inside_other_models_and_compiled_ones_are_found():
    x = pictures()
    names = ["stages.0.blocks.0"]
    model = small(depths=(1,), dims=(8,), segments=(2,))
    expected = mixing_matrices(model, x)
    assert [m.name for m in expected] == names
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    found = mixing_matrices(compiled, x)
    assert [m.name for m in found] == names
    assert all(torch.equal(a.row, b.row) for a, b in zip(found, expected, strict=True))
    model.compile(backend="eager")  # in place
    with torch.no_grad():
        model(x)
    assert all(torch.equal(a.row, b.row) for a, b in zip(mixing_matrices(model, x), expected, strict=True))
    backbone = timm.create_model("dynamixer_nano", features_only=True).eval()
    assert len(mixing_matrices(backbone, torch.randn(1, 3, 32, 32), axes=["column"])) == 6


def test_threads_that_share_a_model_do_not_see_each_other():
    model, x = small(), pictures(count=1)
    others = pictures((20, 24), seed=5)
    expected, stop = look(model, x), threading.Event()
    with torch.no_grad():
        logits = model(others)

    def predicting():
        with torch.inference_mode():
            while not stop.is_set():
                assert torch.equal(model(others), logits)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(predicting) for _ in range(2)]
        looking = [pool.submit(look, model, x) for _ in range(20)]
        found = receptive(model, x, (1, 2))
        for seen in [look(model, x), *(job.result() for job in looking)]:
            assert seen.size == (16, 16)
            assert [b.block for b in seen.blocks] == [0, 1, 2]
            assert all(torch.equal(a.row, b.row) for a, b in zip(seen.blocks, expected.blocks, strict=True))
        stop.set()
        for job in running:
            job.result()
    assert torch.equal(found.gradient, receptive(model, x, (1, 2)).gradient)


def test_half_precision_and_autocast():
    model, x = small(), pictures()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(x)
        assert torch.equal(look(model, x).logits, expected)
    seen = look(model.bfloat16(), x.bfloat16())
    assert seen.blocks[0].row.dtype == torch.bfloat16
    assert torch.allclose(seen.blocks[0].row.float().sum(-1), torch.ones(()), atol=0.02)


def test_mistakes_are_one_sentence():
    model = small()
    for call, words in (
        (lambda: mixing_matrices(timm.create_model("resnet18"), pictures()), "ResNet has no DynaMixer blocks"),
        (lambda: mixing_matrices(model, pictures(), blocks=[3]), r"no block 3: this model has 3, numbered from 0 to 2"),
        (lambda: mixing_matrices(model, pictures(), blocks=[-4]), "no block -4"),
        (lambda: mixing_matrices(model, pictures(), axes=["rows"]), "did you mean 'row'"),
        (lambda: mixing_matrices(model, pictures()[0]), r"images have to be \[images, channels, height, width\]"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert dynamixer.mixing_matrices is mixing_matrices
    assert mixing_matrices(model, pictures(), blocks=[]) == ()
    assert not any(m._forward_pre_hooks for m in model.modules())
