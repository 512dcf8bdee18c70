"""Runs `dynamixer bench` as docs/speed.md shows it, and writes tables, goals and the roofline into the page.

python benchmarks/speed.py            measure (a quarter of an hour on two cores) and write
python benchmarks/speed.py --page     write the page from the results that are there
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from dynamixer.speed.report import roofline, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
RUNS = {
    "speed-s": "bench dynamixer_s --batch 8 --rounds 5 --peers",
    "speed-nano": "bench dynamixer_nano --batch 256 --rounds 7 --peers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args().page:
        for name, command in RUNS.items():
            _measure(name, command)
    page = ROOT / "docs/speed.md"
    text = page.read_text(encoding="utf-8")
    for mark, new in parts().items():
        head, rest = text.split(f"<!-- {mark} -->\n")
        text = f"{head}<!-- {mark} -->\n{new}\n{rest[rest.index('<!-- end -->') :]}"
    page.write_text(text, encoding="utf-8")
    found = [_read(name) for name in RUNS]
    roofline(
        found[0] | {"models": [model for one in found for model in one["models"]]}, ROOT / "docs/images/roofline.png"
    )


def parts() -> dict[str, str]:
    """What stands between each pair of marks in the page."""
    return {"speed": _tables(), "goals": _goals()}


def _measure(name: str, command: str) -> None:
    out = RESULTS / f"{name}.json"
    subprocess.run([sys.executable, "-m", "dynamixer", *shlex.split(command), "--out", str(out)], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    about = {"command": f"dynamixer {command}", "commit": commit.stdout.strip()}
    found = json.loads(out.read_text(encoding="utf-8"))
    out.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _tables() -> str:
    told = []
    for name in RUNS:
        found = _read(name)
        about = found["about"]
        machine = (
            f"{about['cores']} cores with {about['vectors']}, torch {about['torch']}, commit {found['commit'][:7]}"
        )
        told.append(f"`{found['command']}` ({machine}):\n\n{table(found)}")
    return "\n\n".join(told)


def _goals() -> str:
    """What was aimed at beside what these runs in fp32 reached."""
    s, nano = (_read(name)["models"][0] for name in RUNS)

    def times(model: dict[str, Any], kind: str, name: str, against: str | None = None) -> str:
        rows = model[kind]
        over = rows[against]["times_baseline"] if against else 1.0
        return f"{rows[name]['times_baseline'] / over:.2f}x"

    def share(model: dict[str, Any]) -> str:
        return f"{100 * model['inference']['fast']['images_per_s'] / model['ceiling']['images_per_s']:.0f} %"

    def kept(model: dict[str, Any]) -> str:
        return f"{model['training']['kernel']['kept_mib'] / model['training']['plain']['kept_mib']:.2f}x"

    rows = [
        ("inference against the plain way", "fp32 1.8x, bf16 2.0x", *(times(m, "inference", "fast") for m in (s, nano))),
        ("share of the ceiling", "bf16 85 %", share(s), share(nano)),
        ("batch 1 against the plain way", "bf16 1.5x", *(times(m, "latency", "fast") for m in (s, nano))),
        ("training step against the plain way", "bf16 1.8x, nano 2.0x", *(times(m, "training", "kernel") for m in (s, nano))),
        ("memory kept for the backward pass", "bf16 0.65x", kept(s), kept(nano)),
        ("training step against static matrices without softmax", "0.90x, nano 0.85x",
         *(times(m, "training", "kernel", "static") for m in (s, nano))),
        ("the same without the softmax", "0.95x", *(times(m, "training", "no softmax", "static") for m in (s, nano))),
        ("second start, seconds to the first answer", "5", *(f"{m['start']['ready_to_first_answer_s']:.1f}" for m in (s, nano))),
    ]  # fmt: skip
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["| | aimed at | S | nano |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    main()
