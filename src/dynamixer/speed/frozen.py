"""Models whose weights no longer change, with layers by the C++ kernels."""

import torch
from torch import Tensor, nn

from dynamixer.errors import UserError
from dynamixer.fuse import plan_of
from dynamixer.layers import MixerLayer
from dynamixer.ops.layer import Packed, complete, folded, forward


def freeze(model: nn.Module, kind: torch.dtype, *, int8: bool) -> nn.Module:
    """The model with layers that hold their weights packed for tokens of `kind`, or in eight bits; it is changed in place."""
    for part in [*model.modules()]:
        for name, layer in part.named_children():
            if isinstance(layer, MixerLayer):
                setattr(part, name, _Frozen(layer, kind, int8=int8))
    return model


class _Frozen(nn.Module):
    """A layer of a model that no longer changes: its weights are packed once."""

    def __init__(self, layer: MixerLayer, kind: torch.dtype, *, int8: bool):
        super().__init__()
        self.layer, self.kind = layer, kind
        self.plan, parameters = plan_of(layer)
        self.weights = complete(self.plan, dict(zip(self.plan.names, parameters, strict=True)))
        self.weights |= folded(self.plan, self.weights)
        self.packs = Packed(self.weights, kind, bytes=int8)
        self.known = set[tuple[int, ...]]()  # shapes for which it is known that it works

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.kind).contiguous()
        if x.shape not in self.known:
            if why_not := self.layer.why_not_fused(x):
                raise UserError(f"the C++ kernels do not compute this model here: {why_not}.")
            self.known.add(tuple(x.shape))
        return forward(self.plan, x, None, self.weights, self.packs, keep=False)[0]
