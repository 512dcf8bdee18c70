import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dynamixer.errors import UserError
from dynamixer.layers import AxisMixer, DynaMixerBlock, MixerLayer, Mixing, PatchConv
from helpers import error, relative_entropy, sharpen

C, S, D = 24, 4, 2


def block(grid=(6, 4), **options):
    return sharpen(DynaMixerBlock(C, grid, S, D, Mixing(**options)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"generator": "dynamc"}, "did you mean 'dynamic'"),
        ({"generator": "static", "static": True}, "none to add it to"),
        ({"row": False, "column": False}, "no mixing between tokens"),
        ({"shared": True, "row": False}, "neither can be left out"),
        ({"row": False, "channel": False}, "single branch has no effect"),
    ],
)
def test_a_combination_without_meaning_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Mixing(**options)


def test_a_shared_operator_needs_a_square_grid_at_the_start_and_later():
    with pytest.raises(UserError, match="square grid of tokens, and this one is 6x4"):
        block(shared=True)
    square = block((4, 4), shared=True)
    with pytest.raises(UserError, match="square grid"):
        square.set_grid((4, 5))
    square.set_grid((5, 5))
    assert square.row.length == 5


def test_segments_have_to_divide_the_channels():
    with pytest.raises(UserError, match="5 segments do not divide 24 channels"):
        AxisMixer(C, 4, 5, D, Mixing())


def test_the_block_is_the_specified_sum_of_branches():
    """Section 2 of the specification, written again with the branches as parts."""
    b, x = block(), torch.randn(3, 6, 4, C)
    column = torch.stack([b.column(x[:, :, w]) for w in range(4)], dim=2)
    row = torch.stack([b.row(x[:, h]) for h in range(6)], dim=1)
    channel = b.channel(x)
    a = b.reweight((column + row + channel).mean((1, 2))).view(3, C, 3).softmax(-1)[:, None, None]
    expected = b.project(a[..., 0] * column + a[..., 1] * row + a[..., 2] * channel)
    assert error(b(x), expected) < 1e-5
    assert relative_entropy(b.row.matrices_for(x)) < 0.7
    weights = b.branch_weights(b.branches(x))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, C))
    assert weights.std() > 0.02


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"row": False}, ("column", "channel")),
        ({"column": False}, ("row", "channel")),
        ({"channel": False}, ("column", "row")),
        ({"reweight": False}, ("column", "row", "channel")),
    ],
)
def test_each_branch_can_be_left_out(options, names):
    b, x = block(**options), torch.randn(2, 6, 4, C)
    parts = {
        "column": lambda: b.column(x.transpose(1, 2)).transpose(1, 2),
        "row": lambda: b.row(x),
        "channel": lambda: b.channel(x),
    }
    made = [parts[name]() for name in names]
    if b.reweight is None:
        expected = b.project(sum(made))
        with pytest.raises(UserError, match="reweight=False"):
            b.branch_weights(made)
    else:
        a = b.reweight(sum(made).mean((1, 2))).view(2, C, len(made)).softmax(-1)[:, None, None]
        expected = b.project(sum(a[..., i] * part for i, part in enumerate(made)))
    assert error(b(x), expected) < 1e-5


def test_shared_rows_and_columns_use_one_operator():
    b, x = block((5, 5), shared=True), torch.randn(2, 5, 5, C)
    torch.testing.assert_close(b.branches(x)[0], b.row(x.transpose(1, 2)).transpose(1, 2))
    turned = b(x.transpose(1, 2)).transpose(1, 2)
    assert error(turned, b(x)) > 1e-3  # the reweighting still tells columns from rows


KINDS = [
    {"generator": generator, "softmax": softmax, "static": static}
    for generator, softmax, static in itertools.product(("dynamic", "dense", "static"), (True, False), (False, True))
    if not (static and generator == "static")
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("grid", [(9, 4), (4, 3), (3, 10)])
def test_folding_a_size_into_the_weights_keeps_the_resampled_function(options, grid):
    b, x = block(**options, windows=False), torch.randn(2, *grid, C)
    expected = b(x)
    folded = copy.deepcopy(b)
    folded.set_grid(grid)
    assert (folded.column.length, folded.row.length) == grid
    assert error(folded(x), expected) < 1e-5
    windowed = block(**options)
    longer = grid[0] > 6 or grid[1] > 4
    assert (error(windowed(x), expected) > 1e-3) == longer  # only longer lines have windows


def test_folding_keeps_frozen_parameters_frozen_and_the_dtype():
    b = block(static=True).double().requires_grad_(False)
    b.set_grid((7, 7))
    assert not any(p.requires_grad for p in b.parameters())
    assert {p.dtype for p in b.parameters()} == {torch.float64}


@pytest.mark.parametrize(("size", "stride"), [((21, 14), 7), ((20, 9), 7), ((3, 3), 7), ((5, 8), 2)])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_does_not_fill_a_patch_is_padded_below_and_right(size, stride, overlap):
    conv = PatchConv(3, 8, stride, kernel=2 * stride if overlap else None)
    x = torch.randn(2, 3, *size)
    rows, columns = -(-size[0] // stride), -(-size[1] // stride)
    whole = torch.zeros(2, 3, rows * stride, columns * stride)
    whole[..., : size[0], : size[1]] = x
    y = conv(x)
    assert y.shape == (2, rows, columns, 8)
    torch.testing.assert_close(y, conv(whole))
    if not overlap:
        first = nn.functional.conv2d(whole[..., :stride, :stride], conv.proj.weight, conv.proj.bias)
        torch.testing.assert_close(y[:, 0, 0], first[..., 0, 0])


def test_a_processor_without_bf16_convolves_the_same_rounded_numbers_in_fp32(monkeypatch):
    monkeypatch.setattr("dynamixer.layers.computes_in_bf16", lambda: False)
    conv, x = PatchConv(3, 8, 4), torch.randn(2, 3, 10, 8)
    found = []
    for conv.fused in (False, True):
        if conv.fused:
            monkeypatch.setattr(conv.proj, "forward", lambda _: pytest.fail("in bf16"))
        conv.zero_grad()
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(given)
        y.backward(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16())
        found.append([y.detach(), given.grad, conv.proj.weight.grad, conv.proj.bias.grad])
    for plain, ours in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours.float() - plain.float()).norm() < 0.01 * plain.float().norm()


def test_a_dropped_path_leaves_the_residual():
    layer = MixerLayer(C, (4, 4), S, D, Mixing(), drop_path=0.999999).train()
    x = torch.randn(2, 4, 4, C)
    assert torch.equal(layer(x), x)
    assert not torch.equal(layer.eval()(x), x)


class Adapter(nn.Module):
    """What adapters of low rank do: the layer that was there, and something beside it; parameters seem to be the layer's own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.beside = nn.Linear(base.in_features, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.beside(x)

    def merged(self):
        one = copy.deepcopy(self.base)
        with torch.no_grad():
            one.weight += self.beside.weight
            one.bias += self.beside.bias
        return one


@pytest.mark.parametrize("length", [6, 9])
@pytest.mark.parametrize(
    ("generator", "part"),
    [(g, p) for g, parts in (("dynamic", ("reduce", "generate")), ("dense", ("hidden", "rows"))) for p in (*parts, "project")],
)  # fmt: skip
def test_an_adapter_around_a_linear_layer_acts(generator, part, length):
    mixer, x = sharpen(AxisMixer(C, 6, S, D, Mixing(generator=generator))), torch.randn(2, 3, length, C)
    before = mixer(x)
    adapter = sharpen(Adapter(getattr(mixer, part)), seed=1)
    setattr(mixer, part, adapter)
    found = mixer(x)
    compiled = torch.compile(mixer, backend="eager")(x)
    setattr(mixer, part, adapter.merged())
    assert error(found, mixer(x)) < 1e-5
    assert error(compiled, mixer(x)) < 1e-5
    assert error(found, before) > 0.1


def test_hooks_of_all_linear_layers_are_called():
    b, x, seen = block(), torch.randn(2, 6, 4, C), []
    expected = b(x)
    linear = {name for name, part in b.named_modules() if isinstance(part, nn.Linear)}
    for name in linear:
        b.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert error(b(x), expected) < 1e-6
    assert set(seen) == linear
    assert len(seen) == len(linear)


def test_a_pruned_layer_is_trained():
    mixer, x = sharpen(AxisMixer(C, 6, S, D, Mixing())), torch.randn(2, 3, 6, C)
    prune.l1_unstructured(mixer.reduce, "weight", 0.5)
    optimizer = torch.optim.SGD(mixer.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = mixer(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_an_adapter_is_merged_before_the_native_size_changes():
    mixer = AxisMixer(C, 6, S, D, Mixing())
    mixer.generate = Adapter(mixer.generate)
    with pytest.raises(UserError, match="a generator is of the type Adapter: merge adapters before changing"):
        mixer.set_length(7)
    assert mixer.length == 6
