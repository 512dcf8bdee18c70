"""How large a model is and how much it computes."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Counts(NamedTuple):
    """Size and work of a model on one picture."""

    parameters: int
    multiply_adds: int  # of matrix products and convolutions


def count(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Counts:
    """Parameters, and multiply-adds for one picture of `img_size` pixels (default: the model's own size).

    Works on the meta device too, where nothing is computed.
    """
    channels, *sides = model.default_cfg["input_size"]  # type: ignore[index]
    if img_size is not None:
        sides = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    like = next(model.parameters())
    was_training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, channels, *sides, device=like.device, dtype=like.dtype))
    model.train(was_training)
    return Counts(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
