"""The parts of an output computed by Ray Data, on as many nodes as the cluster has (extra `ray`)."""

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from dynamixer.data.base import Pictures
from dynamixer.errors import RunError, UserError, first_line, install
from dynamixer.many.parts import Job
from dynamixer.many.run import Predictor, Slices, fingerprint
from dynamixer.models.checkpoint import Checkpoint, load


class Worker:
    """Holds the model on a node and makes rows of parts."""

    def __init__(self, pictures: Pictures, files: list[Path], path: str, job: Job, device: str, threads: int):
        if gone := next((file for file in files if not file.exists()), None):
            raise UserError(f"{gone} is not on this node: pictures have to be at the same paths on every node.")
        torch.set_num_threads(threads)  # the last digits of a sum depend on it
        checkpoint = load(path, device=device)
        if fingerprint(checkpoint) != job.model:
            raise UserError(f"{path} on this node is another model than on the one that started the job.")
        self.slices = Slices(pictures, checkpoint.preprocessing.at(job.size), job.batch_size)
        self.predictor = Predictor(checkpoint, torch.device(device), job.top, job.embeddings)
        self.job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A part's number -> that and its rows, as an Arrow stream."""
        part = int(row["part"])
        rows = self.predictor.rows(self.slices[numbers] for numbers in self.job.slices(part))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)
        return {"part": part, "rows": sink.getvalue().to_pybytes()}


def some(files: list[Path]) -> list[Path]:
    """A hundred of the files, or all, that every node has to see."""
    return [file for file in files[:: max(1, len(files) // 100)] if file.exists()]


def compute(
    pictures: Pictures, files: list[Path], checkpoint: Checkpoint, job: Job, missing: list[int], device: torch.device
) -> Iterator[tuple[int, pa.Table]]:
    """The missing parts in the order in which they are done.

    Every worker takes as many CPUs as torch has threads here (OMP_NUM_THREADS sets both), and a GPU if `device` is one.

    Raises:
        UserError: Ray is not installed.
        RunError: the cluster cannot be reached, or a worker failed.
    """
    try:
        ray = importlib.import_module("ray")
        data = importlib.import_module("ray.data")
    except ImportError:
        raise UserError(f"--engine ray needs Ray: {install('ray')}") from None
    threads = torch.get_num_threads()
    gpus = 0 if device.type == "cpu" else 1
    try:
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False)
            except ValueError as error:  # an address that is none
                raise UserError(
                    f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} cannot be used: {first_line(error)}"
                ) from None
        resources = ray.cluster_resources()
        fits = [resources.get("CPU", 0) // threads, *([resources.get("GPU", 0)] if gpus else [])]
        most = int(min(fits))
        if most < 1:
            raise RunError(
                f"the Ray cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs, and a worker "
                f"needs {threads} and {gpus}: set OMP_NUM_THREADS lower, or add nodes."
            )
        data.DataContext.get_current().enable_progress_bars = False
        parts = data.from_items([{"part": part} for part in missing], override_num_blocks=max(1, len(missing)))
        rows = parts.map(
            Worker,
            fn_constructor_args=(pictures, files, str(checkpoint.path), job, device.type, threads),
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(most, max(1, len(missing)))),
            num_cpus=threads,
            num_gpus=gpus,
        )
        for row in rows.iter_rows():
            with pa.ipc.open_stream(row["rows"]) as stream:
                yield int(row["part"]), stream.read_all()
    except (RunError, UserError):
        raise
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()
        ours = re.findall(r"^[\w.]*(?:RunError|UserError|BadImage): (.*)$", str(error), re.MULTILINE)
        raise RunError(f"Ray stopped: {ours[-1] if ours else said[-1]}") from None
    except ConnectionError as error:
        raise RunError(f"the Ray cluster cannot be reached: {error}.") from None
