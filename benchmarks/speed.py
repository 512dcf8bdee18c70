"""Runs `dynamixer bench` as docs/speed.md shows it, and writes tables, goals and the roofline into the page.

python benchmarks/speed.py            measure (twenty minutes to half an hour on two cores that multiply bf16) and write
python benchmarks/speed.py NAME...    measure only these, such as parts-s, and write
python benchmarks/speed.py --page     write the page from the results that are there
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dynamixer.models import count
from dynamixer.models.checkpoint import create_model
from dynamixer.speed.report import parts_table, roofline, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
RUNS = {
    "speed-s": "bench dynamixer_s --precision bf16 --batch 8 --train-batch 16 --rounds 7 --compile --ways --peers",
    "speed-nano": "bench dynamixer_nano --precision bf16 --batch 256 --rounds 9 --compile --ways --peers",
    "speed-s-fp32": "bench dynamixer_s --batch 8 --rounds 7 --no-train --ways",
    "speed-nano-fp32": "bench dynamixer_nano --batch 256 --rounds 7 --no-train --ways",
}
PROFILES = {
    "parts-s": "bench dynamixer_s --precision bf16 --batch 8 --train-batch 16 --parts",
    "parts-nano": "bench dynamixer_nano --precision bf16 --batch 256 --parts",
}
BF16 = ("speed-s", "speed-nano")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    commands = RUNS | PROFILES
    parser.add_argument("names", nargs="*", choices=[*commands, []], metavar="NAME", help=", ".join(commands))
    told = parser.parse_args()
    if told.page and told.names:
        parser.error("--page measures nothing: leave the names out.")
    for name in [] if told.page else told.names or commands:
        _measure(name, commands[name])
    found = [_read(name) for name in BF16]
    page = ROOT / "docs/speed.md"
    text = page.read_text(encoding="utf-8")
    for mark, new in parts().items():
        head, rest = text.split(f"<!-- {mark} -->\n")
        text = f"{head}<!-- {mark} -->\n{new}\n{rest[rest.index('<!-- end -->') :]}"
    page.write_text(text, encoding="utf-8")
    roofline(
        found[0] | {"models": [model for one in found for model in one["models"]]}, ROOT / "docs/images/roofline.png"
    )


def parts() -> dict[str, str]:
    """What stands between each pair of marks in the page."""
    return {"speed": _tables(RUNS, table), "parts": _tables(PROFILES, parts_table), "goals": _goals()}


def _measure(name: str, command: str) -> None:
    out = RESULTS / f"{name}.json"
    subprocess.run([sys.executable, "-m", "dynamixer", *shlex.split(command), "--out", str(out)], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    about = {"command": f"dynamixer {command}", "commit": commit.stdout.strip()}
    found = json.loads(out.read_text(encoding="utf-8"))
    out.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _tables(names: Iterable[str], told_as: Callable[[Any], str]) -> str:
    told = []
    for name in names:
        found = _read(name)
        about = found["about"]
        machine = f"{about['processor']}, {about['cores']} cores with {about['vectors']}, torch {about['torch']}"
        told.append(f"`{found['command']}` ({machine}, commit {found['commit'][:7]}):\n\n{told_as(found)}")
    return "\n\n".join(told)


def _goals() -> str:
    """What was aimed at beside what these runs reached."""
    s, nano, s32, nano32 = (_read(name)["models"][0] for name in RUNS)

    def times(model: dict[str, Any], kind: str, name: str, against: str = "plain") -> str:
        rows = model[kind]
        if not {name, against} <= rows.keys():
            return "not run"
        return f"{rows[name]['times_baseline'] / rows[against]['times_baseline']:.2f}x"

    def both(kind: str, name: str, against: str = "plain") -> tuple[str, str]:
        return times(s, kind, name, against), times(nano, kind, name, against)

    def share(model: dict[str, Any], kind: str = "inference", name: str = "fast") -> str:
        ceiling = model["ceiling" if kind == "inference" else "training_ceiling"]
        return f"{100 * model[kind][name]['images_per_s'] / ceiling['images_per_s']:.0f} %"

    def kept(model: dict[str, Any]) -> str:
        return f"{model['training']['kernel']['kept_mib'] / model['training']['plain']['kept_mib']:.2f}x"

    def peak(model: dict[str, Any]) -> str:
        held = 3 * 4 * model["parameters"] / 2**20  # weights and AdamW's two means, which the peak is beyond
        ours, plain = (held + model["training"][name]["peak_mib"] for name in ("kernel", "plain"))
        return f"{ours / plain:.2f}x"

    def bound(model: dict[str, Any], kind: str, ceiling: str) -> str:
        return f"{model[ceiling]['images_per_s'] / model[kind]['plain']['images_per_s']:.2f}x"

    def profiled(what: str, *, at_best: bool = False) -> list[str]:
        """Shares of the products alone in profiled runs; `at_best` if what holds products took no longer than these."""
        shares = []
        for name in PROFILES:
            one = next(one for one in _read(name)["profiles"] if one["what"] == what)
            rate = one["bound_gflop_per_s"]
            gained = sum(p["ms"] * (1 - p["gflop_per_s"] / rate) for p in one["parts"] if "gflop_per_s" in p)
            shares.append(f"{100 * one['bound_ms'] / (one['ms'] - gained * at_best):.0f} %")
        return shares

    def arithmetic(name: str) -> str:
        static, dynamic = (count(create_model(name, generator=kind, device="meta")) for kind in ("static", "dynamic"))
        return f"{static.multiply_adds / dynamic.multiply_adds:.2f}x"

    rows = [
        ("inference, bf16, against the plain way", "2.0x", *both("inference", "fast")),
        ("against the plain way compiled with frozen weights", "1.25x", *both("inference", "fast", "plain, compiled")),
        ("share of the ceiling, bf16", "85 %", share(s), share(nano)),
        ("the same, profiled", "", *profiled("inference")),
        ("with all but products free inside operations", "", *profiled("inference", at_best=True)),
        ("inference, fp32, against the plain way", "1.8x", times(s32, "inference", "fast"), times(nano32, "inference", "fast")),
        ("its bound: the products alone", "", *(bound(m, "inference", "ceiling") for m in (s32, nano32))),
        ("int8 against our bf16", "1.3x", *both("inference", "fast, int8", "fast")),
        ("batch 1, bf16, against the plain way", "1.5x", *both("latency", "fast")),
        ("training step, bf16, against the plain way", "1.8x, nano 2.0x", *both("training", "kernel")),
        ("its bound: the products alone", "", *(bound(m, "training", "training_ceiling") for m in (s, nano))),
        ("share of the ceiling of a training step", "", *(share(m, "training", "kernel") for m in (s, nano))),
        ("the same, profiled", "", *profiled("training step")),
        ("with all but products free inside operations", "", *profiled("training step", at_best=True)),
        ("peak memory of the step, weights and optimiser included", "0.65x", peak(s), peak(nano)),
        ("memory kept for the backward pass", "", kept(s), kept(nano)),
        ("training step against static matrices without softmax", "0.90x, nano 0.85x", *both("training", "kernel", "static")),
        ("the same without the softmax", "0.95x", *both("training", "no softmax", "static")),
        ("its bound: multiply-adds of static over dynamic", "", *(arithmetic(m["model"]) for m in (s, nano))),
        ("compiled training step of the published layout against it eager", "1x", *both("training", "plain, compiled")),
        ("of ours", "1x", *both("training", "eager, compiled", "eager")),
        ("second start: seconds from model to answer", "5", *(f"{m['start']['ready_to_first_answer_s']:.1f}" for m in (s, nano))),
    ]  # fmt: skip
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["| | aimed at | S | nano |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    main()
