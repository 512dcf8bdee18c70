"""A whole layer by the C++ kernels against the reference: values and every gradient, with matrices far from uniform."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynamixer.fuse import plan_of
from dynamixer.layers import MixerLayer, Mixing
from dynamixer.ops import layer as module
from dynamixer.ops import reference_mixing
from dynamixer.ops.layer import mixer_layer
from dynamixer.speed import use_kernel
from helpers import error, relative_entropy, sharpen

KINDS = [
    Mixing(),
    Mixing(softmax=False),
    Mixing(generator="static"),
    Mixing(generator="static", softmax=False),
    Mixing(static=True),
    Mixing(row=False),
    Mixing(column=False),
    Mixing(channel=False),
    Mixing(reweight=False),
]
# B, H, W, C, S, d: the nano's own; tokens that fill no tile; segments of odd widths; an odd reduction; one image in pieces
SHAPES = [(3, 8, 8, 64, 4, 2), (2, 7, 5, 48, 3, 3), (5, 3, 2, 80, 5, 1), (1, 20, 15, 32, 8, 2)]


def layer(mixing, shape, drop_path=0.0):
    _, height, width, channels, segments, reduced = shape
    made = sharpen(MixerLayer(channels, (height, width), segments, reduced, mixing, drop_path=drop_path))
    generator = torch.Generator().manual_seed(3)
    for norm in (made.norm1, made.norm2):
        for p, mean in ((norm.weight, 1.0), (norm.bias, 0.0)):
            p.data = mean + 0.3 * torch.randn(p.shape, generator=generator)
    return use_kernel(made)


def tokens(shape):
    return torch.randn(*shape[:4], generator=torch.Generator().manual_seed(4))


def reference(one, x):
    """Sections 3.2 and 3.3 of the paper, step by step."""
    mixer, read, branches = one.mixer, one.norm1(x), []
    for axis, part in ((-3, mixer.row if mixer.shared else mixer.column), (-2, mixer.row)):
        if part is not None:
            lines = read.transpose(axis, -2)
            mixed = reference_mixing(lines, part.weights(), segments=part.segments, softmax=part.softmax)
            branches.append(mixed.transpose(axis, -2))
    if mixer.channel is not None:
        branches.append(read @ mixer.channel.weight.T)
    if mixer.reweight is None:
        total = sum(branches)
    else:
        logits = mixer.reweight(sum(branches).mean((1, 2))).unflatten(-1, (-1, len(branches)))
        shares = logits.softmax(-1)[:, None, None]
        total = sum(branch * shares[..., i] for i, branch in enumerate(branches))
    x = x + mixer.project(total)
    return x + one.mlp.fc2(F.gelu(one.mlp.fc1(one.norm2(x))))


def results(way, one, x, autocast=False):
    """y and all gradients of a sum whose terms all weigh differently."""
    one.zero_grad()
    given = (x.bfloat16() if autocast else x.clone()).requires_grad_()  # as the stem hands tokens on
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = way(one, given)
    y.backward(torch.rand(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype))
    return {"y": y.detach(), "x": given.grad, **{name: p.grad.clone() for name, p in one.named_parameters()}}


def kernels(one, x):
    assert one.why_not_fused(x) is None
    return one(x)


def parts(one, x):
    for part in one.modules():
        part.fused = False
    try:
        return one(x)
    finally:
        use_kernel(one)


@pytest.mark.parametrize("mixing", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient_equal_the_reference(mixing, shape):
    one, x = layer(mixing, shape), tokens(shape)
    expected, ours = results(reference, one, x), results(kernels, one, x)
    assert expected.keys() == ours.keys()
    for key, value in expected.items():
        assert error(ours[key], value) < 1e-5, key


def test_one_operator_for_rows_and_columns_gathers_both_gradients():
    shape = (2, 6, 6, 32, 4, 2)
    one, x = layer(Mixing(shared=True), shape), tokens(shape)
    expected, ours = results(reference, one, x), results(kernels, one, x)
    assert all(error(ours[key], value) < 1e-5 for key, value in expected.items())


def test_these_weights_show_a_transposed_or_dropped_matrix():
    shape = SHAPES[0]
    one, x = layer(Mixing(), shape), tokens(shape)
    matrices = one.mixer.row.matrices_for(one.norm1(x))
    assert relative_entropy(matrices) < 0.7
    with torch.no_grad():
        expected = one(x)
        for axis in ("row", "column"):
            wrong = copy.deepcopy(one)
            generate = getattr(wrong.mixer, axis).generate
            for p in (generate.weight, generate.bias):
                p.copy_(p.unflatten(0, (8, 8)).transpose(0, 1).flatten(0, 1).clone())
            assert error(wrong(x), expected) > 0.05


@pytest.mark.parametrize("mixing", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_errs_at_most_twice_as_much_as_the_plain_computation(mixing, shape):
    one, x = layer(mixing, shape), tokens(shape)
    expected = results(reference, one, x)
    ours, plain = results(kernels, one, x, autocast=True), results(parts, one, x, autocast=True)
    assert ours["y"].dtype == torch.bfloat16
    for key, value in expected.items():
        assert ours[key].dtype == plain[key].dtype, key
        near, allowed = ((found[key].float() - value).norm() / value.norm() for found in (ours, plain))
        assert near <= 2 * allowed + 1e-3, key


def test_drop_path_draws_as_the_parts_do():
    shape = (16, 4, 4, 32, 4, 2)
    one, x, found = layer(Mixing(), shape, drop_path=0.5).train(), tokens(shape), []
    for way in (kernels, parts):
        torch.manual_seed(7)
        found.append(results(way, one, x))
    for key, value in found[1].items():
        assert error(found[0][key], value) < 1e-5, key
    assert error(found[0]["y"], one.eval()(x)) > 0.1


def test_the_same_bits_each_time_and_nearly_so_in_any_batch():
    shape = (9, 8, 8, 64, 4, 2)
    one, x = layer(Mixing(), shape), tokens(shape)
    first, second = results(kernels, one, x), results(kernels, one, x)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert error(one(x[4:5]), one(x)[4:5]) < 1e-6


def test_frozen_weights_stay_without_gradients():
    one, x = layer(Mixing(), SHAPES[0]), tokens(SHAPES[0])
    one.mixer.row.generate.requires_grad_(False)
    one(x).sum().backward()
    assert one.mixer.row.generate.weight.grad is None
    assert one.mixer.row.reduce.weight.grad.abs().max() > 0


def test_what_is_not_finite_shows_in_its_own_image():
    one, x = layer(Mixing(), SHAPES[0]), tokens(SHAPES[0])
    x[1, 2, 3, 4] = float("nan")
    y = one(x)
    assert torch.isfinite(y[[0, 2]]).all()
    assert y[1].isnan().any()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda one: one.mlp.register_forward_hook(lambda *_: None), "has a hook"),
        (lambda one: setattr(one.mlp, "fc1", nn.Sequential(one.mlp.fc1)), "was replaced"),
        (lambda one: one.to(torch.float64), "float64"),
        (lambda one: one.mixer.set_grid((9, 8)), "native 9 tokens"),
        (lambda one: setattr(one.mlp, "act", nn.GELU("tanh")), "was replaced"),
        (lambda one: setattr(one.mlp.drop1, "p", 0.5), "was replaced"),
        (lambda one: setattr(one, "norm1", nn.LayerNorm(SHAPES[0][3], elementwise_affine=False)), "was replaced"),
    ],
)
def test_where_it_cannot_it_says_why_and_the_parts_run(monkeypatch, change, why):
    one = layer(Mixing(), SHAPES[0])
    change(one)
    one.eval()
    x = tokens(SHAPES[0]).to(one.norm2.weight.dtype)
    assert why in one.why_not_fused(x)
    monkeypatch.setattr("dynamixer.layers.mixer_layer", lambda *_: pytest.fail("not by the kernels"))
    assert error(one(x), parts(one, x)) < 1e-5


def test_other_widths_than_whole_vectors_run_in_parts():
    shape = (2, 4, 4, 36, 3, 2)
    one = layer(Mixing(), shape)
    assert "do not divide 36 channels" in one.why_not_fused(tokens(shape))


def test_a_compiler_makes_its_own_choice(monkeypatch):
    one, x = layer(Mixing(), SHAPES[0]), tokens(SHAPES[0])
    expected = one(x)
    monkeypatch.setattr("dynamixer.layers.mixer_layer", lambda *_: pytest.fail("not by the kernels"))
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), expected) < 1e-5


def test_it_keeps_eight_numbers_for_each_channel_of_a_token():
    shape = (4, 16, 16, 64, 4, 2)
    one, x, kept = layer(Mixing(), shape), tokens(shape).requires_grad_(), {}
    weights = {p.data_ptr() for p in one.parameters()}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        one(x)
    assert 8 <= sum(kept.values()) / (x.numel() * 4) < 9


def test_the_function_takes_what_the_plan_names():
    one, x = layer(Mixing(static=True), SHAPES[0]), tokens(SHAPES[0])
    plan, parameters = plan_of(one)
    assert len(plan.names) == len(parameters) == len(list(one.parameters()))
    assert torch.equal(mixer_layer(plan, x, None, parameters), one(x))


def test_without_gradients_nothing_is_made_for_them(monkeypatch):
    one, x, asked = layer(Mixing(), SHAPES[0]), tokens(SHAPES[0]), []
    expected = one(x)
    real = module.forward
    monkeypatch.setattr(module, "forward", lambda *a, keep: asked.append(keep) or real(*a, keep=keep))
    with torch.no_grad():
        assert torch.equal(one(x), expected)
    assert asked == [False]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_type_changes_nothing(default):
    one, x = layer(Mixing(), SHAPES[0]), tokens(SHAPES[0])
    expected = results(kernels, one, x)
    torch.set_default_dtype(default)
    try:
        got = results(kernels, one, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in expected.items():
        assert error(got[key], value) < 1e-6, key


def test_weights_in_another_order_of_memory_are_the_same_weights():
    one, x = layer(Mixing(), SHAPES[0]), tokens(SHAPES[0])
    expected = results(kernels, one, x)
    turned = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in one.state_dict().items()}
    one.load_state_dict(turned, assign=True)
    assert not one.mixer.project.weight.is_contiguous()
    got = results(kernels, one.requires_grad_(), x)
    for key, value in expected.items():
        assert error(got[key], value) < 1e-6, key


def test_a_hook_of_a_part_is_called():
    one, x, seen = layer(Mixing(), SHAPES[0]), tokens(SHAPES[0]), []
    for part in (one.mixer, one.mlp.fc1):
        part.register_full_backward_hook(lambda *_: seen.append(1))
    results(lambda one, x: one(x), one, x)
    assert len(seen) == 2


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_the_work(threads):
    one, x = layer(Mixing(static=True), (9, 8, 8, 64, 4, 2)), tokens((9, 8, 8, 64, 4, 2))
    expected, before = results(reference, one, x), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        once, again = results(kernels, one, x), results(kernels, one, x)
    finally:
        torch.set_num_threads(before)
    for key, value in expected.items():
        assert torch.equal(once[key], again[key]), key
        assert error(once[key], value) < 1e-5, key


def test_torchs_counter_sees_the_work_inside_the_kernels():
    """Forward and backward of whole layers, within what the reweighting takes from means in place of tokens."""
    shape = (2, 8, 8, 64, 4, 2)
    counts = []
    for way in (kernels, parts):
        with FlopCounterMode(display=False) as counter:
            results(way, layer(Mixing(), shape), tokens(shape))
        counts.append(counter.get_total_flops())
    assert abs(counts[0] / counts[1] - 1) < 0.03, counts
