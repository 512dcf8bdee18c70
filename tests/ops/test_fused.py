"""The C++ kernel against the reference: values and every gradient, with matrices far from uniform."""

import itertools
import os
import stat
import subprocess
import sys

import pytest
import torch

from dynamixer.errors import UserError
from dynamixer.layers import AxisMixer, DynaMixerBlock, Mixing
from dynamixer.native import cache_folder
from dynamixer.ops import kernel, reference_mixing
from dynamixer.ops.fused import fused_mix, why_not_fused
from dynamixer.speed import use_kernel
from helpers import error, relative_entropy, sharpen

KINDS = [
    Mixing(generator=generator, softmax=softmax, static=static)
    for generator, softmax, static in itertools.product(("dynamic", "static"), (True, False), (False, True))
    if not (static and generator == "static")
]
# H, W, C, S, d: the nano's and S's own; odd ones; one token; a line of many
SHAPES = [(16, 16, 64, 4, 2), (32, 9, 48, 2, 2), (7, 5, 36, 3, 3), (1, 3, 8, 2, 4), (40, 14, 40, 1, 1)]


def mixer(mixing, length, channels, segments, reduced, dtype=torch.float32):
    module = sharpen(AxisMixer(channels, length, segments, reduced, mixing)).to(dtype)
    return use_kernel(module)


def results(way, module, x, axis):
    """y and all gradients of a sum whose terms all weigh differently."""
    module.zero_grad()
    given = x.clone().requires_grad_()
    y = way(module, given, axis)
    y.backward(torch.rand(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype))
    return {"y": y.detach(), "x": given.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def reference(module, x, axis):
    turned = x.transpose(axis, -2)
    y = reference_mixing(turned, module.weights(), segments=module.segments, softmax=module.softmax)
    return y.transpose(axis, -2)


def kernels(module, x, axis):
    assert why_not_fused(x, module.weights(), axis=axis, length=module.length) is None
    return module(x, axis=axis)


@pytest.mark.parametrize("mixing", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [-3, -2])
def test_forward_and_every_gradient_equal_the_reference(mixing, shape, axis):
    height, width, channels, segments, reduced = shape
    module = mixer(mixing, shape[axis + 3], channels, segments, reduced)
    x = torch.randn(3, height, width, channels)
    expected, ours = (results(way, module, x, axis) for way in (reference, kernels))
    for key, value in expected.items():
        nothing = value.abs().max() < 1e-6  # what does not matter, such as logits for a single token
        assert (ours[key] - value).abs().max() < 1e-5 if nothing else error(ours[key], value) < 1e-5, key


@pytest.mark.parametrize("axis", [-3, -2])
def test_these_weights_show_a_transposed_or_dropped_matrix(axis):
    module, x = mixer(KINDS[0], 6, 24, 4, 3), torch.randn(2, 6, 6, 24)
    turned = x.transpose(axis, -2)
    matrices = module.matrices_for(turned)
    assert relative_entropy(matrices) < 0.7
    values = turned.unflatten(-1, (4, -1)).movedim(-2, -3)
    for wrong in (matrices.transpose(-1, -2), torch.full_like(matrices, 1 / 6)):
        y = module.project((wrong @ values).movedim(-3, -2).flatten(-2)).transpose(axis, -2)
        assert error(module(x, axis=axis), y) > 0.1
    assert error(module(x, axis=-3), module(x, axis=-2)) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixing", KINDS, ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_the_plain_computation(mixing, dtype):
    module, half = mixer(mixing, 8, 32, 4, 2), mixer(mixing, 8, 32, 4, 2, dtype)
    x = torch.randn(4, 8, 8, 32)
    expected = results(reference, module, x, -2)
    ours = results(kernels, half, x.to(dtype), -2)
    for part in half.modules():
        part.fused = False
    plain = results(lambda module, x, axis: module(x), half, x.to(dtype), -2)
    for key, value in expected.items():
        assert ours[key].dtype == dtype
        assert error(ours[key].float(), value) <= 2 * error(plain[key].float(), value) + 1e-3, key


def test_under_autocast_gradients_come_back_in_fp32():
    module, x = mixer(KINDS[0], 8, 32, 4, 2), torch.randn(2, 8, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(kernels, module, x, -2)
    assert ours["y"].dtype == torch.bfloat16
    assert ours["x"].dtype == ours["generate.weight"].dtype == torch.float32
    expected = results(reference, module, x, -2)
    assert all(error(ours[key].float(), expected[key]) < 0.05 for key in expected)


def test_tokens_and_features_may_lie_apart_in_memory():
    module = mixer(KINDS[0], 6, 24, 4, 3)
    x = torch.randn(2, 24, 6, 6).permute(0, 2, 3, 1)
    wide = torch.randn(2, 6, 6, 50)
    for features in (wide[..., 3:15], wide[:, ::1, :, 38:], torch.randn(2, 12, 6, 6).permute(0, 2, 3, 1)):
        one = fused_mix(x, features, module.weights(), axis=-3, segments=4, softmax=True)
        two = fused_mix(x.contiguous(), features.contiguous(), module.weights(), axis=-3, segments=4, softmax=True)
        assert torch.equal(one, two)


def test_the_same_bits_each_time_and_for_any_batch():
    module, x = mixer(KINDS[0], 16, 64, 4, 2), torch.randn(70, 16, 16, 64)
    whole = results(kernels, module, x, -3)
    again = results(kernels, module, x, -3)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    one = module(x[41:42], axis=-3)
    torch.testing.assert_close(one, whole["y"][41:42])


def test_an_empty_batch_stays_empty():
    module = mixer(KINDS[0], 6, 24, 4, 3)
    found = results(kernels, module, torch.randn(0, 6, 6, 24), -2)
    assert found["y"].shape == (0, 6, 6, 24)
    assert not found["generate.weight"].any()


def test_extreme_logits_stay_finite_and_exact():
    module, x = mixer(KINDS[0], 6, 24, 4, 3), 100 * torch.randn(2, 6, 6, 24)
    found = results(kernels, module, x, -2)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert error(found["y"], reference(module, x, -2)) < 1e-5


def test_what_is_not_finite_shows():
    module, x = mixer(KINDS[0], 6, 24, 4, 3), torch.randn(2, 6, 6, 24)
    x[1, 2, 3, 4] = float("nan")
    y = module(x)
    assert torch.isfinite(y[0]).all()
    assert y[1, 2].isnan().all()


@pytest.mark.parametrize("length", [4, 6, 7, 8, 16])
@pytest.mark.parametrize("softmax", [True, False])
def test_logits_that_are_not_finite_show_too(length, softmax):
    module, x = mixer(Mixing(softmax=softmax), length, 24, 4, 3), torch.randn(2, length, length, 24)
    with torch.no_grad():
        module.generate.bias[length + 1] = float("nan")  # of output token 1
    y, expected = (one(module, x, -2).isnan() for one in (lambda m, x, axis: m(x, axis=axis), reference))
    assert torch.equal(y, expected)
    assert y[:, :, 1].all()
    assert not y[:, :, 0].any()


@pytest.mark.parametrize(
    ("x", "length", "generator", "why"),
    [
        (torch.zeros(1, 8, 8, 8), 6, "dynamic", "native 6 tokens, and these have 8"),
        (torch.zeros(1, 6, 6, 8, dtype=torch.float64), 6, "dynamic", "float64"),
        (torch.zeros(1, 6, 6, 8, device="meta"), 6, "dynamic", "on meta"),
        (torch.zeros(6, 6, 8), 6, "dynamic", "grids"),
        (torch.zeros(1, 6, 6, 8), 6, "dense", "dense"),
    ],
)
def test_where_it_cannot_it_says_why_and_the_plain_way_runs(x, length, generator, why):
    module = sharpen(AxisMixer(8, length, 2, 2, Mixing(generator=generator)))
    assert why in why_not_fused(x, module.weights(), axis=-2, length=length)
    if x.device.type == "cpu":
        module.fused = True
        assert module.to(x.dtype)(x).shape == x.shape


def test_a_block_of_any_options_gives_what_it_gave(monkeypatch):
    for mixing in (Mixing(), Mixing(shared=True), Mixing(row=False), Mixing(channel=False), Mixing(reweight=False)):
        block, x = sharpen(DynaMixerBlock(24, (6, 6), 4, 3, mixing)), torch.randn(2, 6, 6, 24)
        before = block(x)
        use_kernel(block)
        calls = []
        monkeypatch.setattr(
            "dynamixer.layers.fused_mix", lambda *a, calls=calls, **k: calls.append(1) or fused_mix(*a, **k)
        )
        torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
        assert len(calls) == mixing.row + mixing.column


def test_it_compiles_into_one_graph_with_its_gradients():
    block, x = use_kernel(sharpen(DynaMixerBlock(24, (6, 6), 4, 3, Mixing()))), torch.randn(2, 6, 6, 24)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for way in (block, compiled):
        block.zero_grad()
        way(x).square().sum().backward()
        grads = [p.grad.clone() for p in block.parameters()]
        if way is block:
            expected = grads
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(grads, expected, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's check looks at it itself
def test_torchs_own_checks_of_an_operator_hold():
    w = mixer(KINDS[0], 6, 24, 4, 3).weights()
    tensors = torch.randn(2, 6, 6, 24), torch.randn(2, 6, 6, 12), w.generate_weight, w.generate_bias
    arguments = (*(t.detach().clone().requires_grad_() for t in tensors), None, 1, 4, True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.dynamixer.mix.default, arguments, test_utils=tests)


def test_an_exported_program_does_without_it():
    block = use_kernel(sharpen(DynaMixerBlock(24, (6, 6), 4, 3, Mixing()))).eval()
    x = torch.randn(2, 6, 6, 24)
    program = torch.export.export(block, (x,))
    assert "dynamixer" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has not loaded anything."""
    monkeypatch.setenv("DYNAMIXER_CACHE", str(tmp_path / "cache"))
    kernel.load_kernel.cache_clear()
    yield tmp_path / "cache"
    kernel.load_kernel.cache_clear()


def test_without_a_compiler_there_is_one_sentence(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in kernel.load_kernel()
    with pytest.raises(UserError, match="no-such-compiler"):
        use_kernel(AxisMixer(8, 4, 2, 2, Mixing()))


def test_what_the_compiler_says_is_told_and_nothing_stays(fresh, monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "broken.cpp").write_text("int x = ;")
    monkeypatch.setattr(kernel, "SOURCES", tmp_path / "csrc")
    assert "error" in kernel.load_kernel()
    assert list((fresh / "kernels").iterdir()) == []


def test_native_code_lies_where_nobody_else_can_write(fresh):
    assert stat.S_IMODE(cache_folder("kernels").stat().st_mode) == 0o700
    os.chmod(fresh / "kernels", 0o777)
    with pytest.raises(UserError, match="others can write"):
        cache_folder("kernels")
    assert "others can write" in kernel.load_kernel()


def test_a_link_or_a_file_in_its_place_is_refused(fresh, tmp_path):
    fresh.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (fresh / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError):
        cache_folder("kernels")


def test_models_without_such_blocks_are_refused():
    for model in (torch.nn.Linear(2, 2), AxisMixer(8, 4, 2, 2, Mixing(generator="dense"))):
        with pytest.raises(UserError, match="this model has none"):
            use_kernel(model)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_type_changes_nothing(default):
    module, x = mixer(Mixing(static=True), 8, 32, 4, 2), torch.randn(2, 8, 8, 32)
    expected = results(kernels, module, x, -2)
    torch.set_default_dtype(default)
    try:
        got = results(lambda *a: kernels(*a).float(), module, x, -2)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in expected.items():
        assert error(got[key], value) < 1e-6, key


def test_second_derivatives_are_refused_and_not_left_out():
    module, x = mixer(Mixing(), 8, 32, 4, 2), torch.randn(2, 8, 8, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels(module, x, -2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_library_that_cannot_be_loaded_is_built_again(tmp_path, monkeypatch):
    good, torn = kernel._built(), tmp_path / "torn.so"
    torn.write_bytes(bytes(5000))  # as a file system leaves what was not written when the power failed
    found = iter([torn, good])
    monkeypatch.setattr(kernel, "_built", lambda: next(found))
    assert kernel.load_kernel.__wrapped__() is None
    assert not torn.exists()


@pytest.mark.parametrize("compiled", ["", "compiled"])
def test_a_model_computes_where_the_kernel_is_not_loaded(tmp_path, compiled):
    module, x = mixer(Mixing(), 8, 32, 4, 2), torch.randn(2, 8, 8, 32)
    torch.save((module, x, module(x, axis=-2).detach()), tmp_path / "m.pt")
    code = (
        "import sys, torch; m, x, y = torch.load(sys.argv[1], weights_only=False); "
        "m = torch.compile(m, backend='aot_eager') if sys.argv[2] else m; "
        "assert m.fused; assert (m(x, axis=-2) - y).abs().max() < 1e-4"
    )
    command = [sys.executable, "-c", code, tmp_path / "m.pt", compiled]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_the_work(threads):
    module, x = mixer(Mixing(static=True), 8, 32, 4, 2), torch.randn(9, 8, 8, 32)
    expected, before = results(reference, module, x, -2), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        once, again = results(kernels, module, x, -2), results(kernels, module, x, -2)
    finally:
        torch.set_num_threads(before)
    for key, value in expected.items():
        assert torch.equal(once[key], again[key]), key
        assert error(once[key], value) < 1e-5, key
