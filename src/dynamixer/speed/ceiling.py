"""What the machine can do at best with the products that a model consists of.

Letters: M K N of a matrix product [M, K] x [K, N].
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynamixer.speed.clock import median_seconds

Shape = tuple[int, int, int]  # M, K, N


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
        """GFLOP of all of them."""
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
        """If there were nothing but these products."""
        return sum(product.work / product.gflops for product in self.products)

    @property
    def gflops(self) -> float:
        """Of all products together, per second."""
        return sum(product.work for product in self.products) / self.seconds


class _Products(TorchDispatchMode):
    """Notes every product of two matrices, and every convolution as one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.found[left.shape[0], left.shape[1], right.shape[1]] += 1
        elif func is torch.ops.aten.convolution.default and args[8] == 1:
            self.found[out.numel() // out.shape[1], args[1][0].numel(), out.shape[1]] += 1
        elif func is torch.ops.aten.convolution_backward.default and args[9] == 1:
            grad, weight = args[0], args[2]
            tokens, inputs, outputs = grad.numel() // grad.shape[1], weight[0].numel(), grad.shape[1]
            sides = (tokens, outputs, inputs), (outputs, tokens, inputs)  # of the pictures, of the weights
            self.found.update(side for side, wanted in zip(sides, args[10], strict=False) if wanted)
        return out


def shapes(model: nn.Module, pictures: Tensor, *, backward: bool = False) -> Counter[Shape]:
    """The matrix products of linear layers and convolutions in a forward pass, or in both passes, and how often each comes.

    What a batch of matrices is mixed with is none of them.
    """
    with torch.set_grad_enabled(backward), _Products() as products:
        logits = model(pictures)
        if backward:
            logits.sum().backward()
    model.zero_grad()
    return products.found


def measure_ceiling(
    products: Mapping[Shape, int], dtype: torch.dtype, advance: Callable[[], None] = lambda: None
) -> Ceiling:
    """Time each of the products (see `shapes`) by itself, with packed weights where that is quicker, and a copy of 256 MiB."""
    measured = []
    for (m, k, n), count in products.items():
        x, weight, bias = (torch.randn(*size).to(dtype) for size in ((m, k), (n, k), (n,)))
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, m) if dtype == torch.bfloat16 else None
        ways = (
            partial(nn.functional.linear, x, weight, bias),
            partial(torch.ops.mkldnn._linear_pointwise, x, weight if packed is None else packed, bias, "none", [], ""),
        )
        with torch.inference_mode():
            seconds = min(median_seconds(way, least=0.03) for way in ways)
        measured.append(Product(m, k, n, count, 2e-9 * m * k * n / seconds))
        advance()
    big, copy = torch.ones(2**26), torch.empty(2**26)
    rate = 2 * big.numel() * big.element_size() / median_seconds(lambda: copy.copy_(big), least=0.2) / 1e9
    return Ceiling(tuple(measured), rate)
