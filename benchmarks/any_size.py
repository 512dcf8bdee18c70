"""Accuracy at other picture sizes than the trained one, each size scaled down from the same files.

    python benchmarks/any_size.py --data imagenette128/val.parquet --single RUN --mixed RUN

Writes benchmarks/results/any_size.json and the table in docs/adr/0003-any-size.md. The two runs are trained by
`dynamixer train --data imagenette128/train.parquet size=64 model.patch_size=8 epochs=24 batch_size=64 lr=2e-3
warmup_epochs=2 crop=rrc scale=0.35 holdout=0 precision=bf16`, the mixed one with `sizes=[48,64,80,96]` added.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

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


class ResizeBack(nn.Module):
    """The model on the picture resized to its native size: what one can always do."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (NATIVE, NATIVE), mode="bicubic", antialias=True, align_corners=False)
        y: Tensor = self.model(x)
        return y


def windowed(self: AxisMixer, x: Tensor) -> Tensor:
    """Longer lines in windows of the native length, evenly spread, averaged where they overlap (the paper's proposal)."""
    length, real = self.length, x.shape[-2]
    if real <= length:
        return AxisMixer_forward(self, x)
    count = -(-real // length)
    starts = [round(i * (real - length) / (count - 1)) for i in range(count)]
    total, times = torch.zeros_like(x), torch.zeros(real, 1)
    for start in starts:
        part = slice(start, start + length)
        total[..., part, :] += AxisMixer_forward(self, x[..., part, :])
        times[part] += 1
    return total / times


AxisMixer_forward: Callable[[AxisMixer, Tensor], Tensor] = AxisMixer.forward


@contextmanager
def windows() -> Iterator[None]:
    AxisMixer.forward = windowed  # type: ignore[method-assign]
    try:
        yield
    finally:
        AxisMixer.forward = AxisMixer_forward  # type: ignore[method-assign, assignment]


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


def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, int]], images: int, classes: int, title: str) -> float:
    metrics = measure(model, loader, device=torch.device("cpu"), images=images, classes=classes, title=title)
    return round(metrics.top1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--single", type=Path, required=True)
    parser.add_argument("--mixed", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for trained, run in (("64 px", options.single), ("48, 64, 80 and 96 px", options.mixed)):
        checkpoint = dynamixer.load(run / "last.safetensors")
        _, source = open_data(options.data).for_evaluation()
        source = match_classes(source, checkpoint)
        ways = results.setdefault(trained, {"resampled logits": {}, "windows": {}, "resizing back to 64": {}})
        for size in SIZES:
            pictures = EvaluationPictures(source, checkpoint.preprocessing.at(size))
            loader, title = evaluation_loader(pictures, 64, 0), f"{trained}, seen at {size}"
            common = (len(source), len(source.classes), title)
            ways["resampled logits"][str(size)] = accuracy(checkpoint.model, loader, *common)
            with windows():
                ways["windows"][str(size)] = accuracy(checkpoint.model, loader, *common)
            ways["resizing back to 64"][str(size)] = accuracy(ResizeBack(checkpoint.model), loader, *common)
    about = {"torch": torch.__version__, "dynamixer": dynamixer.__version__, "machine": platform.machine(), "seeds": 1}
    RESULTS.write_text(json.dumps({"about": about, "top1": results}, indent=2) + "\n", encoding="utf-8")
    write_page(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
