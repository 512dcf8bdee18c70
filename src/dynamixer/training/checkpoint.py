"""Checkpoints of a run: folders that appear whole or not at all, of safetensors and JSON, with a digest of every file.

A checkpoint is written aside as `checkpoints/.writing`, synchronised, and renamed to `checkpoints/step-00000200`; the last
two are kept. `manifest.json` holds the sha256 of every other file and is itself compared byte for byte.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from dynamixer.errors import RunError
from dynamixer.files import reason
from dynamixer.logs import log
from dynamixer.training.world import World

TENSORS, STATE, MANIFEST, ASIDE = "tensors.safetensors", "state.json", "manifest.json", ".writing"
KEPT = 2


class Checkpoints:
    """The checkpoints of a run folder.

    Args:
        run: the run folder; with several processes, one that all of them see.
        world: the processes that write and read together.
        sharded: whether tensors are DTensors, of which every process writes its own part.
    """

    def __init__(self, run: Path, world: World, *, sharded: bool):
        self.folder, self.world, self.sharded = run / "checkpoints", world, sharded

    def steps(self) -> list[Path]:
        """The checkpoints there are, the newest first."""
        return sorted(self.folder.glob("step-*"), key=lambda p: (p.stem, int(p.suffix[1:] or 0)), reverse=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint and remove the oldest. Called by all processes.

        Raises:
            RunError: a tensor is not finite, or a file cannot be written; what was there before stays.
        """
        bad = [k for k, v in tensors.items() if v.is_floating_point() and not _local(v).isfinite().all()]
        if self.world.sum([len(bad)])[0]:
            raise RunError(f"no checkpoint was written at step {step}: {', '.join(bad[:3])} are not finite.")
        aside = self.folder / ASIDE
        self._together(lambda: _fresh(aside), alone=True)
        if self.sharded:
            self._together(lambda: _save_shards(aside, tensors))
        else:
            self._together(lambda: safetensors.torch.save_file(_plain(tensors), aside / TENSORS), alone=True)
        self._together(lambda: self._finish(aside, step, state), alone=True)

    def _finish(self, aside: Path, step: int, state: Mapping[str, Any]) -> None:
        (aside / STATE).write_text(json.dumps(state), encoding="utf-8")
        (aside / MANIFEST).write_text(_manifest(aside), encoding="utf-8")
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        os.rename(aside, self._place(step))
        _sync(self.folder)
        for old in self.steps()[KEPT:]:
            shutil.rmtree(old)

    def _place(self, step: int) -> Path:
        """Where a new checkpoint goes; one of the same step, from before a stop, stays until the new one is there."""
        name = f"step-{step:08d}"
        before = [int(path.suffix[1:] or 0) for path in self.folder.glob(f"{name}*")]
        return self.folder / (f"{name}.{max(before) + 1}" if before else name)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are named, and removed when an older one stands in.

        Raises:
            RunError: there are checkpoints, and all of them are damaged.
        """
        found: Path | None = None
        problem = ""
        if self.world.main:
            shutil.rmtree(self.folder / ASIDE, ignore_errors=True)
            damaged = []
            for path in self.steps():
                try:
                    wrong = damage(path)
                except RunError as error:
                    problem = str(error)
                    break
                if wrong is None:
                    found = path
                    break
                damaged.append((path, wrong))
            if damaged and found is None and not problem:
                names = "; ".join(f"{path.name}: {wrong}" for path, wrong in damaged)
                problem = f"every checkpoint in {self.folder} is damaged ({names}): give another --out to begin anew."
            for path, wrong in damaged if found else ():
                log(f"the checkpoint {path.name} is damaged ({wrong}): the one before it, {found}, is used")
                shutil.rmtree(path)
        found, problem = self.world.gather((found, problem))[0]
        if problem:
            raise RunError(problem)
        return found

    def load(self, path: Path, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint; sharded ones are read into those given, each process its part."""
        if not self.sharded:
            return safetensors.torch.load_file(path / TENSORS)
        tensors = dict(into)
        load_shards(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
        return tensors

    def _together(self, work: Callable[[], Any], *, alone: bool = False) -> None:
        """Do it, on the main process `alone` or on all, and fail on all if it fails on one."""

        def explained() -> None:
            try:
                work()
            except OSError as error:
                raise self._failed(reason(error)) from None
            except (safetensors.SafetensorError, CheckpointException) as error:
                raise self._failed(str(error).strip().splitlines()[-1]) from None

        (self.world.alone if alone else self.world.together)(explained)

    def _failed(self, why: str) -> RunError:
        return RunError(f"a checkpoint could not be written to {self.folder}: {why}; the one before stays.")


def state_of(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if every byte is as it was written.

    Raises:
        RunError: it could not be looked at, which says nothing of it.
    """
    try:
        written = (path / MANIFEST).read_text(encoding="utf-8")
        if written != _manifest(path):
            return "its files differ from its manifest"
    except (FileNotFoundError, UnicodeDecodeError) as error:
        return f"it cannot be read, {error}"
    except OSError as error:
        if error.errno == errno.EIO:
            return f"the disk cannot read it, {error}"
        raise RunError(f"the checkpoint {path} could not be looked at: {reason(error)}; it stays as it is.") from None
    return None


def _manifest(folder: Path) -> str:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(digests, indent=1) + "\n"


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save_shards(dict(tensors), storage_writer=writer)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
