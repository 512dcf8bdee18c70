"""A layer as the C++ kernels take it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dynamixer.ops.layer import Axis, Plan


def is_hooked(part: nn.Module) -> bool:
    """Whether something is to be called when the module is."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """All within a module, as `modules()` without the names that it makes: this is asked in every pass."""
    for part in module._modules.values():
        if part is not None:
            yield part
            yield from parts_of(part)


def plan_of(layer: Any) -> tuple[Plan, list[Tensor]]:
    """What the C++ kernels have to know of a MixerLayer, and its parameters in the plan's order."""
    mixer, named = layer.mixer, dict[str, Tensor | None]()

    def note(name: str, part: Any) -> None:
        named.update({f"{name}.weight": part.weight, f"{name}.bias": part.bias})

    for name, part in {
        "norm1": layer.norm1,
        "project": mixer.project,
        "norm2": layer.norm2,
        "fc1": layer.mlp.fc1,
        "fc2": layer.mlp.fc2,
    }.items():
        note(name, part)
    axes = []
    for name, axis, one in (("column", 1, mixer.row if mixer.shared else mixer.column), ("row", 2, mixer.row)):
        if one is None:
            continue
        dynamic = one.generator == "dynamic"
        axes.append(Axis(name, axis, one.segments, one.softmax, dynamic, one.static is not None))
        note(f"{name}.project", one.project)
        if dynamic:
            note(f"{name}.reduce", one.reduce)
            note(f"{name}.generate", one.generate)
        named[f"{name}.static"] = one.static if dynamic else one.matrices
    if mixer.channel is not None:
        note("channel.project", mixer.channel)
    if mixer.reweight is not None:
        note("reweight.fc1", mixer.reweight.fc1)
        note("reweight.fc2", mixer.reweight.fc2)
    given = {name: value for name, value in named.items() if value is not None}
    eps = layer.norm1.eps, layer.norm2.eps
    plan = Plan(tuple(axes), mixer.channel is not None, mixer.reweight is not None, eps, tuple(given))
    return plan, list(given.values())
