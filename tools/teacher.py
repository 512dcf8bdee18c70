"""`dynamixer` with one more network, the teacher that nano's weights are distilled from: `teacher_cifar10`, timm's name for it.

    python tools/teacher.py train cifar10_nano model=teacher_cifar10 ...

2M parameters, 118M multiply-adds at 32 px: six 3x3 convolutions after a fixed whitening of 2x2 patches, the network with which
Jordan (2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU") reaches 94 % in ten epochs, here trained by
the engine as it is (`tools/train_weights.sh nano`), and kept for
`teacher=tools/teacher_cifar10.safetensors`, which only this command can load, as it alone knows the network.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from dynamixer.cli import main
from dynamixer.models.dynamixer import default_cfgs as ours

NAME, WIDTHS = "teacher_cifar10", (64, 256, 256)
READ = ("num_classes", "input_size", "crop_pct", "interpolation", "mean", "std")
nano = {key: getattr(ours["dynamixer_nano"].default, key) for key in READ}
default_cfgs = generate_default_cfgs(
    {NAME: {"url": "", **nano, "pool_size": None, "first_conv": None, "classifier": "head"}}
)


class Whitening(nn.Module):
    """2x2 patches along the principal axes of those of the first batch, each axis with variance 1 and both signs.

    From [B, 3, H, W] to [B, 24, H - 1, W - 1]. Nothing of it is trained.
    """

    kernels: Tensor
    ready: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernels", torch.zeros(24, 3, 2, 2))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, pictures: Tensor) -> Tensor:
        """The patches."""
        if self.training and not self.ready:
            patches = F.unfold(pictures.detach().float(), 2).transpose(1, 2).reshape(-1, 12)
            variance, axes = torch.linalg.eigh(patches.T.cov())
            kernels = (axes / (variance + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
            self.kernels.copy_(torch.cat([kernels, -kernels]))
            self.ready.fill_(True)
        return F.conv2d(pictures, self.kernels)


class Teacher(nn.Module):
    """Three stages, each of two convolutions and a halving of the sides; logits [B, num_classes] of pictures [B, 3, H, W]."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, WIDTHS[-1]
        stages, before = [], 24
        for width in WIDTHS:
            first, second = (nn.Conv2d(start, width, 3, padding=1, bias=False) for start in (before, width))
            nn.init.dirac_(first.weight[:before])
            nn.init.dirac_(second.weight)
            norms = [nn.BatchNorm2d(width, momentum=0.4) for _ in range(2)]
            stages += [first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU()]
            before = width
        self.stages = nn.Sequential(Whitening(), nn.GELU(), *stages)
        self.head = nn.Linear(before, num_classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.stages(pictures).amax((2, 3))) / 9


@register_model
def teacher_cifar10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Jordan's network."""
    model: nn.Module = build_model_with_cfg(Teacher, NAME, pretrained, **kwargs)
    return model.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
