"""Peers of dynamixer_nano for the study (docs/evidence.md): timm's networks at 32 px, of nano's parameters within 10 %.

They are registered with timm for training and loading by name. The isotropic ones take patches of 4 pixels, with which their
multiply-adds are near nano's too.
"""

from functools import partial
from typing import Any

from timm.layers import GatedMlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dynamixer.models.dynamixer import default_cfgs as ours

PEERS = ("peer_mixer", "peer_resmlp", "peer_gmlp", "peer_convnext", "peer_vit")
PATCHES = {"img_size": 32, "patch_size": 4}

# Pictures are prepared for them as for nano.
_READ = ("num_classes", "input_size", "crop_pct", "interpolation", "mean", "std")
_NANO = {key: getattr(ours["dynamixer_nano"].default, key) for key in _READ}
_ENDS = {"peer_convnext": ("stem.0", "head.fc"), "peer_vit": ("patch_embed.proj", "head")}
default_cfgs = generate_default_cfgs(
    {
        name: {"url": "", **_NANO, "pool_size": None, "first_conv": first, "classifier": classifier}
        for name in PEERS
        for first, classifier in [_ENDS.get(name, ("stem.proj", "head"))]
    }
)


def _create(kind: type[nn.Module], name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        kind, name, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **options
    )
    return model


@register_model
def peer_mixer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLP-Mixer (Tolstikhin et al. 2021)."""
    return _create(MlpMixer, "peer_mixer", pretrained, {**PATCHES, "embed_dim": 112, "num_blocks": 8, **kwargs})


@register_model
def peer_resmlp(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResMLP (Touvron et al. 2021)."""
    blocks = {"mlp_ratio": 4, "block_layer": partial(ResBlock, init_values=1e-4), "norm_layer": Affine}
    options = {**PATCHES, "embed_dim": 96, "num_blocks": 11, **blocks, **kwargs}
    return _create(MlpMixer, "peer_resmlp", pretrained, options)


@register_model
def peer_gmlp(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network gMLP (Liu et al. 2021)."""
    blocks = {"mlp_ratio": 6, "block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp}
    options = {**PATCHES, "embed_dim": 128, "num_blocks": 6, **blocks, **kwargs}
    return _create(MlpMixer, "peer_gmlp", pretrained, options)


@register_model
def peer_convnext(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvNeXt (Liu et al. 2022) on 32x32, 16x16, 8x8 and 4x4 positions."""
    options = {"patch_size": 1, "depths": (3, 4, 6, 1), "dims": (24, 48, 96, 192), **kwargs}
    return _create(ConvNeXt, "peer_convnext", pretrained, options)


@register_model
def peer_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT (Dosovitskiy et al. 2021) with a class token and trained positions."""
    options = {**PATCHES, "embed_dim": 96, "depth": 8, "num_heads": 3, **kwargs}
    return _create(VisionTransformer, "peer_vit", pretrained, options)
