"""`dynamixer` with two more networks, the teachers that the shipped weights are distilled from, under timm's interface.

    python tools/teacher.py train cifar10_nano model=teacher_cifar10 ...

teacher_cifar10 has 2M parameters and 118M multiply-adds at 32 px: six 3x3 convolutions after a fixed whitening of 2x2 patches,
with which Jordan (2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU") reaches 94 % in ten epochs. teacher_imagenette is its
like for photographs, 3M parameters and 419M multiply-adds at 128 px: patches of 3x3, every second one, and eight convolutions.
`tools/train_weights.sh` has their training by the engine as it is. What is kept of them is named as they are, such as
`teacher=tools/teacher_cifar10.safetensors`, and only this command can load it, as it alone knows the networks.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from dynamixer.cli import main
from dynamixer.models.dynamixer import default_cfgs as ours

READ = ("num_classes", "input_size", "crop_pct", "interpolation", "mean", "std")


def _like(student: str) -> dict[str, Any]:
    read = {key: getattr(ours[student].default, key) for key in READ}
    return {"url": "", **read, "pool_size": None, "first_conv": None, "classifier": "head"}


default_cfgs = generate_default_cfgs(
    {"teacher_cifar10": _like("dynamixer_nano"), "teacher_imagenette": _like("dynamixer_tiny")}
)


class Whitening(nn.Module):
    """Patches along the principal axes of those of the first batch, each axis with variance 1 and both signs.

    From [B, 3, H, W] to [B, 6 K^2, (H - K) / S + 1, (W - K) / S + 1] for patches of KxK, every S-th one; not trained.
    """

    kernels: Tensor
    ready: Tensor

    def __init__(self, patch: int = 2, stride: int = 1) -> None:
        super().__init__()
        self.patch, self.stride = patch, stride
        self.register_buffer("kernels", torch.zeros(6 * patch**2, 3, patch, patch))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, pictures: Tensor) -> Tensor:
        """The patches."""
        if self.training and not self.ready:
            size = 3 * self.patch**2
            patches = F.unfold(pictures.detach().float(), self.patch).transpose(1, 2).reshape(-1, size)
            variance, axes = torch.linalg.eigh(patches.T.cov())
            kernels = (axes / (variance + 5e-4).sqrt()).T.reshape(size, 3, self.patch, self.patch)
            self.kernels.copy_(torch.cat([kernels, -kernels]))
            self.ready.fill_(True)
        return F.conv2d(pictures, self.kernels, stride=self.stride)


class Teacher(nn.Module):
    """Whitening, then stages of two convolutions and a halving of the sides; logits [B, num_classes] of pictures [B, 3, H, W]."""

    def __init__(
        self, widths: tuple[int, ...], patch: int, stride: int, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, widths[-1]
        stages, before = [], 6 * patch**2
        for width in widths:
            first, second = (nn.Conv2d(start, width, 3, padding=1, bias=False) for start in (before, width))
            nn.init.dirac_(first.weight[:before])
            nn.init.dirac_(second.weight)
            norms = [nn.BatchNorm2d(width, momentum=0.4) for _ in range(2)]
            stages += [first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU()]
            before = width
        self.stages = nn.Sequential(Whitening(patch, stride), nn.GELU(), *stages)
        self.head = nn.Linear(before, num_classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.stages(pictures).amax((2, 3))) / 9


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(Teacher, name, pretrained, **kwargs)
    return model.to(memory_format=torch.channels_last)


@register_model
def teacher_cifar10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Jordan's network."""
    shape = {"widths": (64, 256, 256), "patch": 2, "stride": 1}
    return _build("teacher_cifar10", pretrained, **shape | kwargs)


@register_model
def teacher_imagenette(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Its like for photographs."""
    shape = {"widths": (64, 128, 256, 384), "patch": 3, "stride": 2}
    return _build("teacher_imagenette", pretrained, **shape | kwargs)


if __name__ == "__main__":
    main()
