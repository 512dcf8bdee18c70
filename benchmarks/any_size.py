"""Accuracy at other picture sizes than the native one, each size scaled down from the same files.

    python benchmarks/any_size.py --data imagenette128/val.parquet --run "64 px=RUN" --run "48-96 px, resampled=RUN" ...

Merges into benchmarks/results/any_size.json and writes the table in docs/adr/0003-any-size.md. The runs are trained by
`dynamixer train --data imagenette128/train.parquet size=64 model.patch_size=8 epochs=24 batch_size=64 lr=2e-3
warmup_epochs=2 crop=rrc scale=0.35 holdout=0 precision=bf16`, those with mixed sizes with `sizes=[48,64,80,96]` or
`sizes=[32,40,48,64,80,96]`, `model.windows=false` where the title says resampled, and `model.enlarge=true precision=fp32`
where it says enlarged.
Evaluated is last.safetensors: nothing is chosen on these pictures.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynamixer
from dynamixer.data import open_data
from dynamixer.data.loading import EvaluationPictures, evaluation_loader
from dynamixer.evaluate import match_classes, measure
from dynamixer.layers import AxisMixer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/any_size.json"
PAGE = ROOT / "docs/adr/0003-any-size.md"
SIZES = (48, 64, 80, 96, 128)
NATIVE = 64
WAYS = ("windows", "resampled", "resizing back to 64")


class ResizeBack(nn.Module):
    """The model on the picture resized to its native size: what one can always do."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (NATIVE, NATIVE), mode="bicubic", antialias=True, align_corners=False)
        y: Tensor = self.model(x)
        return y


def way_of(name: str, model: nn.Module) -> nn.Module:
    if name == WAYS[2]:
        return ResizeBack(model)
    for part in model.modules():
        if isinstance(part, AxisMixer):
            part.windows = name == "windows"
    return model


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    head = "| trained at | other sizes by | " + " | ".join(f"{size} px" for size in SIZES) + " |"
    lines = [head, "|---|---|" + "---|" * len(SIZES)]
    for trained, ways in results.items():
        for way, by_size in ways.items():
            cells = " | ".join(f"{by_size[str(size)]:.1f}" for size in SIZES)
            lines.append(f"| {trained} | {way} | {cells} |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    start, rest = page.split("<!-- any_size.json -->\n")
    _, end = rest.split("\n<!-- end -->")
    PAGE.write_text(f"{start}<!-- any_size.json -->\n{text}\n<!-- end -->{end}", encoding="utf-8")


def accuracies(run: Path, data: str, title: str) -> dict[str, dict[str, float]]:
    checkpoint = dynamixer.load(run / "last.safetensors")
    _, source = open_data(data).for_evaluation()
    source = match_classes(source, checkpoint)
    found: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    for size in SIZES:
        loader = evaluation_loader(EvaluationPictures(source, checkpoint.preprocessing.at(size)), 64, 0)
        for way in WAYS:
            metrics = measure(
                way_of(way, checkpoint.model),
                loader,
                device=torch.device("cpu"),
                images=len(source),
                classes=len(source.classes),
                title=f"{title}, {size} px, {way}",
            )
            found[way][str(size)] = round(metrics.top1, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", action="append", required=True, metavar="TITLE=RUN")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text())["top1"] if RESULTS.exists() else {}
    about = {"torch": torch.__version__, "dynamixer": dynamixer.__version__, "machine": platform.machine(), "seeds": 1}
    for item in options.run:
        title, run = item.split("=", 1)
        results[title] = accuracies(Path(run), options.data, title)
        RESULTS.write_text(json.dumps({"about": about, "top1": results}, indent=2) + "\n", encoding="utf-8")
        write_page(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
