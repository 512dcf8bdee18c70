"""Put a trained run into the package, its card included, measured on test pictures.

    python tools/ship.py RUN [RUN...] --test D --data NAME

Of several runs, each started from the weights of the one before it, the last one ships, and the card has the recipes of all. Its
classifier is scaled so that the cross-entropy of pictures held out of its training is least, which changes no answer, only how
sure it is (temperature scaling, Guo et al. 2017). The card's figures are those of the weights in fp32; they are stored in fp16
where that changes the accuracy by at most 0.05 points. RUN's file is left as it is. Where the last one was distilled, its teacher
and the last run that was not are measured as well.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

import dynamixer
import teacher  # noqa: F401 - its network is registered
from dynamixer.data.loading import EvaluationPictures, batches, evaluation_loader
from dynamixer.errors import UserError
from dynamixer.evaluate import measure
from dynamixer.hub import _recipe, write_folder
from dynamixer.models.checkpoint import Checkpoint, save_checkpoint
from dynamixer.models.download import WEIGHTS
from dynamixer.models.shipped import FOLDER, names
from dynamixer.models.variants import VARIANTS
from dynamixer.training import TrainConfig
from dynamixer.training.resolve import resolve
from dynamixer.training.setup import prepare_data

ALLOWED = 0.05  # points of top-1 that fp16 may cost
OTHERS = ("undistilled_top1", "teacher_top1")  # in percent of the test pictures
OF_TRAINING = {"drop_path_rate", "drop_rate"}

PAGES = [FOLDER.parents[2] / "README.md", FOLDER.parents[2] / "docs/models.md"]
MARKS = re.compile("(<!-- weights -->\n).*?\n?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """What ships, for the pages."""
    lines = [
        "| weights | data | top-1 of test pictures | before distillation | teacher | size |",
        "|---|---|---|---|---|---|",
    ]
    for name in names():
        checkpoint = dynamixer.load(name)
        trained, size = checkpoint.trained, checkpoint.path.stat().st_size / 1e6
        test = trained["test"]
        others = " | ".join(f"{trained[key]:.2f} %" if key in trained else "none" for key in OTHERS)
        lines.append(
            f"| {name} | {trained['data']} | {test['top1']:.2f} % of {test['images']:,} | {others} | {size:.1f} MB |"
        )
    return "\n".join(lines)


def changed(run: str) -> dict[str, object]:
    """The keys of a run's recipe that are not the default."""
    default = TrainConfig().to_dict()
    return {key: value for key, value in _recipe(Path(run) / "config.yaml").items() if value != default[key]}


def compared(runs: list[str]) -> dict[str, str]:
    """What to measure beside a distilled run: the last run that was not, and its teacher."""
    teachers = {run: resolve(file=Path(run) / "config.yaml")[0].teacher for run in runs}
    mine = teachers[runs[-1]]
    if mine is None:
        return {}
    return dict(zip(OTHERS, ([run for run in runs if teachers[run] is None][-1], mine), strict=True))


@torch.inference_mode()
def calibrate(checkpoint: Checkpoint, run: str) -> tuple[float, dict[str, float]]:
    """Scale the classifier by what the held-out pictures' cross-entropy is least with; the factor, and their figures then."""
    data = prepare_data(resolve(file=Path(run) / "config.yaml")[0])
    if data.val is None or data.val_indices is None:
        raise UserError(f"{run} held out no pictures, which say how sure to be: train with holdout.")
    held = evaluation_loader(EvaluationPictures(data.val, checkpoint.preprocessing, data.val_indices), 50, 0)
    model = checkpoint.model.eval()
    answers = [(model(pictures), labels) for pictures, labels, _ in batches(held)]
    logits, labels = (torch.cat(part) for part in zip(*answers, strict=True))
    factor = float(
        minimize_scalar(lambda f: cross_entropy(f * logits, labels).item(), bounds=(0.1, 10), method="bounded").x
    )
    for part in model.get_submodule("head").parameters():
        part.mul_(factor)
    metrics = measure(model, held, device=logits.device, images=len(labels), classes=len(checkpoint.classes))
    return factor, metrics.summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--test", required=True, help="data set that was not trained on, with labels")
    parser.add_argument("--data", required=True, help="what the card calls the data")
    asked = parser.parse_args()
    checkpoint = dynamixer.load(asked.runs[-1])
    variant = vars(VARIANTS[checkpoint.name])
    built = {"num_classes": len(checkpoint.classes)}
    other = {k: v for k, v in checkpoint.args.items() if k not in OF_TRAINING and variant.get(k) != v}
    if other:
        parser.error(f"{checkpoint.path} is not of {checkpoint.name} as its name alone builds it: {other}")
    factor, held = calibrate(checkpoint, asked.runs[-1])
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / checkpoint.name / WEIGHTS
        about: dict[str, Any] = {
            "name": checkpoint.name, "args": built, "classes": checkpoint.classes, "preprocessing": checkpoint.preprocessing,
            "trained": checkpoint.trained | {"data": asked.data, "held_out": held},
        }  # fmt: skip
        save_checkpoint(staged, checkpoint.model.state_dict(), **about)
        whole = dynamixer.evaluate(staged, asked.test)
        about["trained"]["test"] = {key: whole[key] for key in held}
        others = compared(asked.runs)
        size = checkpoint.preprocessing.size  # a teacher may have been trained at another
        about["trained"] |= {key: dynamixer.evaluate(run, asked.test, size=size)["top1"] for key, run in others.items()}
        save_checkpoint(staged, checkpoint.model.state_dict(), **about)
        runs = list(asked.runs)
        if others:  # the teacher before the first that it taught
            runs.insert(runs.index(others["undistilled_top1"]) + 1, others["teacher_top1"])
        recipes = {Path(run).name: changed(run) for run in runs}
        recipes["afterwards"] = {"classifier_times": round(factor, 3)}
        options: dict[str, Any] = {"name": checkpoint.name, "recipe": recipes}
        folder = write_folder(staged, FOLDER / checkpoint.name, half=True, **options)
        lost = abs(dynamixer.evaluate(folder, asked.test)["top1"] - whole["top1"])
        if lost > ALLOWED:
            write_folder(staged, FOLDER / checkpoint.name, **options)
    for page in PAGES:
        page.write_text(MARKS.sub(rf"\g<1>{table()}\n\2", page.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    stored = (folder / WEIGHTS).stat().st_size / 1e6
    print(f"{folder}: {whole['top1']:.2f} % of {whole['images']:,}, fp16 changes it by {lost:.2f}, {stored:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
