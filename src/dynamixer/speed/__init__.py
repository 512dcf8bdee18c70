"""Speed: the kernel in training, the quickest way in inference, and how both are measured (docs/speed.md)."""

from dynamixer.speed.fast import Optimized, optimize
from dynamixer.speed.kernel import use_kernel

__all__ = ["Optimized", "optimize", "use_kernel"]
