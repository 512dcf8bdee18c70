"""Products of bf16 numbers on processors that do not multiply them: as exact, and about six times as quick as torch has them."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dynamixer.native import computes_in_bf16

_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear, _aten.matmul,
    _aten.convolution, _aten.convolution_backward, _aten.conv2d,
    _aten.scaled_dot_product_attention, _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
}  # fmt: skip


def bf16_products(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context for passes in this precision, backward ones too, which autocast leaves out.

    On a processor without bf16 units products are computed in fp32 from the same bf16 numbers and rounded to bf16 in the end,
    as such a unit does it, in another order of sums. torch's own way takes about six times as long as fp32 there (docs/log.md).
    Otherwise it changes nothing.

    Args:
        device: where the model is.
        precision: fp32, bf16, fp16 or fp64.
    """
    if device.type == "cpu" and precision == "bf16" and not computes_in_bf16():
        return _Widened()
    return contextlib.nullcontext()


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func.overloadpacket not in PRODUCTS or "out" in given or not any(map(_is_bf16, (*args, *given.values()))):
            return func(*args, **given)
        out = func(*tree_map(_widen, args), **tree_map(_widen, dict(given)))
        if func.overloadpacket is _aten._scaled_dot_product_flash_attention_for_cpu:
            return out[0].bfloat16(), out[1]  # sums of exponentials stay in fp32
        return tree_map(_narrow, out)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _widen(value: Any) -> Any:
    return value.float() if _is_bf16(value) else value


def _narrow(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) else value
