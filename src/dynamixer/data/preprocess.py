"""From a decoded picture to the tensor that a model reads: for evaluation here, for training with augmentation."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_transform, str_to_interp_mode
from timm.data.auto_augment import posterize
from torch import Tensor, nn
from torchvision import transforms

from dynamixer.errors import UserError

CROPS = ("rrc", "pad", "none")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_SIDE = 8192


def native_size(model: nn.Module) -> tuple[int, int]:
    """The picture size, (height, width) in pixels, that a model was built for."""
    if isinstance(size := getattr(model, "img_size", None), tuple):
        return size[0], size[1]
    cfg: dict[str, Any] = model.default_cfg  # type: ignore[assignment]
    return cfg["input_size"][1], cfg["input_size"][2]


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation, prediction and serving do to a picture; it is kept in every checkpoint.

    The shorter side is resized to size / crop_pct, the centre is cropped, and channels are normalised.
    """

    size: tuple[int, int]  # (height, width) in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no picture can be brought to.

        Raises:
            UserError: which value, and what it may be.
        """
        sides: Sequence[int] = self.size
        if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
            raise UserError(f"size {self.size} is not a height and a width between 1 and {MAX_SIDE} pixels.")
        numbers = (*self.mean, *self.std, self.crop_pct)
        known = all(isinstance(n, int | float) for n in numbers) and all(map(math.isfinite, numbers))
        if len(self.mean) != 3 or len(self.std) != 3 or not known:
            raise UserError(f"mean {self.mean} and std {self.std} need a number for each of three channels.")
        if min(self.std) <= 0 or not 0 < self.crop_pct <= 1:
            raise UserError(f"std {self.std} has to be above 0, and crop_pct {self.crop_pct} above 0 and at most 1.")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"unknown interpolation {self.interpolation!r}: it is one of {', '.join(INTERPOLATIONS)}.")

    @classmethod
    def of(cls, model: nn.Module) -> "Preprocessing":
        """The model's own, from its default_cfg."""
        cfg: dict[str, Any] = model.default_cfg  # type: ignore[assignment]
        return cls(
            size=native_size(model),
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation=cfg["interpolation"],
            crop_pct=cfg["crop_pct"],
        )

    def at(self, size: int | tuple[int, int] | None) -> "Preprocessing":
        """The same for another picture size in pixels, or for None as it is."""
        if size is None:
            return self
        return replace(self, size=(size, size) if isinstance(size, int) else (size[0], size[1]))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Back from `to_dict`, as JSON gives it."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def transform(self) -> transforms.Compose:
        """PIL picture -> [3, height, width] float32."""
        return create_transform(
            input_size=(len(self.mean), *self.size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )

    def __call__(self, picture: Image.Image) -> Tensor:
        """PIL picture -> [3, height, width] float32."""
        tensor: Tensor = self.transform()(picture)
        return tensor


@dataclass(frozen=True)
class Augmentation:
    """What training does to a picture: timm's transforms, or the padded crop that small pictures are used to."""

    crop: str = "rrc"  # "rrc" random resized crop, "pad" resize, pad an eighth and crop, "none" resize only
    scale: float = 0.35  # "rrc": the smallest area of a crop, as a share of the picture
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None  # timm's names, for example rand-m9-mstd0.5-inc1
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a crop that does not exist."""
        if self.crop not in CROPS:
            raise UserError(f"unknown crop {self.crop!r}: it is one of {', '.join(CROPS)}.")

    def transform(self, preprocessing: Preprocessing, size: tuple[int, int]) -> transforms.Compose:
        """PIL picture -> augmented [3, height, width] float32, drawing from Python's and torch's random state."""
        try:
            composed = self._timm_transform(preprocessing, size)
        except (AssertionError, ValueError):
            raise UserError(
                f"auto_augment={self.auto_augment} is not a policy of timm, such as rand-m9-mstd0.5-inc1."
            ) from None
        if self.crop != "rrc":
            crop = [transforms.RandomCrop(size, padding=max(size) // 8)] if self.crop == "pad" else []
            composed.transforms[0:1] = [partial(self.resized, preprocessing=preprocessing, size=size), *crop]
        return composed

    @property
    def whole_batch(self) -> bool:
        """Whether it is a resize, and then only crops and flips, which a whole batch can take at once."""
        return self.crop != "rrc" and not (self.auto_augment or self.color_jitter or self.random_erasing)

    def resized(self, picture: Image.Image, preprocessing: Preprocessing, size: tuple[int, int]) -> Image.Image:
        """The picture at a size in pixels, (height, width): where "pad" and "none" start."""
        resize = transforms.Resize(size, str_to_interp_mode(preprocessing.interpolation))
        resized: Image.Image = resize(picture)
        return resized

    def _timm_transform(self, preprocessing: Preprocessing, size: tuple[int, int]) -> transforms.Compose:
        composed: transforms.Compose = create_transform(
            input_size=(len(preprocessing.mean), *size),
            is_training=True,
            scale=(self.scale, 1.0),
            hflip=self.hflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            re_prob=self.random_erasing,
            re_mode="pixel",
        )
        for policy in composed.transforms:
            for step in [*getattr(policy, "ops", []), *itertools.chain(*getattr(policy, "policy", []))]:
                if step.aug_fn is posterize:
                    step.aug_fn = _posterize
        return composed


def _posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, which may ask for 0 bits: Pillow 13 refuses that, and it would leave a black picture."""
    posterized: Image.Image = posterize(picture, max(1, bits), **options)
    return posterized
