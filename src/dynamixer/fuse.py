"""A layer as the C++ kernels take it, and parts of it that have to be called instead."""

from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any

from torch import Tensor, nn

from dynamixer.ops.layer import Axis, Plan


def is_hooked(part: nn.Module) -> bool:
    """Whether something is to be called when the module is."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def called(mixer: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The linear layers of an AxisMixer that are wrapped (by an adapter), replaced or hooked: their parameters are not enough."""
    parts = mixer._modules.items()
    return {name: part for name, part in parts if part is not None and (type(part) is not nn.Linear or is_hooked(part))}


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """All within a module, as `modules()` without the names that it makes: this is asked in every pass."""
    for part in module._modules.values():
        if part is not None:
            yield part
            yield from parts_of(part)


def why_not_parts(layer: Any, usual: set[type[nn.Module]]) -> str | None:
    """Why the C++ kernels cannot compute a MixerLayer of these parts, or None: a clause to end a sentence with."""
    for part in parts_of(layer):
        odd = type(part) not in usual or any(type(p) not in (nn.Parameter, NoneType) for p in part._parameters.values())
        bare = part._parameters.get("bias", part) is None and part is not layer.mixer.channel  # which never has one
        if odd or bare or (isinstance(part, nn.Dropout) and part.p) or getattr(part, "approximate", "none") != "none":
            return "a part of it was replaced"
        if is_hooked(part):
            return "a part of it has a hook"
    return None


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
