"""What several tests need."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dynamixer.layers import AxisMixer

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """A data set that only the developers' machines have: skipped elsewhere, an error in CI."""
    path = SHARED / name
    if not path.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI has to have {path}")
        pytest.skip(f"the data set {path} is not on this machine")
    return path


@torch.no_grad()
def sharpen(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights for which the mixing matrices are far from uniform, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)

    for part in module.modules():
        if isinstance(part, nn.Linear):
            normal(part.weight, 1 / math.sqrt(part.in_features))
            if part.bias is not None:
                normal(part.bias, 0.1)
    for part in module.modules():
        if isinstance(part, AxisMixer):
            if part.generator == "dynamic":
                normal(part.generate.weight, 6 / math.sqrt(part.generate.in_features))
            elif part.generator == "dense":
                normal(part.rows.weight, 8 / math.sqrt(part.rows.in_features))
            else:
                normal(part.matrices, 4)
            if part.static is not None:
                normal(part.static, 1)
    return module


def relative_entropy(matrices: Tensor) -> float:
    """Mean entropy of the rows as a share of that of a uniform row."""
    p = matrices.detach().double().clamp(min=1e-30)
    return float(-(p * p.log()).sum(-1).mean() / math.log(matrices.shape[-1]))


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
