"""One of two processes that torchrun starts: a NaN in its pictures, loss or gradient on rank 1 only. Run by test_engine.py."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

import dynamixer
from poison import Poison

out = Path(sys.argv[1])
patch = pytest.MonkeyPatch()
poisons = [
    Poison(patch, {number}, where, everywhere=False) for number, where in ((1, "input"), (2, "loss"), (3, "gradient"))
]
config = dynamixer.TrainConfig(
    model_args={"patch_size": 8, "depths": (1, 1), "dims": (16, 32), "segments": (2, 4)},
    epochs=2, limit_train=192, batch_size=64, crop="none", holdout=0.0, ema=0.9, device="cpu", track="none",
)  # fmt: skip
result = dynamixer.train(config, out / "run")
weights = dynamixer.load(result.run / "last.safetensors").model.state_dict()
digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()
found = {"changed": poisons[0].changed, "skipped": result.skipped, "weights": digest}
Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
