"""The run folder: what a run leaves for people, besides its checkpoints."""

import csv
import io
import json
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dynamixer.errors import RunError, UserError
from dynamixer.evaluate import Metrics, Tally
from dynamixer.files import is_leftover, reason, whole_file, write_text
from dynamixer.lock import locked, unlock
from dynamixer.logs import log
from dynamixer.models.checkpoint import save_checkpoint
from dynamixer.progress import Meter
from dynamixer.training.config import TrainConfig
from dynamixer.training.environment import environment
from dynamixer.training.report import write_report
from dynamixer.training.setup import Data, Network, check_folder
from dynamixer.training.world import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATIENCE = 15.0  # seconds: workers that load pictures hold the lock of a killed run until they have noticed
FIGURES = {  # the heading and what is seen
    "confusion": ("Confusion matrix", "Of each true class, the share given to each class."),
    "confused_pairs": ("Most frequent confusions", "Held-out pictures of one class taken for another."),
    "confused": ("Most confidently wrong", "The held-out pictures that the model is surest of, and wrong about."),
    "calibration": ("Calibration", "How often the model is right when it says how sure it is."),
}


class RunFolder:
    """config.yaml, environment.json, metrics.csv, timing.csv, weights, pictures and report.html of a run.

    Only the main process calls what writes. metrics.csv and weights are the same, byte for byte, for every run of a
    configuration; what is not (times, hosts, throughput) is in timing.csv and environment.json.
    """

    def __init__(self, run: Path, config: TrainConfig, world: World, data: Data, network: Network):
        self.run, self.config, self.world, self.data, self.network = run, config, world, data, network
        self.parameters = sum(p.numel() for p in network.model.parameters())
        self.times: list[dict[str, Any]] = []
        self.begun = self.wrote = False
        self.held: int | None = None
        self.identity = secrets.token_hex(8)  # by which trackers know the run again, whatever its folder is called

    def describe(self, done: int) -> str:
        """One sentence about what is going to run."""
        c, d = self.config, self.data
        held = 0 if d.val_indices is None else len(d.val_indices)
        count = len(d.train_indices)
        batch = min(c.batch_size, count)
        steps = f"{count // batch} steps of {batch}" + (f" and {count % batch} left over" if count % batch else "")
        if not held:
            log("nothing is held out: the last epoch counts as the best")
        return (
            f"{self.network.name}, {self.parameters:,} parameters, {len(d.train.classes)} classes; "
            f"{count:,} training pictures ({steps} in each epoch), {held:,} held out; "
            f"{c.epochs - done} of {c.epochs} epochs to go"
            f"{f'; {self.world.size} processes' if self.world.size > 1 else ''}; run folder {self.run}"
        )

    def _curves(self, rows: list[dict[str, Any]]) -> "Figure":
        from dynamixer import plots  # noqa: PLC0415 - matplotlib takes a second to import

        c = self.config
        special = ["augmented", *(["smoothed labels"] if c.label_smoothing else [])]
        special += [*(["mixed"] if c.mixup or c.cutmix else []), *(["with a teacher"] if c.teacher else [])]
        return plots.curves_picture(rows, self._title, ", ".join(special))

    def begin(self) -> None:
        """Write what the run is, before the first of its results: a run that fails earlier leaves no folder behind."""
        if self.begun:
            return
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.run} could not be made: {reason(error)}.") from None
        new = self.held is None
        self._hold()
        if new and (self.run / "config.yaml").exists():
            raise UserError(
                f"another process has begun a run in {self.run} meanwhile: give another --out, or go on with that one."
            )
        write_text(self.run / "config.yaml", self.config.to_yaml())
        write_text(self.run / "environment.json", json.dumps(self._environment(), indent=2) + "\n")
        self.begun = True

    def _environment(self) -> dict[str, Any]:
        """What this process computes by, and under `earlier` what those before it did where that was something else."""
        now = environment(self.world.device, self.world.size) | {"identity": self.identity}
        before = self._noted()
        if not before:
            return now
        earlier = before.pop("earlier", [])
        if before.get("processes") != now["processes"] and (
            self.config.mixup or self.config.cutmix or self.config.drop_path
        ):
            log("the number of processes is another than before: mixup, CutMix and drop path draw others from here on")
        return now | {"earlier": [*earlier, *([before] if before != now else [])]}

    def _noted(self) -> dict[str, Any]:
        """The environment.json of the process before this one, empty if there is none to be read."""
        try:
            before = json.loads((self.run / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return before if isinstance(before, dict) else {}

    def take_up(self) -> None:
        """Take up the identity and the times of the run's earlier part, and clear away what a kill left half-written.

        Raises:
            UserError: another process trains in this folder, or has made another run of it while it was waited for.
        """
        if not self.run.exists():
            return
        self._hold()
        check_folder(self.run, self.config, "auto")
        for path in self.run.glob(".*"):
            if is_leftover(path):
                path.unlink()
        self.identity = str(self._noted().get("identity", self.identity))
        if (self.run / "timing.csv").exists():
            with (self.run / "timing.csv").open(encoding="utf-8", newline="") as file:
                self.times = list(csv.DictReader(file))

    def _hold(self) -> None:
        """Keep other processes from training in this folder, until `release`."""
        if self.held is not None:
            return
        file = os.open(self.run, os.O_RDONLY | os.O_CLOEXEC)
        if not locked(file):
            log(f"another process holds {self.run}: waiting {PATIENCE:.0f} seconds, which is enough if it was killed")
        if not locked(file, PATIENCE):
            os.close(file)
            raise UserError(f"another process trains in {self.run}: wait for it, stop it, or give another --out.")
        self.held = file

    def release(self) -> None:
        """Let other processes train in this folder."""
        if self.held is not None:
            unlock(self.held)
            self.held = None

    def time(self, epoch: int, meter: Meter, waited: float, trained: float) -> None:
        """Note how fast an epoch, or the part of it since a resumption, was."""
        pictures = meter.done - meter.first
        if not pictures:
            return
        self.times.append(
            {
                "epoch": epoch + 1,
                "pictures": pictures,
                "seconds": round(meter.seconds, 3),
                "images_per_s": round(meter.rate, 2),
                "data_wait_percent": round(100 * waited / max(trained, 1e-9), 2),
                "processes": self.world.size,
            }
        )

    def write_times(self) -> None:
        """What `time` has noted."""
        write_text(self.run / "timing.csv", _csv(self.times))

    def write_epoch(
        self, rows: list[dict[str, Any]], weights: Mapping[str, Tensor], metrics: Metrics | None, *, best: bool
    ) -> None:
        """All that an epoch leaves, the weights first, so that metrics.csv never speaks of weights that are not there."""
        self.wrote = True
        self.begin()
        trained = {
            "data": Path(self.config.data).name,
            "epoch": len(rows),
            "epochs": self.config.epochs,
            "seed": self.config.seed,
            "averaged": self.config.ema is not None,
            "held_out": metrics.summary() if metrics else None,
            "train_split": self.data.train_split,
        }
        for name in ["last.safetensors", *(["best.safetensors"] if best else [])]:
            save_checkpoint(
                self.run / name,
                weights,
                name=self.network.name,
                args=self.network.args,
                classes=self.data.train.classes,
                preprocessing=self.network.preprocessing,
                trained=trained,
            )
        write_text(self.run / "metrics.csv", _csv(rows))
        self.write_times()
        self._picture("curves.png", self._curves(rows))
        row, rate = rows[-1], self.times[-1]["images_per_s"] if self.times else 0
        held = f"  held out {row['val_top1']:.2f} % (loss {row['val_loss']:.3f})" if "val_top1" in row else ""
        log(
            f"epoch {row['epoch']}/{self.config.epochs}  loss {row['train_loss']:.3f}  training {row['train_top1']:.2f} %"
            f"{held}  {float(rate):.0f} images/s"
        )

    def finish(self, rows: list[dict[str, Any]], best: int, found: Tally | None) -> None:
        """The pictures of the best epoch, and the report; what an earlier call finished is left alone."""
        if not self.wrote and (self.run / "report.html").exists():
            return
        figures = [("Curves", "Loss and accuracy by epoch.", self._picture("curves.png", self._curves(rows)))]
        headline: dict[str, object] = {"parameters": f"{self.parameters:,}", "best epoch": f"{best + 1} of {len(rows)}"}
        if found is not None:
            metrics, classes = found.metrics(), self.data.train.classes
            headline = {
                "top-1 held out": f"{metrics.top1:.2f} %",
                "top-5": f"{metrics.top5:.2f} %",
                "calibration error": f"{metrics.ece:.2f} %",
                **headline,
            }
            from dynamixer import plots  # noqa: PLC0415 - matplotlib takes a second to import

            drawn = {
                "confusion": plots.confusion_picture(metrics.confusion, classes),
                "confused_pairs": plots.confused_pairs_picture(metrics.confusion, classes),
                "confused": self._wrong(metrics),
                "calibration": plots.reliability_picture(metrics.bins, metrics.ece),
            }
            figures += [(*FIGURES[name], self._picture(f"{name}.png", figure)) for name, figure in drawn.items()]
        write_report(
            self.run / "report.html",
            title=self._title,
            summary=headline,
            config=self.config.to_dict(),
            rows=rows,
            figures=figures,
        )
        log(f"report: {self.run / 'report.html'}")

    def _wrong(self, metrics: Metrics) -> "Figure":
        from dynamixer import plots  # noqa: PLC0415 - matplotlib takes a second to import

        source, classes = self.data.val, self.data.train.classes
        return plots.confused_sheet(
            [(source.picture(n), classes[t], classes[p], share) for n, t, p, share in metrics.wrong] if source else []
        )

    @property
    def _title(self) -> str:
        return f"{self.network.name} on {Path(self.config.data).name}"

    def _picture(self, name: str, figure: "Figure") -> bytes:
        with whole_file(self.run / name) as temporary, warnings.catch_warnings():
            # A class name in a script that the font lacks is drawn as boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(temporary, format="png")
        return (self.run / name).read_bytes()


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
