"""The models as a table of numbers. A stage that changes the width starts with a 2x2 down-sampling."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """The numbers of one model; a tuple has one entry for each stage."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    segments: tuple[int, ...]
    reduced: int
    patch_size: int
    img_size: int
    num_classes: int
    crop_pct: float
    softmax: bool = True


# S, M and L: the paper's table 1 with the published code's stages and 224x224 evaluation crops. Nano and tiny are ours, for
# pictures of 32 and 112-128 pixels and for machines without an accelerator (docs/adr/0004-small-variants.md); nano_plus is nano
# with what the study found to win on both of its data sets, matrices without the softmax.
VARIANTS = {
    "dynamixer_nano": Variant((2, 2, 2), (64, 128, 128), (4, 8, 8), 2, 2, 32, 10, 1.0),
    "dynamixer_nano_plus": Variant((2, 2, 2), (64, 128, 128), (4, 8, 8), 2, 2, 32, 10, 1.0, softmax=False),
    "dynamixer_tiny": Variant((4, 3, 3), (128, 256, 256), (8, 16, 16), 2, 8, 128, 10, 1.0),
    "dynamixer_s": Variant((4, 3, 8, 3), (192, 384, 384, 384), (8, 16, 16, 16), 2, 7, 224, 1000, 0.9),
    "dynamixer_m": Variant((4, 3, 14, 3), (256, 256, 512, 512), (8, 8, 16, 16), 2, 7, 224, 1000, 0.9),
    "dynamixer_l": Variant((8, 8, 16, 4), (256, 512, 512, 512), (8, 16, 16, 16), 8, 7, 224, 1000, 0.875),
}
