"""The training loop: every step a function of the configuration and the step's number, so that a kill loses nothing.

Random numbers are seeded anew for each part of each step, pictures follow from (seed, epoch, index), and the learning rate
from the step: weights, optimiser and a few counters are all the state there is (docs/adr/0006-training-engine.md).
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamixer.data.loading import (
    Batch,
    EvaluationPictures,
    evaluation_loader,
    random_state,
)
from dynamixer.data.sources import open_data
from dynamixer.device import resolve_device
from dynamixer.errors import RunError, UserError
from dynamixer.evaluate import Metrics, Tally, tally
from dynamixer.logs import log
from dynamixer.models.checkpoint import check_sizes
from dynamixer.progress import Meter, progress
from dynamixer.training import optimizer_state
from dynamixer.training.checkpoint import Checkpoints, state_of
from dynamixer.training.config import TrainConfig
from dynamixer.training.folder import RunFolder
from dynamixer.training.objective import dtype_of, make_mixup
from dynamixer.training.replica import Replica
from dynamixer.training.setup import (
    Course,
    Data,
    Network,
    build_network,
    check_classes,
    check_folder,
    check_same,
    prepare_data,
)
from dynamixer.training.state import Result, State
from dynamixer.training.stopping import Stopping
from dynamixer.training.trackers import check_trackers, open_trackers
from dynamixer.training.world import World, world

SKIPS_IN_A_ROW = 10


def train(config: TrainConfig, out: str | Path, *, resume: str = "auto") -> Result:
    """Train a model and leave a run folder: config, metrics, pictures, a report, checkpoints, best and last weights.

    Args:
        config: what to run; see `RECIPES` for starting points.
        out: the run folder. One that holds a run of the same configuration is resumed where its last checkpoint is.
        resume: "auto", or "never" to refuse a folder that holds a run.

    Raises:
        UserError: a configuration, data set or folder that cannot work, before any training.
        RunError: ten steps in a row were not finite, or a file could not be written.
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, with a checkpoint written.
    """
    run = Path(out)
    if resume not in ("auto", "never"):
        raise UserError(f"unknown resume {resume!r}: it is auto or never.")
    check_trackers(config.track)
    torch.backends.cudnn.deterministic = True
    with (
        world(resolve_device(config.device), needed=config.parallel == "fsdp2") as members,
        random_state(config.seed),
        Stopping() as stopping,
    ):
        members.together(lambda: check_folder(run, config, resume))  # nobody writes before all have looked
        if members.size > 1:
            members.alone(lambda: open_data(config.data))  # what has to be downloaded is, once
        data = prepare_data(config)
        check_classes(data.train.classes)
        torch.manual_seed(config.seed)
        network = build_network(config, data.train.classes)
        network.model.to(members.device, dtype_of(config))
        sizes = {*network.sizes, network.preprocessing.size}
        check_sizes(network.model.eval(), network.name, sizes)  # before anything is written
        engine = _Run(config, run, members, data, network, stopping)
        try:
            return engine.go()
        finally:
            engine.folder.release()


class _Run:
    """One training run on one of its processes."""

    def __init__(
        self, config: TrainConfig, run: Path, members: World, data: Data, network: Network, stopping: Stopping
    ):
        self.config, self.world, self.data, self.network, self.stopping = config, members, data, network, stopping
        self.course = Course(config, data, network, members)
        self.replica = Replica(config, network, data.train.classes, members)
        self.model = network.model
        self.optimizer, self.scheduler = self.course.optimizer(self.model)
        self.scaler = torch.amp.GradScaler(members.device.type, enabled=config.precision == "fp16")
        self.mixup = make_mixup(config, len(data.train.classes))
        self.state, self.fingerprint = State(bad=list(data.unread)), data.fingerprint()
        self.checkpoints = Checkpoints(run, members, sharded=self.replica.sharded)
        self.folder = RunFolder(run, config, members, data, network)
        self.val_loader = None
        if data.val is not None and data.val_indices is not None:
            self.val_numbers = data.val_indices[members.rank :: members.size]
            pictures = EvaluationPictures(data.val, network.preprocessing, self.val_numbers)
            part = max(1, 2 * config.batch_size // members.size)
            self.val_loader = evaluation_loader(pictures, part, config.workers, patient=True)
        self.waited, self.trained = 0.0, 0.0  # seconds

    def go(self) -> Result:
        """Run from where the checkpoints end to the end of the last epoch."""
        start = time.perf_counter()
        config, state, steps = self.config, self.state, self.course.steps
        self._resume()
        log(self.folder.describe(len(state.rows)))
        names, about = config.track if self.world.main else "none", config.to_dict()
        tracker = open_trackers(names, run=self.folder.run, config=about, identity=self.folder.identity)
        loader = self.course.batches(state.step)
        try:
            while (epoch := len(state.rows)) < config.epochs and not self._out_of_patience():
                self._train_epoch(epoch, loader)
                metrics = self._validate(epoch)
                tracker.epoch(self._close(epoch, metrics), (epoch + 1) * steps)
        finally:
            tracker.close()
            loader.close()  # and with them their workers, whatever holds on to this object
            self.val_loader = None
        found = Tally.from_dict(state.best_tally) if state.best_tally else None
        self.world.alone(lambda: self.folder.finish(state.rows, state.best, found))
        best = state.rows[state.best]
        return Result(
            run=self.folder.run,
            parameters=self.folder.parameters,
            best_epoch=state.best + 1,
            top1=best.get("val_top1"),
            top5=best.get("val_top5"),
            seconds=time.perf_counter() - start,
            steps=state.step,
            skipped=state.skipped,
            bad_images=len(state.bad),
            data_wait=100 * self.waited / self.trained if self.trained else None,
        )

    def _train_epoch(self, epoch: int, loader: Iterator[Batch]) -> None:
        """The steps that are left of an epoch."""
        config, state, steps = self.config, self.state, self.course.steps
        self.replica.task.train()
        size = min(config.batch_size, len(self.data.train_indices))
        first = state.step - epoch * steps
        with progress(f"epoch {epoch + 1}/{config.epochs}", steps * size, done=first * size) as meter:
            for step in range(state.step, (epoch + 1) * steps):
                self._step(step, loader, meter)
                signalled = self.world.sum([self.stopping.asked])[0] if self.world.size > 1 else self.stopping.asked
                if signalled or (state.step % config.checkpoint_every == 0 and step + 1 < (epoch + 1) * steps):
                    self._save()
                if signalled:
                    self.folder.time(epoch, meter, self.waited, self.trained)
                    self.world.alone(self.folder.write_times)
                    self.stopping.stop(state.step)
            self.folder.time(epoch, meter, self.waited, self.trained)

    def _step(self, step: int, loader: Iterator[Batch], meter: Meter) -> None:
        """One update of the weights, or none on any process if something in it was not finite."""
        state, began, waited = self.state, time.perf_counter(), 0.0
        self.scheduler.step_update(step)
        buffers = [b.clone() for b in self.model.buffers()]
        sums = [0.0, 0.0, 0.0, 0.0]  # loss, right, seen, parts that are not finite
        for number, part in enumerate(self.course.mine):
            asked = time.perf_counter()
            batch = self._next(loader)
            waited += time.perf_counter() - asked
            self._note(batch.bad)
            last = number == len(self.course.mine) - 1
            with contextlib.nullcontext() if last else self.replica.no_sync():
                loss, right, finite = self._part(batch, step, part)
            count = len(batch.labels)
            sums = [a + b for a, b in zip(sums, (loss * count, right, count, not finite), strict=True)]
        sums[3] += not all(b.isfinite().all() for b in self.model.buffers() if b.is_floating_point())
        *sums, broken = self.world.sum(sums)
        self.world.broadcast(
            buffer for buffer in self.model.buffers() if buffer.is_floating_point()
        )  # as DDP does later
        if self._update(broken > 0):
            state.sums = [a + b for a, b in zip(state.sums, sums, strict=True)]
        else:
            self.replica.put_buffers(buffers)
        state.step = step + 1
        self.waited += waited
        self.trained += time.perf_counter() - began
        counted = max(state.sums[2], 1)
        meter.advance(int(sums[2]), loss=state.sums[0] / counted, top1=100 * state.sums[1] / counted)
        if state.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise RunError(
                f"{SKIPS_IN_A_ROW} steps in a row, up to step {state.step}, had a loss, gradient or input that is not finite: "
                f"a smaller lr may help; {self.folder.run} keeps the last finite checkpoint."
            )

    def _next(self, loader: Iterator[Batch]) -> Batch:
        """The next part of a batch; a picture that cannot be read on one process stops all of them."""
        got: list[Batch] = []
        self.world.together(lambda: got.append(next(loader)))
        return got[0]

    def _part(self, batch: Batch, step: int, part: int) -> tuple[float, int, bool]:
        """Forward and backward of one part of a step's batch: mean loss, right ones, and whether all was finite."""
        config, device = self.config, self.world.device
        with random_state(config.seed, step, part, 0x57E9, numpy=self.mixup is not None, device=device):
            pictures = batch.pictures.to(device, dtype_of(config), non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            mixed, target = self.mixup(pictures, labels) if self.mixup else (pictures, labels)
            with self.replica.products():
                with self.replica.autocast():
                    out = self.replica.task(mixed, target)
                loss: Tensor = out["loss"]
                self.scaler.scale(loss / len(self.course.mine)).backward()
        value = float(loss.detach())
        right = int((out["output"].argmax(1) == labels).sum())
        return value, right, math.isfinite(value) and math.isfinite(float(pictures.sum()))

    def _update(self, lost: bool) -> bool:
        """Step the optimiser and the average; returns False, with nothing changed, if the loss or a gradient is not finite."""
        config, state, broken = self.config, self.state, lost
        if not lost:
            self.scaler.unscale_(self.optimizer)
            limit = math.inf if config.clip_grad is None else config.clip_grad
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            broken = not math.isfinite(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            scale = self.scaler.get_scale()
            if not broken:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            elif self.scaler.is_enabled():
                self.scaler.update(scale / 2 if scale >= 1 else scale)
                if scale >= 1:  # it may have been too large for fp16: no fault yet
                    self.optimizer.zero_grad()
                    state.scaler_skips += 1
                    return False
        self.optimizer.zero_grad()
        if broken:
            state.skipped += 1
            state.skipped_in_a_row += 1
            log(f"step {state.step + 1} is left out: a loss, gradient or input in it is not finite")
            return False
        state.updates += 1
        if state.updates == 1:
            optimizer_state.take(self.optimizer)  # an optimiser that cannot be saved is found now, not hours later
        state.skipped_in_a_row = 0
        self.replica.average(state.updates)
        return True

    def _note(self, bad: tuple[str, ...]) -> None:
        """Count and name each bad picture once, over all processes."""
        if self.config.on_bad_image == "skip":
            for sentence in [s for told in self.world.gather(bad) for s in told]:
                if sentence not in self.state.bad:
                    self.state.bad.append(sentence)
                    log(f"trained without it: {sentence}")

    def _validate(self, epoch: int) -> Tally | None:
        """The held-out pictures under the weights that are kept: the averaged ones, where there are any."""
        if self.val_loader is None:
            return None
        found = tally(
            self.replica.kept(),
            self.val_loader,
            device=self.world.device,
            images=len(self.val_numbers),
            classes=len(self.data.train.classes),
            precision=self.config.precision,
            title=f"held out {epoch + 1}/{self.config.epochs}",
            numbers=self.val_numbers.tolist(),
            stop=lambda: bool(self.stopping.asked),
        )
        parts = self.world.gather(found)
        if None in parts:
            self._save()
            self.world.alone(self.folder.write_times)
            self.stopping.stop(self.state.step)
        return Tally.merged(parts)

    def _close(self, epoch: int, found: Tally | None) -> dict[str, Any]:
        """Write all that an epoch leaves: first weights, then metrics, then the checkpoint that makes the epoch past."""
        state = self.state
        loss, right, seen = state.sums
        row = {
            "epoch": epoch + 1,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": loss / seen if seen else math.nan,
            "train_top1": 100 * right / seen if seen else math.nan,
            "skipped": state.skipped,
            "scaler_skips": state.scaler_skips,
            "bad_images": len(state.bad),
        }
        metrics: Metrics | None = None
        if found is not None:
            metrics = found.metrics()
            row |= {f"val_{key}": value for key, value in metrics.summary().items() if key != "images"}
        state.rows.append(row)
        state.sums = [0.0, 0.0, 0.0]
        is_best = metrics is None or state.best < 0 or row["val_top1"] > state.rows[state.best]["val_top1"]
        if is_best:
            state.best = epoch
            state.best_tally = found.to_dict() if found is not None else {}
        weights = self.replica.kept().state_dict()
        self.world.alone(lambda: self.folder.write_epoch(state.rows, weights, metrics, best=is_best))
        self._save()
        return row

    def _out_of_patience(self) -> bool:
        late = len(self.state.rows) - 1 - self.state.best
        return 0 < self.config.patience <= late

    def _save(self) -> None:
        self.world.alone(self.folder.begin)
        if self.scaler.is_enabled():
            self.state.scaler = self.scaler.state_dict()
        tensors, scalars = optimizer_state.take(self.optimizer)
        whose = {"data": self.fingerprint, "teacher": self.replica.teacher}
        about = {"state": vars(self.state), "optimizer": scalars, **whose}
        self.checkpoints.save(self.state.step, self.replica.tensors() | tensors, about)

    def _resume(self) -> None:
        self.world.alone(self.folder.take_up)
        found = self.checkpoints.latest()
        if found is None:
            return
        about = state_of(found)
        check_same(about, self.fingerprint, self.replica.teacher, self.config, self.folder.run)
        into = self.replica.tensors() | optimizer_state.places(self.optimizer, about["optimizer"])
        tensors = self.checkpoints.load(found, into)
        self.replica.load(tensors)
        optimizer_state.put(self.optimizer, tensors, about["optimizer"])
        for key, value in about["state"].items():
            setattr(self.state, key, value)
        if self.scaler.is_enabled() and self.state.scaler:
            self.scaler.load_state_dict(self.state.scaler)
        log(f"resuming after step {self.state.step}, from {found}")
