"""Why the compiled bf16 training step of the published layout is slower than the eager one: one layout after another (ADR 0007).

python benchmarks/compiled.py            measure (three minutes on two cores that multiply bf16) and write the table into the page
python benchmarks/compiled.py --page     write it from the results that are there

dynamixer_nano, 256 pictures, variants in turn, eager and compiled. All compute the same; this is checked.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dynamixer.models import DynaMixer
from dynamixer.native import keep_memory
from dynamixer.speed.bench import about, autocast_of, example_model
from dynamixer.speed.clock import in_turn, ratio
from dynamixer.speed.plain import _Block, _Operation, plain
from dynamixer.speed.step import TrainingStep

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/compiled.json", ROOT / "docs/adr/0007-speed.md"
BATCH, ROUNDS = 256, 7
NAMES = {
    "plain": "the published layout",
    "rows": "matrices by (output, input): their softmax over the last axis",
    "shares": "and the softmax over branches along channels",
    "asked": "and the softmax over tokens asked for in fp32, its result rounded at once, in place of what autocast does",
    "ours": "our model, without its kernels",
}


class _Turned(_Operation):
    """Rows of the generator by (output, input) token."""

    asked = False

    def forward(self, lines: Tensor) -> Tensor:
        count, length, channels = lines.shape
        reduced = self.reduce(lines).reshape(count, length, self.segments, -1)
        flat = reduced.permute(0, 2, 1, 3).reshape(count, self.segments, -1)
        generated = self.generate(flat).reshape(count, self.segments, length, length)
        if self.asked:
            weights = generated.softmax(dim=-1, dtype=torch.float32).to(generated.dtype)
        else:
            weights = F.softmax(generated, dim=-1)
        segments = lines.reshape(count, length, self.segments, -1).permute(0, 2, 1, 3)
        return self.project(torch.matmul(weights, segments).permute(0, 2, 1, 3).reshape(count, length, channels))


class _ByBranch(_Block):
    """Rows of the reweighting by (branch, channel)."""

    def forward(self, x: Tensor) -> Tensor:
        images, height, width, channels = x.shape
        turned = x.permute(0, 2, 1, 3).reshape(images * width, height, channels)
        column = self.column(turned).reshape(images, width, height, channels).permute(0, 2, 1, 3)
        row = self.row(x.reshape(images * height, width, channels)).reshape(x.shape)
        channel = self.channel(x)
        mean = (column + row + channel).flatten(1, 2).mean(1)
        logits = self.reweight.fc2(F.gelu(self.reweight.fc1(mean))).reshape(images, 3, 1, 1, channels)
        of_column, of_row, of_channel = F.softmax(logits, dim=1).unbind(1)
        return self.project(column * of_column + row * of_row + channel * of_channel)


def variants(model: DynaMixer) -> dict[str, nn.Module]:
    """The plain model, copies with one layout more changed each, and the model itself."""
    made = {"plain": plain(model)}
    made["rows"] = copy.deepcopy(made["plain"])
    for part in made["rows"].modules():
        if isinstance(part, _Operation):
            side = round(part.generate.bias.numel() ** 0.5)
            _swap(part.generate, side, side)
            part.__class__ = _Turned
    made["shares"] = copy.deepcopy(made["rows"])
    for part in made["shares"].modules():
        if isinstance(part, _Block):
            _swap(part.reweight.fc2, part.project.out_features, 3)
            part.__class__ = _ByBranch
    made["asked"] = copy.deepcopy(made["shares"])
    for part in made["asked"].modules():
        if isinstance(part, _Turned):
            part.asked = True
    return made | {"ours": model}


def _swap(layer: Any, first: int, second: int) -> None:
    """Rows by (first, second) become rows by (second, first)."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.unflatten(0, (first, second)).transpose(0, 1).flatten(0, 1).clone())


def measure() -> dict[str, Any]:
    """Ratios and milliseconds of each variant, eager and compiled."""
    keep_memory()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    model = example_model("dynamixer_nano")
    assert isinstance(model, DynaMixer)
    made, pictures = variants(model), torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(pictures[:8])
        for variant in made.values():
            torch.testing.assert_close(variant(pictures[:8]), expected, atol=1e-5, rtol=1e-4)
    steps = {key: TrainingStep(one, pictures, autocast_of("bf16")) for key, one in made.items()}
    for key, one in made.items():
        compiled: Any = torch.compile(copy.deepcopy(one))
        steps[f"{key}, compiled"] = TrainingStep(compiled, pictures, autocast_of("bf16"))
    taken = in_turn(steps, rounds=ROUNDS)
    rows = []
    for key in made:
        compiled_seconds = taken[f"{key}, compiled"]
        low, middle, high = ratio(taken[key], compiled_seconds)
        own = statistics.median(_loops(steps[f"{key}, compiled"]) for _ in range(ROUNDS))
        rows.append(
            {
                "name": key,
                "eager_ms": 1e3 * statistics.median(taken[key]),
                "compiled_ms": 1e3 * statistics.median(compiled_seconds),
                "loops_ms": own,
                "times": middle,
                "low": low,
                "high": high,
            }
        )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    told = {"command": "python benchmarks/compiled.py", "commit": commit, "about": about()}
    return told | {"batch": BATCH, "rounds": ROUNDS, "rows": rows}


def _loops(step: TrainingStep) -> float:
    """Milliseconds of a step in what the compiler wrote itself."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return 1e-3 * sum(e.self_cpu_time_total for e in profiler.key_averages() if "CompiledFxGraph" in e.key)


def part(found: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| | eager | compiled | of it the compiler's own loops | compiled against eager |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {NAMES[row['name']]} | {row['eager_ms']:.0f} ms | {row['compiled_ms']:.0f} ms | {row['loops_ms']:.0f} ms | "
            f"{row['times']:.2f}x ({row['low']:.2f}-{row['high']:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args().page:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    head, rest = PAGE.read_text(encoding="utf-8").split("<!-- compiled -->\n")
    told = part(json.loads(RESULTS.read_text(encoding="utf-8")))
    PAGE.write_text(f"{head}<!-- compiled -->\n{told}\n{rest[rest.index('<!-- end -->') :]}", encoding="utf-8")


if __name__ == "__main__":
    main()
