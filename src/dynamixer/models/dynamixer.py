"""The backbone, top to bottom, under timm's interface, and its entry points.

Letters: B images, H W grid of tokens, C channels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn, sym_max
from torch.nn import functional as F

from dynamixer.errors import UserError
from dynamixer.layers import AxisMixer, MixerLayer, PatchConv, Stage
from dynamixer.mixing import Generator, Mixing
from dynamixer.models.shipped import forget_names, pretrained_cfg
from dynamixer.models.sizes import at_size, record_size
from dynamixer.models.variants import VARIANTS
from dynamixer.ops.resample import same_length

__all__ = ["DynaMixer"]

POOLS = ("avg", "max", "avgmax", "catavgmax", "")


class DynaMixer(nn.Module):
    """DynaMixer (Wang et al., ICML 2022, arXiv 2201.12083) for pictures of any size, [B, in_chans, height, width].

    Features are NCHW. At `img_size` the network is exactly the paper's; other sizes resample the mixing (`AxisMixer`).

    Args:
        img_size: native picture size in pixels, a number or (height, width).
        patch_size: side of a token in pixels, the stride of the stem.
        stem: "patch", or "overlap" for a kernel of twice the patch.
        depths: layers in each stage.
        dims: channels in each stage; a stage that changes them starts with a 2x2 down-sampling.
        segments: segments S in each stage, or one number for all.
        reduced: reduced width d in each stage, or one number for all: what is kept of a token for `dynamic` generation.
        generator: "dynamic" (the paper), "static" (trained matrices, no content) or "dense" (a row from its own token alone).
        softmax: whether each output token's weights are positive and sum to 1 (the paper) or are used as generated.
        static: add a trained matrix for each segment to the generated one.
        row, column, channel: branches of the block.
        reweight: weigh the branches by content (the paper), or sum them.
        shared: one operator for rows and columns; needs a square grid.
        windows: on lines longer than the native ones, average the matrices of overlapping windows; with False resample one
            matrix, as `set_input_size` does, which measured worse (docs/adr/0003-any-size.md).
        enlarge: scale pictures that are smaller than the native size up to it first (bicubic, shape kept), so that a line never
            has fewer tokens than it was trained with: as accurate as at the native size, at its cost. Feature maps are then
            those of the enlarged picture.

    Raises:
        UserError: a combination of options that has no meaning, in one sentence.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 7,
        stem: Literal["patch", "overlap"] = "patch",
        depths: Sequence[int] = (4, 3, 8, 3),
        dims: Sequence[int] = (192, 384, 384, 384),
        segments: int | Sequence[int] = (8, 16, 16, 16),
        reduced: int | Sequence[int] = 2,
        generator: Generator = "dynamic",
        softmax: bool = True,
        static: bool = False,
        row: bool = True,
        column: bool = True,
        channel: bool = True,
        reweight: bool = True,
        shared: bool = False,
        windows: bool = True,
        enlarge: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mixing = Mixing(generator, softmax, static, row, column, channel, reweight, shared, windows)
        segments = [segments] * len(depths) if isinstance(segments, int) else list(segments)
        reduced = [reduced] * len(depths) if isinstance(reduced, int) else list(reduced)
        if not len(depths) == len(dims) == len(segments) == len(reduced):
            raise UserError(
                "depths, dims, segments and reduced need an entry for each stage; "
                f"they have {len(depths)}, {len(dims)}, {len(segments)} and {len(reduced)}."
            )
        if not depths or min([*depths, *dims, *segments, *reduced, patch_size, in_chans]) < 1:
            raise UserError("depths, dims, segments, reduced, patch_size and in_chans are 1 or more.")
        if not (0 <= drop_rate < 1 and 0 <= drop_path_rate < 1):
            raise UserError(f"drop_rate={drop_rate} and drop_path_rate={drop_path_rate} are at least 0 and below 1.")
        if stem not in ("patch", "overlap"):
            raise UserError(f"unknown stem {stem!r}: it is 'patch' or 'overlap'.")
        if not isinstance(enlarge, bool):
            raise UserError(f"enlarge={enlarge!r} has to be true or false.")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.patch_size, self.enlarge = patch_size, enlarge
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.output_fmt = "NCHW"

        self.patch_embed = PatchConv(
            in_chans, dims[0], patch_size, kernel=2 * patch_size if stem == "overlap" else None, **dd
        )
        halvings = [i > 0 and dim != dims[i - 1] for i, dim in enumerate(dims)]
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages, self.feature_info = [], []
        for i, (dim, grid) in enumerate(zip(dims, self._grids(img_size, patch_size, halvings), strict=True)):
            down = PatchConv(dims[i - 1], dim, 2, **dd) if halvings[i] else None
            layers = [MixerLayer(dim, grid, segments[i], reduced[i], mixing, drop_path=rate, **dd) for rate in rates[i]]
            stages.append(Stage(down, layers))
            reduction = patch_size * 2 ** sum(halvings[: i + 1])
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages: Any = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(dims[-1], **dd)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    @staticmethod
    def _grids(img_size: int | tuple[int, int], patch_size: int, halvings: Sequence[bool]) -> list[tuple[int, int]]:
        """The grid of tokens of each stage for pictures of a size; a grid that is not whole is rounded up."""
        sides = to_2tuple(img_size)
        if min(sides) < 1:
            raise UserError(f"img_size {img_size} is not a picture size in pixels.")
        grid = tuple(-(-side // patch_size) for side in sides)
        grids = []
        for halve in halvings:
            grid = tuple(-(-side // 2) for side in grid) if halve else grid
            grids.append((grid[0], grid[1]))
        return grids

    def init_weights(self) -> None:
        """Linear weights truncated normal with std 0.02 and biases 0; convolutions and norms keep PyTorch's start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, AxisMixer):
                module.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Parameters that are no one-dimensional ones and still take no weight decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth groups for layer-wise learning-rate decay: by stage if `coarse`, else by layer."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {
            "stem": r"^patch_embed",
            "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else fine,
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The Linear layer that gives the logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one (0 classes: none), and the pooling if one is named ("" for none)."""
        pool, dd = self.global_pool.pool_type if global_pool is None else global_pool, get_device_dtype(self)
        if pool.removeprefix("fast") not in POOLS or num_classes < 0 or (num_classes and not pool):
            raise UserError(
                f"global_pool={pool!r} with {num_classes} classes: it is one of {POOLS}, '' with 0 classes."
            )
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool: Any = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head: nn.Module = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another picture size native, in pixels: to fine-tune there, or to spare the resampling on every call.

        The function on pictures of that size stays the same, larger ones with `windows` excepted (see AxisMixer.set_length).
        """
        halvings = [stage.downsample is not None for stage in self.stages]
        for stage, grid in zip(self.stages, self._grids(img_size, self.patch_size, halvings), strict=True):
            stage.set_grid(grid)
        self.img_size = to_2tuple(img_size)
        record_size(self, self.img_size)

    def _tokens(self, x: Tensor) -> Tensor:
        if not self.enlarge:
            return self.patch_embed(x)
        (height, width), (native_h, native_w) = x.shape[-2:], self.img_size
        # As the other side would ask, rounded up; without negative numbers, which ONNX divides otherwise than Python.
        scaled_h, scaled_w = (height * native_w + width - 1) // width, (width * native_h + height - 1) // height
        size: Any = (sym_max(sym_max(height, native_h), scaled_h), sym_max(sym_max(width, native_w), scaled_w))
        if not (same_length(size[0], height) and same_length(size[1], width)):  # to its own size it changes nothing
            x = F.interpolate(x, size, mode="bicubic", align_corners=False)
        return self.patch_embed(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures [B, in_chans, height, width] -> normalised feature maps [B, C, H, W]."""
        x = self._tokens(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps [B, C, H, W] -> logits, or with `pre_logits` what the classifier would read."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B, in_chans, height, width] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps after the stages named by `indices` (the last n for a number, all for None).

        Args:
            x: pictures [B, in_chans, height, width].
            indices: which stages.
            norm: apply the final norm to the last stage's map; earlier ones have another width or distribution.
            stop_early: run no stage after the last one asked for.
            output_fmt: "NCHW" or "NHWC" for the maps.
            intermediates_only: return only the list of maps, not (final features, maps).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise UserError(f"unknown output_fmt {output_fmt!r}: it is 'NCHW' or 'NHWC'.")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self._tokens(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                maps.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        if output_fmt == "NCHW":
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if intermediates_only:
            return maps
        if not stop_early or last == len(self.stages) - 1:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one in `indices`, and with them the norm and head that were sized for the last."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
            self.stages = self.stages[: last + 1]
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut or prune_head:
            self.reset_classifier(0, "")
        return list(take)


def _cfg(name: str) -> dict[str, Any]:
    v = VARIANTS[name]
    side = -(-v.img_size // v.patch_size) // 2
    return {
        "url": "",
        **pretrained_cfg(name),
        "num_classes": v.num_classes,
        "input_size": (3, v.img_size, v.img_size),
        "pool_size": (side, side),
        "crop_pct": v.crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2201.12083",
        "paper_name": "DynaMixer: A Vision MLP Architecture with Dynamic Mixing",
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})


def _create(name: str, pretrained: bool, **kwargs: Any) -> DynaMixer:
    v = VARIANTS[name]
    numbers = {key: value for key, value in vars(v).items() if key != "crop_pct"}
    if kwargs.get("feature_cls") in ("hook", "fx"):
        raise UserError(f"feature_cls={kwargs['feature_cls']!r} would give maps as NHWC: leave it out.")
    feature_cfg = {"out_indices": tuple(range(len(kwargs.get("depths", v.depths)))), "feature_cls": "getter"}
    model: DynaMixer = build_model_with_cfg(
        DynaMixer, name, pretrained, pretrained_filter_fn=at_size, feature_cfg=feature_cfg, **(numbers | kwargs)
    )
    if not pretrained:
        forget_names(model, name)
    return model


@register_model
def dynamixer_nano(pretrained: bool = False, **kwargs: Any) -> DynaMixer:
    """DynaMixer-nano: 32 px pictures, patch 2, under 1M parameters with 10 classes."""
    return _create("dynamixer_nano", pretrained, **kwargs)


@register_model
def dynamixer_nano_plus(pretrained: bool = False, **kwargs: Any) -> DynaMixer:
    """DynaMixer-nano without the softmax over input tokens: ahead of it in short trainings (docs/evidence.md, table 1)."""
    return _create("dynamixer_nano_plus", pretrained, **kwargs)


@register_model
def dynamixer_tiny(pretrained: bool = False, **kwargs: Any) -> DynaMixer:
    """DynaMixer-tiny: 112-128 px pictures, patch 8, under 6M parameters with 10 classes."""
    return _create("dynamixer_tiny", pretrained, **kwargs)


@register_model
def dynamixer_s(pretrained: bool = False, **kwargs: Any) -> DynaMixer:
    """DynaMixer-S of the paper."""
    return _create("dynamixer_s", pretrained, **kwargs)


@register_model
def dynamixer_m(pretrained: bool = False, **kwargs: Any) -> DynaMixer:
    """DynaMixer-M of the paper."""
    return _create("dynamixer_m", pretrained, **kwargs)


@register_model
def dynamixer_l(pretrained: bool = False, **kwargs: Any) -> DynaMixer:
    """DynaMixer-L of the paper."""
    return _create("dynamixer_l", pretrained, **kwargs)
