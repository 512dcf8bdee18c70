"""Runs `dynamixer bench` as docs/speed.md shows it, and writes the tables into the page.

python benchmarks/speed.py            measure (a quarter of an hour on two cores) and write
python benchmarks/speed.py --page     write the page from the results that are there
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from dynamixer.speed.report import roofline, scale_table, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
RUNS = {
    "speed-s": "bench dynamixer_s --batch 8 --rounds 7 --peers",
    "speed-nano": "bench dynamixer_nano --batch 256 --rounds 7 --peers",
    "speed-timm": "bench dynamixer_tiny resnet18 --size 128 --batch 8 --rounds 7",
}
SCALE = "bench dynamixer_s --batch 8 --scale"


def speed_tables() -> str:
    """The tables of all runs, each under its command."""
    parts = []
    for name, command in RUNS.items():
        found = json.loads((RESULTS / f"{name}.json").read_text())
        about = found["about"]
        machine = f"{about['cores']} cores with {about['vectors']}, torch {about['torch']}"
        parts.append(f"`dynamixer {command}` ({machine}):\n\n{table(found)}")
    return "\n\n".join(parts)


def scale_page() -> str:
    """The table of `--scale` under its command."""
    return f"`dynamixer {SCALE}`:\n\n{scale_table(json.loads((RESULTS / 'speed-scale.json').read_text()))}"


def between(text: str, mark: str, new: str) -> str:
    """The page with what stands between a mark and the next end replaced."""
    head, rest = text.split(f"<!-- {mark} -->\n")
    return f"{head}<!-- {mark} -->\n{new}\n{rest[rest.index('<!-- end -->') :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    if not parser.parse_args().page:
        for name, command in (*RUNS.items(), ("speed-scale", SCALE)):
            words = [*shlex.split(command), "--out", str(RESULTS / f"{name}.json")]
            subprocess.run([sys.executable, "-m", "dynamixer", *words], check=True)
    page = ROOT / "docs/speed.md"
    text = between(page.read_text(), "speed.json", speed_tables())
    page.write_text(between(text, "scale.json", scale_page()))
    found = [json.loads((RESULTS / f"{name}.json").read_text()) for name in ("speed-nano", "speed-s")]
    roofline(
        found[0] | {"models": [model for one in found for model in one["models"]]}, ROOT / "docs/images/roofline.png"
    )


if __name__ == "__main__":
    main()
