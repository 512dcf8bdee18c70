"""The processes of a run: one, or those that torchrun started."""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynamixer.errors import RunError, UserError
from dynamixer.logs import quiet

MEETING, WAITING = 300, 12 * 3600  # seconds: to find each other; for one that downloads, or writes pictures, meanwhile
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


class World:
    """Which process this is and how many there are; sums and messages between them. Alone, all of it is free."""

    def __init__(self, device: torch.device):
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = device
        self.on = device if device.type in BACKENDS else torch.device("cpu")  # where messages between processes live

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.on)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def alone(self, work: Callable[[], Any]) -> None:
        """Let the main process do it, the others wait, and all fail if it fails.

        Raises:
            UserError, RunError: what it raised on the main process; a RunError on the others.
        """
        self.together(work if self.main else lambda: None)

    def together(self, work: Callable[[], Any]) -> None:
        """Do it on every process, and fail on all if it fails on one: nobody waits for a process that is gone.

        Raises:
            UserError, RunError: what it raised here; a RunError if it failed elsewhere.
        """
        problem: UserError | RunError | None = None
        try:
            work()
        except (UserError, RunError) as error:
            problem = error
        failed = self.sum([problem is not None])[0]
        if problem is not None:
            raise problem
        if failed:
            raise RunError("another process could not go on; its own message says why.")

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main() -> bool:
    """Whether this process is the one that speaks, as far as torchrun says."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def world(device: torch.device, *, needed: bool) -> Iterator[World]:
    """Join the processes that torchrun started, or with `needed` form a group of one, and leave them at the end.

    Raises:
        UserError: the device cannot be used by several processes.
    """
    made = (launched() or needed) and not dist.is_initialized()
    if device.type in BACKENDS:  # random numbers and collectives take the device that is set
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
        if launched() and local >= there:
            raise UserError(f"there are more processes than {device.type} devices on this machine, which has {there}.")
        device = torch.device(device.type, local if launched() else device.index or 0)
        torch.accelerator.set_device_index(device.index)
    if made:
        if device.type == "mps":
            raise UserError("several processes cannot share an mps device: train without torchrun, or with device=cpu.")
        _join(BACKENDS.get(device.type, "gloo"))
    try:
        found = World(device)
        with quiet(not found.main):
            yield found
    finally:
        if made:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    module: Any = dist  # its stubs leave the stores out
    if launched():
        store, rank, size = next(module.rendezvous("env://", timeout=timedelta(seconds=MEETING)))
        store = module.PrefixStore(_meet(store, rank, size), store)
    else:
        store, rank, size = module.HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=WAITING))


def _meet(store: Any, rank: int, size: int) -> str:
    """A name for this meeting, the same on every process, that no meeting before a restart had.

    torchrun keeps its store over restarts, and processes that find the addresses of dead ones there wait for ever. The first
    process calls a name; the others answer with it until it has heard them all.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + MEETING
    if rank == 0:
        store.set("dynamixer/name", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            answers = [f"dynamixer/answer/{other}" for other in range(1, size)]
            heard = [store.get(key).decode() for key in answers] if store.check(answers) else []
            if len(heard) == size - 1 and all(answer.startswith(mine) for answer in heard):
                store.set("dynamixer/met", " ".join([mine, *heard]))
                return mine
        else:
            if store.check(["dynamixer/name"]):
                store.set(f"dynamixer/answer/{rank}", f"{store.get('dynamixer/name').decode()}-{mine}")
            met = store.get("dynamixer/met").decode().split() if store.check(["dynamixer/met"]) else [""]
            if any(answer.endswith(mine) for answer in met):
                return str(met[0])
        time.sleep(0.02)
    raise RunError(f"the {size} processes did not find each other within {MEETING} seconds.")
