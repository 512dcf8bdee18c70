"""How fast models are on this machine, against the plain way and against what the machine can do (docs/speed.md)."""

import copy
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import dynamixer
from dynamixer.data.preprocess import native_size
from dynamixer.errors import UserError, first_line
from dynamixer.layers import AxisMixer
from dynamixer.logs import log
from dynamixer.models import DynaMixer, count
from dynamixer.models.checkpoint import check_sizes, create_model
from dynamixer.native import processor_name
from dynamixer.progress import progress
from dynamixer.speed.ceiling import Shape, measure_ceiling, shapes
from dynamixer.speed.clock import Call, in_turn, ratio
from dynamixer.speed.fast import Optimized, optimize
from dynamixer.speed.kernel import use_kernel
from dynamixer.speed.memory import peak_mib
from dynamixer.speed.plain import plain
from dynamixer.speed.step import TrainingStep
from dynamixer.training.environment import commit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LATENCIES = 40  # calls at batch 1, of which the 99th percentile is nearly the slowest


@dataclass(frozen=True)
class Plan:
    """What to measure of each model."""

    batch: int = 8
    train_batch: int | None = None  # in training; the same
    size: int | None = None  # pixels; the model's own
    precision: str = "fp32"
    rounds: int = 9
    train: bool = True
    fast: bool = True
    compile: bool = False
    ways: bool = False  # the other ways of `optimize`: OpenVINO, and int8
    peers: bool = False  # the same network with static matrices and without the softmax


@dataclass
class Measured:
    """One model's figures; seconds are medians of rounds in which the variants took turns."""

    model: str
    parameters: int
    multiply_adds: int
    size: tuple[int, int]
    batch: int
    train_batch: int
    precision: str
    baseline: str
    inference: dict[str, dict[str, float]] = field(default_factory=dict)
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    ceiling: dict[str, Any] = field(default_factory=dict)
    training_ceiling: dict[str, Any] = field(default_factory=dict)  # of the products of a training step


def bench(names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Measure models by name, ours or any of timm's.

    Returns:
        `about` (machine, versions), `plan` and `models`, each a Measured as a dict.

    Raises:
        UserError: an unknown model, or one that does not take pictures of the size.
    """
    measured = [asdict(_measure(name, plan)) for name in names]
    return {"about": about(), "plan": asdict(plan), "models": measured}


def about() -> dict[str, Any]:
    """The machine, the versions and the commit of the code."""
    return {
        "processor": processor_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "dynamixer": dynamixer.__version__,
        "commit": commit(),
        "python": platform.python_version(),
    }


def example_model(name: str, size: int | None = None, **options: Any) -> nn.Module:
    """A model with random weights, always the same, whose matrices are as far from uniform as trained ones."""
    torch.manual_seed(0)
    native = native_size(create_model(name, device="meta"))
    if size is not None and native != (size, size):
        try:
            model = create_model(name, img_size=size, **options)
        except UserError as error:
            if "'img_size'" not in str(error):
                raise
            model = create_model(name, **options)  # convolutional networks take any size without being told
    else:
        model = create_model(name, **options)
    model.eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, AxisMixer) and part.generator == "dynamic":
                part.generate.weight *= 200
    return model


def _measure(name: str, plan: Plan) -> Measured:
    model = example_model(name, plan.size)
    sides = (plan.size, plan.size) if plan.size else native_size(model)
    check_sizes(model, name, [sides])
    pictures = torch.randn(plan.batch, 3, *sides, generator=torch.Generator().manual_seed(0))
    size, work = count(model, sides)
    autocast = autocast_of(plan.precision)
    variants: dict[str, nn.Module] = {"eager": model}
    if isinstance(model, DynaMixer):
        variants |= {"kernel": use_kernel(copy.deepcopy(model))}
        try:
            variants = {"plain": plain(model)} | variants
        except UserError as error:
            log(f"{name}: without plain, {error}")
    result = Measured(
        name, size, work, sides, plan.batch, plan.train_batch or plan.batch, plan.precision, next(iter(variants))
    )
    calls = {key: _inference(variant, autocast) for key, variant in variants.items()}
    if plan.compile:
        for key in [key for key in variants if key != "kernel"]:
            calls[f"{key}, compiled"] = _compiled(variants[key], autocast)
    ways = _ways(model, pictures, plan, result) if plan.fast else {}
    taken = _refused(calls | ways, model, pictures, plan.precision, result)
    log(f"{name}: inference, {plan.rounds} rounds of {', '.join(taken)}")
    result.inference = _figures(
        _in_turn({key: partial(call, pictures) for key, call in taken.items()}, plan.rounds),
        result.baseline,
        plan.batch,
    )
    if "fast" in ways:
        result.start = _second_start(name, plan, ways["fast"])
    if plan.fast:
        ways = _ways(model, pictures[:1], plan, result)
    single = {key: partial(call, pictures[:1]) for key, call in (calls | ways).items() if key in taken}
    result.latency = _figures(_in_turn(single, LATENCIES), result.baseline, 1)
    with progress("memory", len(single), unit="calls") as meter:
        for key, call in single.items():
            result.inference[key]["peak_mib"] = peak_mib(partial(taken[key], pictures))
            result.latency[key]["peak_mib"] = peak_mib(call)
            meter.advance(1)
    result.ceiling = _ceiling(shapes(model, pictures), plan.batch, plan)
    if plan.train:
        _measure_training(model, variants, plan, result)
    return result


def _ways(model: nn.Module, pictures: Tensor, plan: Plan, result: Measured) -> dict[str, Optimized]:
    """The model as `--fast` runs it, and with `ways` the others beside it."""
    wanted: dict[str, dict[str, Any]] = {"fast": {"precision": plan.precision}}
    if plan.ways:
        wanted |= {"openvino": {"way": "openvino", "precision": plan.precision}, "fast, int8": {"precision": "int8"}}
    made = {}
    for key, options in wanted.items():
        try:
            made[key] = optimize(model, pictures, **options)
            log(f"{result.model}: {key} is {made[key]}")
        except UserError as error:
            result.refused[key] = str(error)
            log(f"{result.model}: {key} is not timed: {error}")
    return made


def _compiled(model: nn.Module, autocast: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    """Compiled with frozen weights, for which the compiler asks that gradients are off."""
    compiled: Any = torch.compile(copy.deepcopy(model), options={"freezing": True})

    def run(pictures: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            return compiled(pictures)

    return run


def _measure_training(model: nn.Module, variants: dict[str, nn.Module], plan: Plan, result: Measured) -> None:
    pictures = torch.randn(result.train_batch, 3, *result.size, generator=torch.Generator().manual_seed(0))
    variants = {key: variant for key, variant in variants.items() if key not in result.refused}
    if plan.compile:
        for key in [key for key in variants if key != "kernel" and f"{key}, compiled" not in result.refused]:
            compiled: Any = torch.compile(copy.deepcopy(variants[key]))
            variants[f"{key}, compiled"] = compiled
    if plan.peers and isinstance(model, DynaMixer):
        for peer, options in {"static": {"generator": "static"}, "no softmax": {}}.items():
            variants[peer] = use_kernel(example_model(result.model, plan.size, softmax=False, **options))
    steps = {key: TrainingStep(variant, pictures, autocast_of(plan.precision)) for key, variant in variants.items()}
    try:
        steps[result.baseline]()
    except (ValueError, RuntimeError) as error:  # BatchNorm wants more than one number for each channel
        how = f"{result.train_batch} pictures of {result.size[0]}x{result.size[1]} px"
        raise UserError(f"{result.model} cannot be trained with {how}: {first_line(error)} (--no-train)") from None
    products = shapes(copy.deepcopy(model), pictures, backward=True)
    result.training_ceiling = _ceiling(products, result.train_batch, plan)
    result.training = _figures(_in_turn(steps, plan.rounds), result.baseline, result.train_batch)
    with progress("memory", len(steps), unit="calls") as meter:
        for key, step in steps.items():
            result.training[key]["peak_mib"] = peak_mib(step)
            if not key.endswith("compiled"):
                result.training[key]["kept_mib"] = step.kept()
            meter.advance(1)


def autocast_of(precision: str) -> Callable[[], Any]:
    """Makes the context that a pass in this precision runs in: autocast, which is off for fp32."""
    return lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def _inference(model: nn.Module, autocast: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    def run(pictures: Tensor) -> Tensor:
        with torch.inference_mode(), autocast():
            return model(pictures)

    return run


def _in_turn(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    with progress("timing", (rounds + 1) * len(calls), unit="calls") as meter:
        return in_turn(calls, rounds=rounds, advance=lambda: meter.advance(1))


def _refused(
    calls: Mapping[str, Callable[[Tensor], Tensor]],
    model: nn.Module,
    pictures: Tensor,
    precision: str,
    result: Measured,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Take out what does not give the model's answers: within 1e-4 of the largest logit, in bf16 twice the plain way's error.

    int8 is another model, whose accuracy on pictures decides: within a twentieth of the largest logit.
    """
    with torch.inference_mode():
        expected = model(pictures)
    errors = {key: float((call(pictures).float() - expected).abs().max()) for key, call in calls.items()}
    largest = max(1.0, float(expected.abs().max()))
    close = 1e-4 * largest + (2 * errors[result.baseline] if precision != "fp32" else 0.0)
    for key, error in errors.items():
        allowed = 0.05 * largest if key.endswith("int8") else close
        if not error <= allowed:
            result.refused[key] = f"its logits differ by {error:.2g} where {allowed:.2g} are allowed"
            log(f"{result.model}: {key} is not timed: {result.refused[key]}")
    if result.baseline in result.refused:
        raise UserError(
            f"{result.model}: {result.baseline} does not give the model's answers, nothing can be compared."
        )
    return {key: call for key, call in calls.items() if key not in result.refused}


def _figures(taken: dict[str, list[float]], baseline: str, images: int) -> dict[str, dict[str, float]]:
    found = {}
    for key, seconds in taken.items():
        low, middle, high = ratio(taken[baseline], seconds)
        ordered = sorted(seconds)
        found[key] = {
            "images_per_s": images / statistics.median(seconds),
            "p50_ms": 1e3 * statistics.median(seconds),
            "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "times_baseline": middle,
            "times_low": low,
            "times_high": high,
        }
    return found


def _ceiling(products: Mapping[Shape, int], images: int, plan: Plan) -> dict[str, Any]:
    with progress("ceiling", len(products), unit="products") as meter:
        ceiling = measure_ceiling(products, DTYPES[plan.precision], lambda: meter.advance(1))
    width = 4 if plan.precision == "fp32" else 2
    return {
        "images_per_s": images / ceiling.seconds,
        "gflop_per_s": ceiling.gflops,
        "copy_gb_per_s": ceiling.copy_gb_per_s,
        "products": [asdict(p) | {"intensity": p.intensity(width)} for p in ceiling.products],
    }


def _second_start(name: str, plan: Plan, fast: Optimized) -> dict[str, float]:
    """Seconds of a new process, from its start, in which the optimised model comes from the cache."""
    script = (
        "import time; began = time.perf_counter()\n"
        "import torch; from dynamixer.speed import bench; from dynamixer.speed.fast import optimize\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"model = bench.example_model({name!r}, {plan.size!r}); made = time.perf_counter()\n"
        f"pictures = torch.randn({plan.batch}, 3, *{tuple(plan_size(plan, name))}, "
        "generator=torch.Generator().manual_seed(0))\n"
        f"fast = optimize(model, pictures, way={fast.way!r}, precision={fast.precision!r}); fast(pictures)\n"
        "print(made - began, time.perf_counter() - made, int(fast.cached))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        log(f"{name}: the second start failed: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
        return {}
    imports, ready, cached = map(float, done.stdout.split()[-3:])
    whole = time.perf_counter() - began
    return {"process_s": whole, "imports_and_model_s": imports, "ready_to_first_answer_s": ready, "cached": cached}


def plan_size(plan: Plan, name: str) -> tuple[int, int]:
    """The (height, width) of a plan's pictures for a model."""
    return (plan.size, plan.size) if plan.size else native_size(create_model(name, device="meta"))


def scale(names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Seconds and memory of a forward pass against picture size and batch, as it is (`eager`).

    Returns:
        `about`, `plan` and `rows`: model, size, batch, images_per_s, multiply_adds, peak_mib.
    """
    rows = []
    for name in names:
        model = example_model(name)
        native = native_size(model)[0]
        sizes = [native, native * 3 // 2, native * 2, native * 3, 1024 if native == 224 else native * 4]
        check_sizes(model, name, [(size, size) for size in sizes])
        settings = [(size, plan.batch) for size in sizes]
        settings += [(native, batch) for batch in (1, 2, 4, 16) if batch != plan.batch]
        run = _inference(model, autocast_of(plan.precision))
        with progress("timing", len(settings), unit="calls") as meter:
            for size, batch in settings:
                call = partial(run, torch.randn(batch, 3, size, size))
                seconds = statistics.median(in_turn({"eager": call}, rounds=3)["eager"])
                row = {"model": name, "size": size, "batch": batch, "images_per_s": batch / seconds}
                rows.append(row | {"multiply_adds": count(model, size).multiply_adds, "peak_mib": peak_mib(call)})
                meter.advance(1)
    return {"about": about(), "plan": asdict(plan), "rows": rows}
