"""The block and its parts (the paper's section 3), for grids of tokens of any size.

Letters: B images, H W grid of tokens, C channels, L native line length, K a line's real length, S segments, d reduced width.
"""

from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from dynamixer.errors import UserError
from dynamixer.fuse import called, is_hooked, plan_of, why_not_parts
from dynamixer.mixing import Generator, Mixing
from dynamixer.native import computes_in_bf16
from dynamixer.ops import DenseWeights, DynamicWeights, StaticWeights, Weights, batched_mixing, mixing_matrices
from dynamixer.ops.fused import fused_mix, why_not_fused
from dynamixer.ops.kernel import load_kernel
from dynamixer.ops.layer import kind_of, mixer_layer, why_not_layer
from dynamixer.ops.resample import interpolation, same_length


class AxisMixer(nn.Module):
    """The mixing operation along one axis: reduce, generate, mix, project.

    Lines of any length K share the parameters, which belong to the native length L. Where K is another, the reduced tokens are
    resampled to L and the logits of the matrix back to K; with `windows`, lines longer than L average the matrices of overlapping
    windows of L tokens instead. At K = L nothing is resampled.

    With `fused` the C++ kernel mixes wherever it can (see dynamixer.use_kernel).
    """

    fused = False

    def __init__(
        self,
        dim: int,
        length: int,
        segments: int,
        reduced: int,
        mixing: Mixing,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % segments:
            raise UserError(f"{segments} segments do not divide {dim} channels: choose a divisor of {dim}.")
        self.length, self.segments, self.softmax, self.windows = length, segments, mixing.softmax, mixing.windows
        if mixing.generator == "dynamic":
            self.reduce = nn.Linear(dim, segments * reduced, **dd)
            self.generate = nn.Linear(length * reduced, length * length, **dd)
        elif mixing.generator == "dense":
            self.hidden = nn.Linear(dim, dim, **dd)
            self.rows = nn.Linear(dim, segments * length, **dd)
        else:
            self.matrices = nn.Parameter(torch.empty(segments, length, length, **dd))
        self.static = nn.Parameter(torch.empty(segments, length, length, **dd)) if mixing.static else None
        self.project = nn.Linear(dim, dim, **dd)
        self.generator: Generator = mixing.generator

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled copy may be where the kernel is not loaded, which compiled code would not notice."""
        super().__setstate__(state)
        if self.fused and load_kernel():
            self.fused = False

    def init_weights(self) -> None:
        """Trained matrices start as a Linear's weights do; the added static one starts at zero, without effect."""
        if self.generator == "static":
            trunc_normal_(self.matrices, std=0.02)
        if self.static is not None:
            nn.init.zeros_(self.static)

    def weights(self) -> Weights:
        """The parameters as the ops take them."""
        project = self.project.weight, self.project.bias
        if self.generator == "dynamic":
            made = self.reduce.weight, self.reduce.bias, self.generate.weight, self.generate.bias
            return DynamicWeights(*made, *project, self.static)
        if self.generator == "dense":
            return DenseWeights(
                self.hidden.weight, self.hidden.bias, self.rows.weight, self.rows.bias, *project, self.static
            )
        return StaticWeights(self.matrices, *project)

    def matrices_for(self, x: Tensor) -> Tensor:
        """The mixing matrices of x [..., K, C]: [..., S, K, K], [output token, input token] (static: [S, K, K])."""
        return mixing_matrices(x, self.weights(), **self._options())

    def forward(self, x: Tensor, axis: int = -2) -> Tensor:
        """Mix x [..., K, C] along the tokens of a line; axis -3 for the columns of a grid [B, H, W, C]."""
        weights, options = self.weights(), self._options()
        if self.fused and not options["called"] and why_not_fused(x, weights, axis=axis, length=self.length) is None:
            features = self.reduce(x) if self.generator == "dynamic" else None
            mixed = fused_mix(x, features, weights, axis=axis, segments=self.segments, softmax=self.softmax)
            return self.project(mixed)
        if axis == -2:
            return batched_mixing(x, weights, **options)
        return batched_mixing(x.transpose(1, 2).contiguous(), weights, **options).transpose(1, 2).contiguous()

    def _options(self) -> dict[str, Any]:
        shape = {"segments": self.segments, "length": self.length}
        return {**shape, "softmax": self.softmax, "windowed": self.windows, "called": called(self)}

    @torch.no_grad()
    def set_length(self, length: int) -> None:
        """Make `length` the native length, folding the resampling into the parameters.

        The resampling of tokens and logits is linear, so on lines of that length the function stays what it is without
        `windows`; from there it can be fine-tuned. UserError if an adapter wraps what generates.
        """
        if length == self.length:
            return
        old = self.length
        scale = 1.0 if self.softmax else old / length
        like = self.project.weight
        out = interpolation(old, length, like=like)  # [K, L]
        if self.generator == "dynamic":
            into = interpolation(length, old, like=like)  # [L, K]
            weight = self.generate.weight.unflatten(1, (old, -1)).unflatten(0, (old, old))  # [L, L, L, d]
            weight = torch.einsum("ao,bi,oild,lk->abkd", out, out, weight, into)
            bias = out @ self.generate.bias.view(old, old) @ out.T
            self.generate = _linear_of(weight.flatten(2).flatten(0, 1) * scale, bias.flatten() * scale, self.generate)
        elif self.generator == "dense":
            weight = out @ self.rows.weight.unflatten(0, (self.segments, old))  # [S, K, C]
            bias = self.rows.bias.view(self.segments, old) @ out.T
            self.rows = _linear_of(weight.flatten(0, 1) * scale, bias.flatten() * scale, self.rows)
        else:
            self.matrices = _parameter_of(out @ self.matrices @ out.T * scale, self.matrices)
        if self.static is not None:
            self.static = _parameter_of(out @ self.static @ out.T * scale, self.static)
        self.length = length


def _parameter_of(value: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=old.requires_grad)


def _linear_of(weight: Tensor, bias: Tensor, old: nn.Linear) -> nn.Linear:
    if type(old) is not nn.Linear:
        raise UserError(f"a generator is of the type {type(old).__name__}: merge adapters before changing the size.")
    new = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    new.weight, new.bias = _parameter_of(weight, old.weight), _parameter_of(bias, old.bias)
    return new.train(old.training)


@register_notrace_module  # its shapes are Python integers, which torch.fx's proxies are not
class DynaMixerBlock(nn.Module):
    """Row, column and channel branches, fused by the paper's reweighting and projected: [B, H, W, C] -> the same."""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        segments: int,
        reduced: int,
        mixing: Mixing,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = grid
        self.shared = mixing.shared
        self._check_grid(grid)
        separate_column = mixing.column and not mixing.shared
        self.column = AxisMixer(dim, height, segments, reduced, mixing, **dd) if separate_column else None
        self.row = AxisMixer(dim, width, segments, reduced, mixing, **dd) if mixing.row else None
        self.channel = nn.Linear(dim, dim, bias=False, **dd) if mixing.channel else None
        self.reweight = Mlp(dim, dim // 4, dim * mixing.branches, **dd) if mixing.reweight else None
        self.project = nn.Linear(dim, dim, **dd)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if self.shared and grid[0] != grid[1]:
            raise UserError(f"shared=True needs a square grid of tokens, and this one is {grid[0]}x{grid[1]}.")

    def branches(self, x: Tensor) -> list[Tensor]:
        """What each branch that exists makes of x [B, H, W, C], in the published order: column, row, channel."""
        column = self.row if self.shared else self.column
        made = []
        if column is not None:
            made.append(column(x, axis=-3))
        if self.row is not None:
            made.append(self.row(x))
        if self.channel is not None:
            made.append(self.channel(x))
        return made

    def branch_weights(self, branches: list[Tensor]) -> Tensor:
        """The reweighting: for each image and channel, weights of the branches that sum to 1, [B, C, branches]."""
        if self.reweight is None:
            raise UserError("this block was built with reweight=False: its branches are summed, they have no weights.")
        mean = torch.stack([branch.mean((1, 2)) for branch in branches]).sum(0)  # the mean of the sum, by linearity
        logits = self.reweight(mean).unflatten(-1, (-1, len(branches)))
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Mix every row, every column and the channels of x [B, H, W, C]."""
        branches = self.branches(x)
        if self.reweight is None:
            return self.project(sum(branches[1:], start=branches[0]))
        shares = self.branch_weights(branches).movedim(-1, 0).contiguous()[:, :, None, None]  # strides of 3 are slow
        total = branches[0] * shares[0]
        for share, branch in zip(shares[1:], branches[1:], strict=True):
            total = torch.addcmul(total, branch, share)
        return self.project(total)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make `grid` the native one (see AxisMixer.set_length)."""
        self._check_grid(grid)
        if self.column is not None:
            self.column.set_length(grid[0])
        if self.row is not None:
            self.row.set_length(grid[1])


class MixerLayer(nn.Module):
    """One layer of the network: the mixing block and an MLP, each normalised before and added after.

    With `fused` the C++ kernels compute all of it wherever they can (see dynamixer.use_kernel).
    """

    fused = False

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        segments: int,
        reduced: int,
        mixing: Mixing,
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = DynaMixerBlock(dim, grid, segments, reduced, mixing, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 3 * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [B, H, W, C]."""
        if self.fused and self.why_not_fused(x) is None:
            plan, parameters = plan_of(self)
            return mixer_layer(plan, x.to(kind_of(x)), self._drop(x), parameters)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor | None:
        """What drop path multiplies each image with, of the block and of the MLP: [B, 2], drawn as it draws; None for 1."""
        if not self.training or isinstance(self.drop_path, nn.Identity):
            return None
        ones = x.new_ones(len(x), 1, 1, 1)
        return torch.stack([self.drop_path(ones).flatten(), self.drop_path(ones).flatten()], dim=1).float()

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why the C++ kernels cannot compute the layer for x, or None: a clause to end a sentence with."""
        if torch.compiler.is_compiling():
            return "a compiler makes its own choice"
        axes = {-3: self.mixer.row if self.mixer.shared else self.mixer.column, -2: self.mixer.row}
        for axis, one in axes.items():
            if one is not None and (why := why_not_fused(x, one.weights(), axis=axis, length=one.length)):
                return why
        return why_not_parts(self, _PARTS) or why_not_layer(x)


_PARTS = {nn.Linear, nn.LayerNorm, nn.Identity, nn.GELU, nn.Dropout, Mlp, DropPath, AxisMixer, DynaMixerBlock}


@register_notrace_module  # pads by amounts that depend on the picture's size
class PatchConv(nn.Module):
    """One strided convolution: the stem (NCHW picture) and, between stages, the down-sampling (on [B, H, W, C]).

    What does not fill a whole patch is padded with zeros at the bottom and on the right. A kernel wider than the stride
    overlaps its neighbours, padded evenly on all sides, and gives the same grid.

    With `fused` and in bf16, a processor that does not multiply it computes in fp32 from the same rounded numbers.
    """

    fused = False

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int,
        *,
        kernel: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.stride, self.kernel = stride, kernel or stride
        self.proj = nn.Conv2d(in_chans, dim, self.kernel, stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, ceil(H / stride), ceil(W / stride), dim]."""
        before = (self.kernel - self.stride) // 2
        after = self.kernel - self.stride - before
        height, width = x.shape[-2:]
        padding = (before, after + self._missing(width), before, after + self._missing(height))
        if not all(same_length(some, 0) for some in padding):  # padding by nothing copies
            x = F.pad(x, padding)
        wide = self.fused and x.device.type == "cpu" and kind_of(x) == torch.bfloat16 and not computes_in_bf16()
        wide = wide and type(self.proj) is nn.Conv2d and not is_hooked(self.proj)
        return (self._widened(x) if wide else self.proj(x)).permute(0, 2, 3, 1)

    def _widened(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            bias = None if self.proj.bias is None else self.proj.bias.bfloat16().float()
            weight = self.proj.weight.bfloat16().float()
            return F.conv2d(x.bfloat16().float(), weight, bias, self.stride).bfloat16()

    def _missing(self, side: int) -> int:
        return (side + self.stride - 1) // self.stride * self.stride - side


class Stage(nn.Module):
    """A down-sampling or none, then layers on one grid: [B, H, W, C] -> [B, H', W', C']."""

    def __init__(self, downsample: PatchConv | None, layers: list[MixerLayer]):
        super().__init__()
        self.downsample = downsample
        self.blocks: Any = nn.Sequential(*layers)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stage."""
        if self.downsample is not None:
            x = self.downsample(x.permute(0, 3, 1, 2))
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(x)
        for layer in self.blocks:
            x = checkpoint(layer, x)
        return x

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make `grid` the native one of every layer."""
        for layer in self.blocks:
            layer.mixer.set_grid(grid)
