"""Where the time goes when the C++ kernels compute a model: operation by operation, beside what its products alone would take."""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from dynamixer.errors import UserError
from dynamixer.models import DynaMixer
from dynamixer.progress import progress
from dynamixer.speed.bench import DTYPES, Plan, about, autocast_of, example_model, plan_size
from dynamixer.speed.ceiling import Shape, measure_ceiling, shapes
from dynamixer.speed.clock import Call
from dynamixer.speed.fast import Precision, optimize
from dynamixer.speed.kernel import use_kernel
from dynamixer.speed.step import TrainingStep

PARTS = {
    "dynamixer::tail": "branches projected and added, second norm, MLP",
    "dynamixer::tail_grads": "gradients of these and of their weights",
    "dynamixer::branch_grads": "gradients of what the branches read",
    "dynamixer::mix": "matrices made, softmax, mixing",
    "dynamixer::mix_grads": "gradients of mixing and generators",
    "dynamixer::normed": "first norm, tokens reduced",
    "dynamixer::normed_grads": "gradients of first norm and reductions",
    "dynamixer::means": "means for the reweighting",
    "dynamixer::pack": "weights packed for the products",
    "aten::mkldnn_convolution": "stem and downsampling",
    "aten::convolution_backward": "gradients of stem and downsampling",
    "aten::_fused_adamw_": "AdamW",
}
REST = "everything else"
CALLS = 5


def parts(names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Profile a forward pass with packed weights and, with `plan.train`, a training step.

    Returns:
        `about`, `plan` and `profiles`: model, what, batch, size, precision; `ms` of a call; `parts`, each with operation, part,
        ms, share of the time, and gflop_per_s where products of linear layers lie inside; the last is all that is in none of the
        others, Python too; and `bound_ms` and `bound_gflop_per_s`, of the matrix products of linear layers and convolutions, each
        by itself at its best.

    Raises:
        UserError: a model that is no DynaMixer, or one that the kernels cannot compute here.
    """
    if others := [name for name in names if not isinstance(example_model(name), DynaMixer)]:
        raise UserError(f"--parts tells where the time of the C++ kernels goes, and {others[0]} is no DynaMixer.")
    profiles = []
    with progress("profiling", len(names) * (1 + plan.train), unit="profiles") as meter:
        for name in names:
            model, pictures = example_model(name, plan.size), _pictures(name, plan, plan.batch)
            fast = optimize(model, pictures, way="kernel", precision=cast(Precision, plan.precision))
            profiles.append(
                _profile(name, "inference", partial(fast, pictures), shapes(model, pictures), pictures, plan)
            )
            meter.advance(1)
            if plan.train:
                pictures = _pictures(name, plan, plan.train_batch or plan.batch)
                products = shapes(model, pictures, backward=True)
                step = TrainingStep(use_kernel(model), pictures, autocast_of(plan.precision))
                profiles.append(_profile(name, "training step", step, products, pictures, plan))
                meter.advance(1)
    return {"about": about(), "plan": asdict(plan), "profiles": profiles}


def _pictures(name: str, plan: Plan, batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, *plan_size(plan, name), generator=torch.Generator().manual_seed(0))


def _profile(
    name: str, what: str, call: Call, products: Counter[Shape], pictures: torch.Tensor, plan: Plan
) -> dict[str, Any]:
    call()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler tells of its own starts and stops
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        whole = (time.perf_counter() - began) / CALLS
    seconds, work = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in profiler.events():
        if event.name in PARTS:
            seconds[event.name] += 1e-6 * event.self_cpu_time_total / CALLS
            work[event.name] += multiply_adds(event.name, event.input_shapes) / CALLS
    seconds[REST] = whole - sum(seconds.values())
    bound = measure_ceiling(products, DTYPES[plan.precision])
    lines = [
        {"operation": key, "part": PARTS.get(key, ""), "ms": 1e3 * seconds[key], "share": seconds[key] / whole}
        | ({"gflop_per_s": 2e-9 * work[key] / seconds[key]} if work[key] else {})
        for key in (*PARTS, REST)
        if key in seconds
    ]
    height, width = pictures.shape[2:]
    return {
        "model": name,
        "what": what,
        "batch": len(pictures),
        "size": [height, width],
        "precision": plan.precision,
        "parts": lines,
        "ms": 1e3 * whole,
        "bound_ms": 1e3 * bound.seconds,
        "bound_gflop_per_s": bound.gflops,
    }


def multiply_adds(operation: str, sizes: Sequence[Any]) -> int:
    """Of the linear layers inside one of the kernels' operations, by the shapes of its arguments (ops/csrc/layer.cpp)."""
    if operation not in ("dynamixer::tail", "dynamixer::tail_grads", "dynamixer::branch_grads"):
        return 0
    images, height, width, channels = sizes[0]  # B, H, W, C
    branches = sizes[1 if operation == "dynamixer::branch_grads" else 2][1]  # shares [B, branches, C]
    tokens, square = images * height * width, channels * channels
    if operation == "dynamixer::branch_grads":
        return tokens * branches * square
    hidden = sizes[11][0] if operation == "dynamixer::tail" else sizes[7][3]  # the bias of fc1; the MLP before its GELU
    whole = square + 2 * channels * hidden  # the projection and the MLP
    return tokens * (branches * square + (whole if operation == "dynamixer::tail" else 2 * whole))
