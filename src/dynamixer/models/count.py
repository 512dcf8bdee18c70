"""How large a model is and how much it computes."""

from typing import NamedTuple

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynamixer.data.preprocess import native_size


class Counts(NamedTuple):
    """Size and work of a model on one picture."""

    parameters: int
    multiply_adds: int  # of matrix products and convolutions


def count(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Counts:
    """Parameters, and multiply-adds for one picture of `img_size` pixels (default: the model's own size).

    Works on the meta device too, where nothing is computed.
    """
    channels = getattr(model, "in_chans", 3)
    sides = native_size(model) if img_size is None else to_2tuple(img_size)
    like = next(model.parameters())
    trained = [part for part in model.modules() if part.training]
    model.eval()
    by_kernel = [layer for layer in model.modules() if getattr(layer, "fused", False) is True]
    try:
        for layer in by_kernel:
            setattr(layer, "fused", False)  # noqa: B010 - torch counts its own products, not those inside kernels
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, channels, *sides, device=like.device, dtype=like.dtype))
    finally:
        for layer in by_kernel:
            setattr(layer, "fused", True)  # noqa: B010
        for part in trained:
            part.training = True
    return Counts(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
