"""bf16 without units for it: the same numbers as torch's bf16, which any processor has, in another order of sums."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dynamixer
from dynamixer.precision import bf16_products

CPU = torch.device("cpu")


class AllProducts(nn.Module):
    """Every way to multiply that networks here have: convolution, linear layers, matrices of matrices, attention."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.last = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 72), nn.Linear(24, 5, bias=False)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.first(tokens).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(3 * q, k, v) + (q @ k.transpose(-1, -2)) @ v
        return self.last(mixed.transpose(1, 2).flatten(2)).mean(1)


class Seen(TorchDispatchMode):
    """What the products under it are of."""

    def __init__(self):
        super().__init__()
        self.kinds = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if any(part in name for part in ("mm", "matmul", "conv", "linear", "attention")):
            self.kinds.setdefault(name, set()).update(a.dtype for a in args if isinstance(a, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr("dynamixer.precision.computes_in_bf16", lambda: False)


def passes(context, *, inference, precision="bf16"):
    """Logits, and all gradients but in inference, and what was multiplied."""
    torch.manual_seed(0)
    model, x, seen = AllProducts(), torch.randn(2, 3, 16, 20), Seen()
    with seen, context, torch.inference_mode(inference):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        if not inference:
            F.cross_entropy(logits.float(), torch.tensor([0, 3])).backward()
    values = [logits.detach(), *([] if inference else [p.grad for p in model.parameters()])]
    return values, seen.kinds


@pytest.mark.parametrize("inference", [False, True])
def test_no_product_is_in_bf16_and_all_are_of_rounded_numbers(without_bf16, inference):
    plain, kinds = passes(contextlib.nullcontext(), inference=inference)
    assert len(kinds) >= 4
    assert all(torch.bfloat16 in found for found in kinds.values())
    ours, kinds = passes(bf16_products(CPU, "bf16"), inference=inference)
    assert {kind for found in kinds.values() for kind in found} == {torch.float32}
    exact, _ = passes(contextlib.nullcontext(), inference=inference, precision="fp32")
    for one, other, true in zip(ours, plain, exact, strict=True):
        assert one.dtype == other.dtype
        error = (other.float() - true).norm()  # of bf16
        assert 0.3 * error < (one.float() - true).norm() < 1.5 * error


@pytest.mark.parametrize(
    ("device", "precision"), [(CPU, "fp32"), (CPU, "fp16"), (CPU, "fp64"), (torch.device("cuda"), "bf16")]
)
def test_nothing_else_is_changed(without_bf16, device, precision):
    assert isinstance(bf16_products(device, precision), contextlib.nullcontext)


def test_a_processor_with_bf16_multiplies_it_itself(monkeypatch):
    monkeypatch.setattr("dynamixer.precision.computes_in_bf16", lambda: True)
    assert isinstance(bf16_products(CPU, "bf16"), contextlib.nullcontext)


def test_training_and_evaluation_multiply_so(without_bf16, tmp_path):
    options = {"epochs": 1, "limit_train": 64, "batch_size": 32, "device": "cpu", "track": "none", "kernel": "off"}
    small = {"patch_size": 8, "depths": (1, 1), "dims": (16, 32), "segments": (2, 4)}
    with Seen() as seen:
        dynamixer.train(dynamixer.TrainConfig(precision="bf16", model_args=small, **options), tmp_path / "run")
    assert {"aten.convolution", "aten.convolution_backward", "aten.linear", "aten.addmm"} <= set(seen.kinds)
    assert not any(torch.bfloat16 in found for found in seen.kinds.values())
