"""FSDP2: weights, gradients and optimiser state in parts, one for each process."""

import copy

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard


def shard(model: nn.Module, ema: ModelEmaV3 | None) -> nn.Module:
    """Shard a model, and its average the same way, layer by layer; returns a plain copy to evaluate with."""
    plain = copy.deepcopy(model).eval()
    for whole_model in (model, *([ema.module] if ema is not None else [])):
        for part in reversed(list(whole_model.modules())):  # inner layers before those that hold them
            if isinstance(part, nn.ModuleList | nn.Sequential):
                for layer in part.children():
                    if any(layer.children()) and any(True for _ in layer.parameters()):
                        fully_shard(layer)
        fully_shard(whole_model)
    return plain


@torch.no_grad()
def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor whole, on every process."""
    return {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in model.state_dict().items()
    }
