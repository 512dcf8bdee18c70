"""What bf16 and int8 cost in accuracy: the weights of dynamixer_tiny that ship, by the C++ kernels, on new pictures.

    python benchmarks/precision.py --data imagenette128

Writes benchmarks/results/precision.json and the table in docs/speed.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dynamixer
from dynamixer.data import open_data
from dynamixer.evaluate import match_classes
from dynamixer.speed.bench import about
from dynamixer.speed.fast import PRECISIONS, optimize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/precision.json"
PAGE = ROOT / "docs/speed.md"
BATCH = 50


def measured(data: str) -> list[dict[str, Any]]:
    checkpoint = dynamixer.load("dynamixer_tiny")
    source = match_classes(open_data(data).for_evaluation()[1], checkpoint)
    transform = checkpoint.preprocessing.transform()
    pictures = torch.stack([transform(source.picture(number)) for number in range(len(source))])
    labels = torch.as_tensor(source.labels)
    model = checkpoint.model.eval()
    with torch.inference_mode():
        expected = torch.cat([model(part) for part in torch.split(pictures, BATCH)])

    def row(name: str, logits: Tensor) -> dict[str, Any]:
        return {
            "precision": name,
            "pictures": len(labels),
            "accuracy": round(100 * float((logits.argmax(1) == labels).float().mean()), 2),
            "agreement": round(100 * float((logits.argmax(1) == expected.argmax(1)).float().mean()), 2),
            "largest_difference": round(float((logits - expected).abs().max()), 4),
        }

    rows = [row("the model", expected)]
    for precision in PRECISIONS[1:]:
        fast = optimize(model, pictures[:BATCH], way="kernel", precision=precision)  # type: ignore[arg-type]
        rows.append(row(precision, fast(pictures)))
    return rows


def part(found: dict[str, Any]) -> str:
    """What stands between the marks of the page."""
    rows = [
        f"| {row['precision']} | {row['accuracy']:.2f} % | {row['agreement']:.2f} % | {row['largest_difference']:.4f} |"
        for row in found["rows"]
    ]
    first = found["rows"][0]
    today = abs(dynamixer.load("dynamixer_tiny").trained["test"]["top1"] - first["accuracy"]) < 0.05
    weights = "as it ships" if today else "with weights that shipped earlier"
    title = f"`dynamixer_tiny` {weights}, {first['pictures']:,} pictures of Imagenette's validation split, by the C++ kernels:"
    head = ["| | top-1 | the same class as the model | largest difference of a logit |", "|---|---|---|---|"]
    return "\n".join([title, "", *head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    found = {"about": about(), "rows": measured(parser.parse_args().data)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split("<!-- precision -->\n")
    PAGE.write_text(f"{head}<!-- precision -->\n{part(found)}\n{rest[rest.index('<!-- end -->') :]}", encoding="utf-8")


if __name__ == "__main__":
    main()
