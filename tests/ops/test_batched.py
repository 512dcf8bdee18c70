"""The batched operation against the reference: values and every gradient, with matrices far from uniform."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from torch._inductor import metrics
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynamixer.layers import AxisMixer, Mixing
from dynamixer.ops import StaticWeights, batched_mixing, mixing_matrices, opaque, reference_mixing
from dynamixer.ops.opaque import opaque_matrices
from dynamixer.ops.resample import interpolation
from helpers import error, relative_entropy, sharpen

L, C, S, D = 6, 24, 4, 3
OPTIONS = ("segments", "length", "softmax", "windowed")
KINDS = [
    Mixing(generator=generator, softmax=softmax, static=static)
    for generator, softmax, static in itertools.product(("dynamic", "dense", "static"), (True, False), (False, True))
    if not (static and generator == "static")
]


def mixer(mixing=KINDS[0], length=L, dtype=torch.float32):
    return sharpen(AxisMixer(C, length, S, D, mixing)).to(dtype)


@pytest.mark.parametrize("mixing", KINDS, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 3)])
def test_forward_and_every_gradient_equal_the_reference(mixing, leading):
    module = mixer(mixing)
    x = torch.randn(*leading, L, C)
    results = []
    for way in (reference_mixing, lambda *a, **k: batched_mixing(*a, length=L, **k)):
        module.zero_grad()
        given = x.clone().requires_grad_()
        y = way(given, module.weights(), segments=S, softmax=mixing.softmax)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        results.append({"y": y.detach(), "x": given.grad, **grads})
    for key, expected in results[0].items():
        assert expected.abs().max() > 0, key
        assert error(results[1][key], expected) < 1e-5, key


@pytest.mark.parametrize("mixing", [m for m in KINDS if m.softmax], ids=str)
def test_these_weights_show_a_transposed_or_dropped_matrix(mixing):
    module = mixer(mixing)
    x = torch.randn(5, L, C)
    matrices = module.matrices_for(x)
    assert relative_entropy(matrices) < 0.7
    expected = reference_mixing(x, module.weights(), segments=S)
    for wrong in (matrices.transpose(-1, -2), torch.full_like(matrices, 1 / L), torch.eye(L).expand_as(matrices)):
        values = x.unflatten(-1, (S, -1)).movedim(-2, -3)
        y = module.project((wrong @ values).movedim(-3, -2).flatten(-2))
        assert error(y, expected) > 0.1


def test_rows_of_the_matrices_sum_to_one_with_the_softmax_only():
    x = torch.randn(5, L, C)
    ones = mixer().matrices_for(x).sum(-1)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    assert mixer(Mixing(softmax=False)).matrices_for(x).sum(-1).std() > 0.1


def test_a_constant_added_to_the_logits_changes_nothing():
    module, x = mixer(), torch.randn(5, L, C)
    before = module(x)
    with torch.no_grad():
        module.generate.bias += 7.0
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-5)


def test_permuted_lines_give_permuted_results():
    module, x, order = mixer(), torch.randn(7, L, C), torch.randperm(7)
    torch.testing.assert_close(module(x)[order], module(x[order]))


def test_one_token_mixes_to_itself():
    module, x = mixer(length=1), torch.randn(5, 1, C)
    torch.testing.assert_close(module(x), module.project(x))


def test_an_empty_batch_stays_empty():
    assert mixer()(torch.randn(0, 3, L, C)).shape == (0, 3, L, C)
    assert reference_mixing(torch.randn(0, L, C), mixer().weights(), segments=S).shape == (0, L, C)


@pytest.mark.parametrize("mixing", KINDS, ids=str)
def test_bf16_errs_at_most_twice_as_much_as_the_plain_bf16_computation(mixing):
    module = mixer(mixing)
    x = torch.randn(16, L, C)
    expected = reference_mixing(x, module.weights(), segments=S, softmax=mixing.softmax)
    half = mixer(mixing, dtype=torch.bfloat16)
    ours = half(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert error(ours, expected) <= 2 * error(plain(half, x.bfloat16(), mixing), expected)


@pytest.mark.parametrize("mixing", KINDS, ids=str)
def test_gradients_in_bf16_err_at_most_three_times_as_much_as_the_plain_bf16_ones(mixing):
    x = torch.randn(16, L, C)

    def gradients(module, way, dtype):
        given = x.detach().clone().to(dtype).requires_grad_()
        y = way(module, given)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        return {"x": given.grad} | {name: p.grad for name, p in module.named_parameters()}

    def reference(module, x):
        return reference_mixing(x, module.weights(), segments=S, softmax=mixing.softmax)

    exact = gradients(mixer(mixing), reference, torch.float32)
    half = mixer(mixing, dtype=torch.bfloat16), mixer(mixing, dtype=torch.bfloat16)
    ours = gradients(half[0], lambda module, x: module(x), torch.bfloat16)
    slow = gradients(half[1], lambda module, x: plain(module, x, mixing), torch.bfloat16)
    for name, expected in exact.items():
        assert ours[name].dtype == torch.bfloat16
        assert error(ours[name], expected) <= 3 * error(slow[name], expected) + 1e-3, name
        assert error(slow[name], expected) < 0.2, name


def plain(module, x, mixing):
    """The equations in the dtype at hand, segment by segment."""
    w, parts = module.weights(), []
    for s, value in enumerate(x.chunk(S, -1)):
        if mixing.generator == "dynamic":
            reduced = F.linear(x, w.reduce_weight, w.reduce_bias).chunk(S, -1)[s]
            logits = F.linear(reduced.flatten(1), w.generate_weight, w.generate_bias).view(-1, L, L)
        elif mixing.generator == "dense":
            hidden = F.gelu(F.linear(x, w.hidden_weight, w.hidden_bias))
            logits = F.linear(hidden, w.row_weight, w.row_bias).chunk(S, -1)[s]
        else:
            logits = w.matrices[s].expand(len(x), L, L)
        logits = logits if w.static is None else logits + w.static[s]
        parts.append((logits.softmax(-1) if mixing.softmax else logits) @ value)
    return F.linear(torch.cat(parts, -1), w.project_weight, w.project_bias)


def test_the_softmax_accumulates_in_fp32_under_autocast():
    length = 64
    weights = StaticWeights(torch.randn(1, length, length) * 0.1, torch.eye(8), torch.zeros(8))
    with torch.autocast("cpu", torch.bfloat16):
        logits = mixing_matrices(
            torch.randn(1, length, 8), weights, segments=1, length=length, softmax=False
        ).bfloat16()
        got = mixing_matrices(
            torch.randn(1, length, 8), weights._replace(matrices=logits), segments=1, length=length, softmax=True
        )
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, logits.double().softmax(-1).float().bfloat16())


def test_double_precision_stays_double():
    y = mixer(dtype=torch.float64)(torch.randn(2, L, C, dtype=torch.float64))
    expected = mixer()(torch.randn(2, L, C))
    assert y.dtype == torch.float64
    assert expected.dtype == torch.float32
    rows = mixer(dtype=torch.float64).matrices_for(torch.randn(2, L, C, dtype=torch.float64)).sum(-1)
    assert (rows - 1).abs().max() < 1e-14


def both(mixing):
    return [mixing, replace(mixing, windows=False)]


@pytest.mark.parametrize("mixing", [m for kind in KINDS for m in both(kind)], ids=str)
@pytest.mark.parametrize("length", [1, 4, 9, 13])
def test_lines_of_another_length_mix_with_matrices_of_their_own_size(mixing, length):
    module, x = mixer(mixing), torch.randn(3, 2, length, C)
    matrices = module.matrices_for(x)
    assert matrices.shape[-3:] == (S, length, length)
    if mixing.softmax:
        torch.testing.assert_close(matrices.sum(-1), torch.ones(matrices.shape[:-1]))
    values = x.unflatten(-1, (S, -1)).movedim(-2, -3)
    torch.testing.assert_close(module(x), module.project((matrices @ values).movedim(-3, -2).flatten(-2)))


@pytest.mark.parametrize("length", [3, 9])
def test_a_resampled_matrix_without_the_softmax_is_scaled_by_native_length_over_length(length):
    module = mixer(Mixing(generator="static", softmax=False, windows=False))
    out = interpolation(L, length, like=torch.zeros(()))
    expected = torch.einsum("ai,sij,bj->sab", out, module.matrices, out) * L / length
    torch.testing.assert_close(module.matrices_for(torch.randn(2, length, C)), expected)


@pytest.mark.parametrize("mixing", KINDS, ids=str)
def test_windows_are_averaged_where_they_overlap(mixing):
    """Written again with a loop: on 8 tokens, windows of 6 start at 0, 1 and 2."""
    module, x = mixer(mixing), torch.randn(3, 8, C)
    total, times = torch.zeros(3, S, 8, 8), torch.zeros(8, 1)
    for start in (0, 1, 2):
        part = slice(start, start + L)
        total[..., part, part] += module.matrices_for(x[:, part])
        times[part] += 1
    torch.testing.assert_close(module.matrices_for(x).expand(3, S, 8, 8), total / times)


@pytest.mark.parametrize("mixing", both(KINDS[0]) + both(Mixing(generator="dense")), ids=str)
def test_a_longer_line_reads_from_where_the_native_one_does(mixing):
    """A line with every token doubled mixes much like the native one where one matrix is resampled: not transposed."""
    module, x = mixer(mixing), torch.randn(4, L, C)
    native = module.matrices_for(x)
    doubled = module.matrices_for(x.repeat_interleave(2, dim=-2))
    folded = doubled.unflatten(-1, (L, 2)).sum(-1).unflatten(-2, (L, 2)).mean(-2)
    if not mixing.windows:
        assert alike(folded, native) > 0.8
    assert alike(folded, native.transpose(-1, -2)) < 0.6


def alike(a, b):
    return F.cosine_similarity((a - a.mean()).flatten(), (b - b.mean()).flatten(), dim=0).item()


@pytest.mark.parametrize("mixing", [m for kind in KINDS for m in both(kind)], ids=str)
@pytest.mark.parametrize("length", [4, 9])
def test_the_opaque_operator_has_the_values_and_gradients_of_the_plain_one(mixing, length):
    module, x = mixer(mixing), torch.randn(3, length, C)
    made = []
    for way in (mixing_matrices, lambda x, w, **o: opaque_matrices(x, w, *(o[k] for k in OPTIONS))):
        module.zero_grad()
        given = x.clone().requires_grad_()
        y = way(given, module.weights(), segments=S, length=L, softmax=mixing.softmax, windowed=mixing.windows)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        made.append({"y": y.detach(), "x": torch.zeros_like(x) if given.grad is None else given.grad, **grads})
    assert made[0].keys() == made[1].keys()
    for key, value in made[0].items():
        torch.testing.assert_close(made[1][key], value)


def test_the_opaque_operator_counts_the_same_multiplications():
    module, x = mixer(), torch.randn(3, 9, C)
    options = {"segments": S, "length": L, "softmax": True, "windowed": True}
    counts = []
    for run in (
        lambda: mixing_matrices(x, module.weights(), **options),
        lambda: opaque_matrices(x, module.weights(), *options.values()),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_operation_compiles_into_few_kernels_and_one_graph():
    """Counted in what inductor writes, here for a processor; 7 and 16 with torch 2.15, matrix products not among them."""
    counts = []
    for train in (False, True):
        torch.compiler.reset()
        metrics.reset()
        module, x = mixer(), torch.randn(2, 3, L, C, requires_grad=train)
        y = torch.compile(module, fullgraph=True)(x)
        if train:
            y.sum().backward()
        counts.append(metrics.generated_kernel_count)
    assert 0 < counts[0] <= 8
    assert counts[1] <= 18


def test_the_opaque_operator_goes_back_on_the_thread_that_asks(monkeypatch):
    """On a GPU another thread would wait for the one that waits for it; a CPU alone would not show that."""
    module, x = mixer(), torch.randn(3, 9, C, requires_grad=True)
    y = opaque_matrices(x, module.weights(), S, L, True, False)
    plain, threads = opaque._plain, []
    monkeypatch.setattr(opaque, "_plain", lambda *a: threads.append(threading.get_ident()) or plain(*a))
    w = module.weights()
    torch.ops.dynamixer.mixing_matrices_backward(torch.ones_like(y), x, [*w[:4]], "dynamic", S, L, True, False)
    assert threads == [threading.get_ident()]
