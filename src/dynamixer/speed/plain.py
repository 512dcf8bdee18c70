"""The model the plain way, for benchmarks only: what speed is measured against.

Each step of sections 3.2 and 3.3 of the paper by itself, in the published orientation (the softmax over the last but one axis),
three projections that each read the tokens, tensors permuted where a product needs it, nothing fused.

Letters: N lines, B images, H W grid of tokens, L tokens in a line, C channels, S segments, d reduced width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamixer.errors import UserError
from dynamixer.layers import AxisMixer, DynaMixerBlock, MixerLayer
from dynamixer.models import DynaMixer


def plain(model: DynaMixer) -> nn.Module:
    """A copy of the model that computes the plain way, with the same weights.

    Raises:
        UserError: the model is not the paper's: dynamic matrices with the softmax, all branches, reweighting; or tokens at the
            border are cut off at its picture size.
    """
    whole = model.feature_info[-1]["reduction"]
    if any(side % whole for side in model.img_size):
        raise UserError(
            f"the plain way takes pictures whose sides are multiples of {whole} pixels, not {model.img_size}."
        )
    for part in model.modules():
        odd = isinstance(part, DynaMixerBlock) and (
            part.shared or None in (part.row, part.column, part.channel, part.reweight)
        )
        if odd or (
            isinstance(part, AxisMixer) and (part.generator != "dynamic" or not part.softmax or part.static is not None)
        ):
            raise UserError(
                "the plain way is written for the paper's block: dynamic, with softmax, all branches, reweighted."
            )
    return _Network(copy.deepcopy(model))


class _Operation(nn.Module):
    """One axis: lines [N, L, C] -> [N, L, C]."""

    def __init__(self, ours: AxisMixer):
        super().__init__()
        self.segments, length = ours.segments, ours.length
        self.reduce, self.generate, self.project = ours.reduce, ours.generate, ours.project
        with torch.no_grad():  # rows by (output, input) token become rows by (input, output)
            for parameter in (self.generate.weight, self.generate.bias):
                by_token = parameter.unflatten(0, (length, length))
                parameter.copy_(by_token.transpose(0, 1).flatten(0, 1).clone())

    def forward(self, lines: Tensor) -> Tensor:
        count, length, channels = lines.shape
        reduced = self.reduce(lines).reshape(count, length, self.segments, -1)
        flat = reduced.permute(0, 2, 1, 3).reshape(count, self.segments, -1)
        generated = self.generate(flat).reshape(count, self.segments, length, length)
        weights = F.softmax(generated, dim=-2)
        segments = lines.reshape(count, length, self.segments, -1).permute(0, 2, 3, 1)
        mixed = torch.matmul(segments, weights)
        return self.project(mixed.permute(0, 3, 1, 2).reshape(count, length, channels))


class _Block(nn.Module):
    """The three branches and their reweighting: [B, H, W, C] -> the same."""

    def __init__(self, ours: DynaMixerBlock):
        super().__init__()
        both: Any = ours.column, ours.row
        self.column, self.row = (_Operation(one) for one in both)
        self.project = ours.project
        self.channel: Any = ours.channel
        self.reweight: Any = ours.reweight

    def forward(self, x: Tensor) -> Tensor:
        images, height, width, channels = x.shape
        turned = x.permute(0, 2, 1, 3).reshape(images * width, height, channels)
        column = self.column(turned).reshape(images, width, height, channels).permute(0, 2, 1, 3)
        row = self.row(x.reshape(images * height, width, channels)).reshape(x.shape)
        channel = self.channel(x)
        mean = (column + row + channel).flatten(1, 2).mean(1)
        logits = self.reweight.fc2(F.gelu(self.reweight.fc1(mean))).reshape(images, 1, 1, channels, 3)
        of_column, of_row, of_channel = F.softmax(logits, dim=-1).unbind(-1)
        return self.project(column * of_column + row * of_row + channel * of_channel)


class _Layer(nn.Module):
    """Block and MLP with their norms and residuals."""

    def __init__(self, ours: MixerLayer):
        super().__init__()
        self.norm1, self.block, self.norm2 = ours.norm1, _Block(ours.mixer), ours.norm2
        self.fc1, self.fc2 = ours.mlp.fc1, ours.mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _Network(nn.Module):
    """Pictures [B, 3, height, width] of the native size -> logits."""

    def __init__(self, ours: DynaMixer):
        super().__init__()
        self.stem = ours.patch_embed.proj
        self.downs = nn.ModuleList(nn.Identity() if s.downsample is None else s.downsample.proj for s in ours.stages)
        self.stages = nn.ModuleList(nn.Sequential(*(_Layer(layer) for layer in stage.blocks)) for stage in ours.stages)
        self.norm, self.head = ours.norm, ours.head

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.stem(pictures).permute(0, 2, 3, 1)
        for down, stage in zip(self.downs, self.stages, strict=True):
            if not isinstance(down, nn.Identity):
                x = down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = stage(x)
        return self.head(self.norm(x).mean((1, 2)))
