"""A whole mixer layer by the C++ kernels, forward and backward, for processors: fp32 and bf16.

Between the kernels only the tokens themselves reach memory: normalised, mixed along each axis, and after the layer. The
backward pass keeps eight numbers for each channel of a token. The reweighting is computed before its branches are projected, from
the means of what they project, which by linearity is the same.

Letters: B images, H W grid of tokens, C channels, S segments, d reduced width, F hidden channels of the MLP.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Axis(NamedTuple):
    """A mixing branch of a layer: where its parameters are found, and how it mixes."""

    name: str  # of its parameters: column or row
    axis: int  # of [B, H, W, C]
    segments: int
    softmax: bool
    dynamic: bool
    added: bool  # a trained matrix beside the generated ones


@dataclass(frozen=True)
class Plan:
    """What a layer consists of, and the names of its parameters, in the order in which they are handed over."""

    axes: tuple[Axis, ...]
    channel: bool
    reweight: bool
    eps: tuple[float, float]  # of the two norms
    names: tuple[str, ...]

    @property
    def branches(self) -> list[str]:
        """In the published order."""
        return [axis.name for axis in self.axes] + ["channel"] * self.channel


class _Kept(NamedTuple):
    """What the backward pass reads."""

    x: Tensor  # [B, H, W, C]
    reduced: Tensor  # [B, H, W, all S*d, padded]
    shares: Tensor  # [B, branches, C] fp32
    sums: Tensor  # the branches' weighted sum [B, H, W, C]
    after: Tensor  # x after the block
    hidden: Tensor  # the MLP before its GELU [B, H, W, F]
    mixed: list[Tensor]  # each axis's [B, H, W, C], not projected


def forward(
    plan: Plan, x: Tensor, drop: Tensor | None, weights: dict[str, Tensor], packs: "Packed", keep: bool
) -> tuple[Tensor, _Kept]:
    """The layer's output for x [B, H, W, C]; `drop` [B, 2] scales what is added to each image."""
    ops, w = torch.ops.dynamixer, weights
    generated = [axis for axis in plan.axes if axis.dynamic]
    normed, reduced = ops.normed(
        x,
        w["norm1.weight"],
        w["norm1.bias"],
        plan.eps[0],
        packs("reduce", False) if generated else None,
        w["reduce.bias"] if generated else None,
    )
    mixed = [ops.mix(normed, *_mixing(axis, reduced, w, generated)) for axis in plan.axes]
    read = [*mixed, normed] if plan.channel else mixed
    if not plan.reweight:
        shares = x.new_ones(len(x), len(read), x.shape[3]).float()
    elif "reweight.inner.weight" in w:
        shares = _folded_shares(ops.means(read), w)
    else:
        shares = _shares(plan, ops.means(read), w).value
    out, sums, after, hidden = ops.tail(
        x,
        read,
        shares,
        [packs(f"{name}.project", False) for name in plan.branches],
        [w[f"{name}.project.bias"] for name in plan.branches],
        packs("project", False),
        w["project.bias"],
        w["norm2.weight"],
        w["norm2.bias"],
        plan.eps[1],
        packs("fc1", False),
        w["fc1.bias"],
        packs("fc2", False),
        w["fc2.bias"],
        drop,
        keep,
        packs.bytes,
    )
    return out, _Kept(x, reduced, shares, sums, after, hidden, mixed)


def backward(
    plan: Plan, grad: Tensor, drop: Tensor | None, weights: dict[str, Tensor], packs: "Packed", kept: _Kept
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of x and of all weights."""
    ops, w = torch.ops.dynamixer, weights
    generated = [axis for axis in plan.axes if axis.dynamic]
    normed, _ = ops.normed(kept.x, w["norm1.weight"], w["norm1.bias"], plan.eps[0], None, None)
    read = [*kept.mixed, normed] if plan.channel else kept.mixed
    beside, sums_grad, shares_grad, *made = ops.tail_grads(
        grad,
        read,
        kept.shares,
        [w[f"{name}.project.weight"] for name in plan.branches],
        [w[f"{name}.project.bias"] for name in plan.branches],
        kept.sums,
        kept.after,
        kept.hidden,
        packs("project", True),
        w["norm2.weight"],
        w["norm2.bias"],
        plan.eps[1],
        packs("fc1", True),
        packs("fc2", True),
        drop,
    )
    named = [f"{part}.{kind}" for part in ("fc2", "fc1", "norm2", "project") for kind in ("weight", "bias")]
    named += [f"{name}.project.{kind}" for name in plan.branches for kind in ("weight", "bias")]
    grads = dict(zip(named, made, strict=True))
    means_grad = None
    if plan.reweight:
        means_grad, more = _shares_grads(plan, ops.means(read), w, shares_grad)
        for name, value in more.items():
            grads[name] = grads[name] + value if name in grads else value
    read_grads = ops.branch_grads(
        sums_grad, kept.shares, means_grad, [packs(f"{name}.project", True) for name in plan.branches]
    )
    normed_grads, reduced_grads = read_grads[len(plan.axes) :], []
    for axis, mixed_grad in zip(plan.axes, read_grads, strict=False):
        arguments = _mixing(axis, kept.reduced, w, generated)
        found = iter(ops.mix_grads(mixed_grad, normed, *arguments))
        normed_grads.append(next(found))
        if axis.dynamic:
            reduced_grads.append(next(found))
            grads[f"{axis.name}.generate.weight"], grads[f"{axis.name}.generate.bias"] = next(found), next(found)
        for value in found:
            grads[f"{axis.name}.static"] = value
    x_grad, grads["norm1.weight"], grads["norm1.bias"], grads["reduce.weight"], grads["reduce.bias"] = ops.normed_grads(
        kept.x,
        w["norm1.weight"],
        w["norm1.bias"],
        plan.eps[0],
        beside,
        normed_grads,
        reduced_grads,
        packs("reduce", True) if generated else None,
    )
    first = 0
    for axis, one in zip(generated, reduced_grads, strict=True):
        some = slice(first, first := first + one.shape[3])
        grads[f"{axis.name}.reduce.weight"], grads[f"{axis.name}.reduce.bias"] = (
            grads["reduce.weight"][some],
            grads["reduce.bias"][some],
        )
    return x_grad, grads


def _mixing(axis: Axis, reduced: Tensor, w: dict[str, Tensor], generated: list[Axis]) -> tuple[Any, ...]:
    """The arguments of the kernel that mixes, after the tokens."""
    added = w[f"{axis.name}.static"] if axis.added or not axis.dynamic else None
    options = added, axis.axis, axis.segments, axis.softmax
    if not axis.dynamic:
        return None, None, None, *options
    widths = [len(w[f"{one.name}.reduce.bias"]) for one in generated]
    place = generated.index(axis)
    features = reduced.narrow(3, sum(widths[:place]), widths[place])
    return features, w[f"{axis.name}.generate.weight"], w[f"{axis.name}.generate.bias"], *options


class _Shares(NamedTuple):
    """The reweighting and what it went through, all fp32."""

    mean: Tensor  # of the sum of the projected branches [B, C]
    before: Tensor  # hidden, before its GELU
    hidden: Tensor
    value: Tensor  # [B, branches, C], sums over branches are 1


def _shares(plan: Plan, means: Tensor, w: dict[str, Tensor]) -> _Shares:
    """The reweighting from the means of what the branches project, [B, branches, C]."""
    with torch.autocast("cpu", enabled=False):
        projected = [
            F.linear(means[:, i], w[f"{name}.project.weight"], w[f"{name}.project.bias"])
            for i, name in enumerate(plan.branches)
        ]
        mean = torch.stack(projected).sum(0)
        before = F.linear(mean, w["reweight.fc1.weight"], w["reweight.fc1.bias"])
        hidden = F.gelu(before)
        logits = F.linear(hidden, w["reweight.fc2.weight"], w["reweight.fc2.bias"])
        by_branch = logits.unflatten(-1, (-1, len(plan.branches))).movedim(-1, 1).contiguous()
        value = by_branch.softmax(1)  # over an axis that is not the last one it runs along whole vectors
    return _Shares(mean, before, hidden, value)


def folded(plan: Plan, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """For weights that no longer change: what lies before the reweighting's GELU as one layer, for all means side by side, and
    after it rows by (branch, channel).
    """
    if not plan.reweight:
        return {}
    inner, branches = w["reweight.fc1.weight"], plan.branches
    turned = (
        w[f"reweight.fc2.{kind}"].unflatten(0, (-1, len(branches))).transpose(0, 1) for kind in ("weight", "bias")
    )
    outer = dict(zip(("reweight.outer.weight", "reweight.outer.bias"), (t.flatten(0, 1) for t in turned), strict=True))
    shift = torch.stack([w[f"{name}.project.bias"] for name in branches]).sum(0)
    return outer | {
        "reweight.inner.weight": torch.cat([inner @ w[f"{name}.project.weight"] for name in branches], 1),
        "reweight.inner.bias": w["reweight.fc1.bias"] + inner @ shift,
    }


def _folded_shares(means: Tensor, w: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        hidden = F.gelu(F.linear(means.flatten(1), w["reweight.inner.weight"], w["reweight.inner.bias"]))
        return F.linear(hidden, w["reweight.outer.weight"], w["reweight.outer.bias"]).view_as(means).softmax(1)


def _shares_grads(plan: Plan, means: Tensor, w: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of `_shares`, of the means and of each weight."""
    mean, before, hidden, value = _shares(plan, means, w)
    with torch.autocast("cpu", enabled=False):
        weighed = grad * value
        logits = (weighed - value * weighed.sum(1, keepdim=True)).movedim(1, -1).flatten(1)
        inner = torch.ops.aten.gelu_backward(logits @ w["reweight.fc2.weight"], before)
        outer = inner @ w["reweight.fc1.weight"]
        grads = {
            "reweight.fc1.weight": inner.T @ mean,
            "reweight.fc1.bias": inner.sum(0),
            "reweight.fc2.weight": logits.T @ hidden,
            "reweight.fc2.bias": logits.sum(0),
        }
        shift = outer.sum(0)
        for i, name in enumerate(plan.branches):
            grads[f"{name}.project.weight"] = outer.T @ means[:, i]
            grads[f"{name}.project.bias"] = shift
        return torch.stack([outer @ w[f"{name}.project.weight"] for name in plan.branches], 1), grads


def kind_of(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes for x: autocast's where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def why_not_layer(x: Tensor) -> str | None:
    """Why the kernels cannot compute a layer for x [B, H, W, C] all at once, or None: a clause to end a sentence with."""
    lanes = torch.ops.dynamixer.lanes()
    reasons = {
        f"the kernels compute layers in fp32 and bf16, not {kind_of(x)}": kind_of(x)
        not in (torch.float32, torch.bfloat16),
        f"the processor's vectors have {lanes} numbers, which do not divide {x.shape[-1]} channels": x.shape[-1] % lanes
        != 0,
        "there are no tokens": x.numel() == 0,
    }
    return next((why for why, holds in reasons.items() if holds), None)


class Packed:
    """Weights packed for the kernels, each when it is first asked for; with `bytes` in eight bits, for inference only.

    Then each output's weights have a step of their own, and every token is rounded by its own range when it is read. The
    reductions and generators stay as they are: what decides the mixing is small.
    """

    def __init__(self, weights: dict[str, Tensor], kind: torch.dtype, *, bytes: bool = False):  # noqa: A002
        self._weights, self._kind, self._made, self.bytes = weights, kind, dict[tuple[str, bool], Tensor](), bytes

    def __call__(self, name: str, flipped: bool) -> Tensor:
        """A linear layer's weight, for y = x W^T or flipped for dx = dy W."""
        if (name, flipped) not in self._made:
            ops, weight = torch.ops.dynamixer, self._weights[f"{name}.weight"]
            rounded = self.bytes and name != "reduce"
            self._made[name, flipped] = ops.pack_bytes(weight) if rounded else ops.pack(weight, flipped, self._kind)
        return self._made[name, flipped]


def complete(plan: Plan, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights in fp32; the reductions of all axes side by side, their bias padded to whole vectors; a bias of each branch."""
    w = {name: value.float().contiguous() for name, value in weights.items()}
    generated = [axis.name for axis in plan.axes if axis.dynamic]
    if generated:
        w["reduce.weight"] = torch.cat([w[f"{name}.reduce.weight"] for name in generated])
        bias = torch.cat([w[f"{name}.reduce.bias"] for name in generated])
        w["reduce.bias"] = F.pad(bias, (0, -len(bias) % torch.ops.dynamixer.lanes()))
    if plan.channel:  # it has none
        w["channel.project.bias"] = torch.zeros_like(w["norm1.bias"])
    return w


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, drop: Tensor | None, *parameters: Tensor) -> Tensor:
        x = x.contiguous()
        weights = complete(plan, dict(zip(plan.names, parameters, strict=True)))
        out, kept = forward(plan, x, drop, weights, Packed(weights, x.dtype), keep=True)
        ctx.plan, ctx.drop = plan, drop
        ctx.save_for_backward(*kept[:-1], *kept.mixed, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        single = len(_Kept._fields) - 1
        split = single + len(plan.axes)
        parameters = saved[split:]
        x, reduced, shares, sums, after, hidden = saved[:single]
        kept = _Kept(x, reduced, shares, sums, after, hidden, list(saved[single:split]))
        weights = complete(plan, dict(zip(plan.names, parameters, strict=True)))
        packs = Packed(weights, kept.x.dtype)
        x_grad, grads = backward(plan, grad.to(kept.x.dtype).contiguous(), ctx.drop, weights, packs, kept)
        given = (grads[name].reshape(p.shape).to(p.dtype) for name, p in zip(plan.names, parameters, strict=True))
        return None, x_grad, None, *given


def mixer_layer(plan: Plan, x: Tensor, drop: Tensor | None, parameters: list[Tensor]) -> Tensor:
    """Apply a layer to x [B, H, W, C], with gradients where they are asked for."""
    if not torch.is_grad_enabled():
        x, weights = x.contiguous(), complete(plan, dict(zip(plan.names, parameters, strict=True)))
        return forward(plan, x, drop, weights, Packed(weights, x.dtype), keep=False)[0]
    result: Tensor = _Layer.apply(plan, x, drop, *parameters)
    return result
