"""Lets the C++ kernel mix in a model."""

from torch import nn

from dynamixer.errors import UserError
from dynamixer.layers import AxisMixer, MixerLayer
from dynamixer.ops.kernel import load_kernel


def use_kernel(model: nn.Module) -> nn.Module:
    """Let the C++ kernel generate, normalise and mix in `model` wherever it can: on a processor, in fp32, bf16 or fp16, at the
    native picture size. Elsewhere the plain operations run. The results are the same but for rounding. The GELU and the
    sum of the branches are computed again in the backward pass: a training step keeps less than two thirds of the memory.

    The first call on a machine compiles the kernel for its processor, about half a minute. The model is changed in place.

    Raises:
        UserError: no part of the model is for the kernel, or there is no compiler here.
    """
    mixers = [part for part in model.modules() if isinstance(part, AxisMixer) and part.generator != "dense"]
    if not mixers:
        raise UserError(
            "the C++ kernel mixes in DynaMixer blocks with dynamic or static matrices, and this model has none."
        )
    if why_not := load_kernel():
        raise UserError(why_not)
    for part in model.modules():
        if isinstance(part, AxisMixer | MixerLayer):
            part.fused = True
    return model
