"""What the machine can do at best with the products that a model consists of.

Letters: M K N of a matrix product [M, K] x [K, N].
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynamixer.speed.clock import median_seconds


@dataclass(frozen=True)
class Product:
    """A shape of matrix product, how often a model has it, and how fast the machine does it."""

    m: int
    k: int
    n: int
    count: int
    gflops: float  # per second, of 2 * M * K * N

    @property
    def work(self) -> float:
        """GFLOP of all of them in one forward pass."""
        return 2e-9 * self.m * self.k * self.n * self.count

    def intensity(self, width: int) -> float:
        """FLOP for each byte that has to move at least, with numbers of `width` bytes."""
        return 2 * self.m * self.k * self.n / (width * (self.m * self.k + self.k * self.n + self.m * self.n))


@dataclass(frozen=True)
class Ceiling:
    """The machine at its best."""

    products: tuple[Product, ...]
    copy_gb_per_s: float

    @property
    def seconds(self) -> float:
        """For one forward pass, if there were nothing but these products."""
        return sum(product.work / product.gflops for product in self.products)

    @property
    def gflops(self) -> float:
        """Of all products together, per second."""
        return sum(product.work for product in self.products) / self.seconds


def shapes(model: nn.Module, pictures: Tensor) -> Counter[tuple[int, int, int]]:
    """The matrix products in a forward pass: linear layers and convolutions as products, and how often each comes."""
    found: Counter[tuple[int, int, int]] = Counter()

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            found[inputs[0].numel() // module.in_features, module.in_features, module.out_features] += 1
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            weight = module.weight
            found[output.numel() // weight.shape[0], weight[0].numel(), weight.shape[0]] += 1

    handles = [part.register_forward_hook(note) for part in model.modules()]
    try:
        with torch.inference_mode():
            model(pictures)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure_ceiling(
    model: nn.Module, pictures: Tensor, dtype: torch.dtype, advance: Callable[[], None] = lambda: None
) -> Ceiling:
    """Time each product that the model has by itself, with packed weights where that is quicker, and a copy of 256 MiB."""
    products = []
    for (m, k, n), count in shapes(model, pictures).items():
        x, weight, bias = (torch.randn(*size).to(dtype) for size in ((m, k), (n, k), (n,)))
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, m) if dtype == torch.bfloat16 else None
        ways = (
            partial(nn.functional.linear, x, weight, bias),
            partial(torch.ops.mkldnn._linear_pointwise, x, weight if packed is None else packed, bias, "none", [], ""),
        )
        with torch.inference_mode():
            seconds = min(median_seconds(way, least=0.03) for way in ways)
        products.append(Product(m, k, n, count, 2e-9 * m * k * n / seconds))
        advance()
    big, copy = torch.ones(2**26), torch.empty(2**26)
    rate = 2 * big.numel() * big.element_size() / median_seconds(lambda: copy.copy_(big), least=0.2) / 1e9
    return Ceiling(tuple(products), rate)
