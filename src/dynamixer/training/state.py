"""What a run knows of itself: its state, as checkpoints keep it, and its result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a run came to: accuracies in percent on the held-out pictures, of the epoch that was best there."""

    run: Path
    parameters: int
    best_epoch: int
    top1: float | None
    top5: float | None
    seconds: float  # of this process; an interrupted run took longer
    steps: int
    skipped: int  # steps left out because something was not finite
    bad_images: int
    data_wait: (
        float | None
    )  # share of the training time spent waiting for pictures, in percent; None if nothing was left to do

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return self.__dict__ | {"run": str(self.run)}


@dataclass
class State:
    """All of a run besides tensors, as a checkpoint keeps it."""

    step: int = 0  # steps behind us, skipped ones included
    updates: int = 0  # of the weights
    skipped: int = 0
    skipped_in_a_row: int = 0
    scaler_skips: int = 0  # fp16: steps left out to find a scale
    scaler: dict[str, Any] = field(default_factory=dict)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, right, seen in this epoch
    bad: list[str] = field(default_factory=list)  # sentences about pictures that could not be read
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.csv
    best: int = -1  # index of the best row
    best_tally: dict[str, Any] = field(default_factory=dict)
