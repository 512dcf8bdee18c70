"""Lets the C++ kernels compute the layers of a model."""

from torch import nn

from dynamixer.errors import UserError
from dynamixer.layers import AxisMixer, MixerLayer, PatchConv
from dynamixer.logs import log
from dynamixer.ops.kernel import load_kernel


def use_kernel(model: nn.Module) -> nn.Module:
    """Let C++ kernels compute the layers of `model` wherever they can: on a processor, at the native picture size, in fp32 and
    bf16, which is as quick as fp32 where the processor does not multiply it. Elsewhere the kernel that mixes runs by itself (fp16
    too), or the plain operations. The results are the same but for rounding. A training step keeps about two fifths of what it
    would for its backward pass. Second derivatives and torch.func's transforms are for the plain model.

    The first call on a machine compiles the kernels for its processor, about a minute. The model is changed in place.

    Raises:
        UserError: no part of the model is for the kernel, or there is no compiler here.
    """
    if not _has_work(model):
        raise UserError(
            "the C++ kernel mixes in DynaMixer blocks with dynamic or static matrices, and this model has none."
        )
    if why_not := load_kernel():
        raise UserError(why_not)
    for part in model.modules():
        if isinstance(part, AxisMixer | MixerLayer | PatchConv):
            part.fused = True
    return model


def kernel_if_any(model: nn.Module) -> nn.Module:
    """`use_kernel` where it can be used; else the model as it is, and why, unless nothing of it is for the kernels."""
    if not _has_work(model):
        return model
    try:
        return use_kernel(model)
    except UserError as error:
        log(f"without the kernels: {error}")
        return model


def _has_work(model: nn.Module) -> bool:
    return any(isinstance(part, AxisMixer) and part.generator != "dense" for part in model.modules())
