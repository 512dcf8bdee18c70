"""From pictures to rows of predictions, part by part."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynamixer.data.base import Pictures
from dynamixer.data.decode import BadImage
from dynamixer.data.preprocess import Preprocessing
from dynamixer.data.unlabelled import digest_of_files, open_pictures
from dynamixer.data.workers import from_workers, started, worker_signals
from dynamixer.device import resolve_device
from dynamixer.errors import RunError, UserError, did_you_mean
from dynamixer.logs import log
from dynamixer.many.parts import PART, Job, Parts, table
from dynamixer.models.checkpoint import Checkpoint, check_classifier, load
from dynamixer.predict import probabilities
from dynamixer.progress import progress

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Summary:
    """What became of the pictures."""

    out: Path
    bad_out: Path
    model: str
    pictures: int
    predicted: int
    bad: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "out": str(self.out), "bad_out": str(self.bad_out)}


class Batch(NamedTuple):
    """Pictures [batch size, 3, height, width], zeros where one is bad or the slice is short; their titles; what is wrong."""

    numbers: range
    pictures: Tensor
    titles: list[str]
    reasons: list[str | None]


class Slices(Dataset[Batch]):
    """Decoded batches by the numbers of their pictures. Every batch has the same shape, so that a row's bits do not
    depend on how many pictures there are.
    """

    def __init__(self, pictures: Pictures, preprocessing: Preprocessing, batch_size: int):
        self.pictures, self.transform = pictures, preprocessing.transform()
        self.shape = (batch_size, len(preprocessing.mean), *preprocessing.size)

    def __getitem__(self, numbers: range) -> Batch:
        """The batch of these pictures."""
        batch = Batch(numbers, torch.zeros(self.shape), [], [])
        for place, number in enumerate(numbers):
            reason = None
            try:
                batch.pictures[place] = self.transform(self.pictures.picture(number))
            except BadImage as error:
                reason = str(error)
            batch.titles.append(self.pictures.title(number))
            batch.reasons.append(reason)
        return batch


class Predictor:
    """Batches of a part -> its rows."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, top: int, embeddings: bool):
        self.model, self.classes, self.device = checkpoint.model, checkpoint.classes, device
        self.top, self.embeddings = top, embeddings

    @torch.inference_mode()
    def rows(self, batches: Iterable[Batch]) -> pa.Table:
        """A row for each picture, in order; a bad one has its reason and nothing else."""
        columns: dict[str, list[Any]] = {name: [] for name in ("index", "picture", "reason", "label", "probability")}
        columns |= {"top_labels": [], "top_probabilities": [], "embedding": []}
        width = 0
        for batch in batches:
            embedding, best = self._run(batch.pictures)
            width = embedding.shape[1] if self.embeddings else 0
            found = zip(best.values.tolist(), best.indices.tolist(), embedding.numpy(), strict=True)
            for number, title, reason, (shares, indices, vector) in zip(
                batch.numbers, batch.titles, batch.reasons, found, strict=False
            ):
                good = reason is None
                labels = [self.classes[i] for i in indices]
                columns["index"].append(number)
                columns["picture"].append(title)
                columns["reason"].append(reason)
                columns["label"].append(labels[0] if good else None)
                columns["probability"].append(shares[0] if good else None)
                columns["top_labels"].append(labels if good else None)
                columns["top_probabilities"].append(shares if good else None)
                columns["embedding"].append(vector if good else None)
        return table(columns, top=self.top, width=width)

    def _run(self, pictures: Tensor) -> tuple[Tensor, Any]:
        """What the classifier reads [B, C], and the likeliest classes."""
        model: Any = self.model
        features = model.forward_features(pictures.to(self.device))
        embedding = model.forward_head(features, pre_logits=True)
        return embedding.float().cpu(), probabilities(model.forward_head(features)).topk(self.top, dim=1)


def predict_many(
    paths: Sequence[str | Path] | str | Path,
    model: str | Path,
    out: str | Path,
    *,
    top: int = 5,
    embeddings: bool = False,
    batch_size: int = 32,
    size: int | tuple[int, int] | None = None,
    workers: int = 0,
    device: str = "auto",
    engine: str = "local",
) -> Summary:
    """Classify any number of pictures into a Parquet file, each once, whatever interrupts it.

    Started again with the same arguments after a stop or a kill at any moment, it goes on, and leaves the bytes that an
    undisturbed run would have left: batches are fixed slices of the sorted input, of one shape. Beside OUT.parquet lies
    OUT.bad.jsonl, a line for each picture that could not be read.

    Args:
        paths: pictures, folders, patterns, Parquet files (an image column as Hugging Face writes it) or tar files.
        model: a run folder, a checkpoint or hf-hub:OWNER/NAME.
        out: the Parquet file: index (place in the sorted input), picture, label, probability, top_labels,
            top_probabilities, and with `embeddings` embedding, a row for each picture that can be read.
        top: how many classes to give for each picture, or all where there are fewer.
        embeddings: also write what the classifier reads of each picture, float32.
        batch_size: pictures at a time.
        size: picture size in pixels, or (height, width), if not the one trained at.
        workers: processes that decode (`engine="local"`); they change nothing in the output.
        device: auto, cpu, cuda, mps or xpu.
        engine: "local", or "ray" for Ray Data on the cluster that RAY_ADDRESS names, or this machine. Model and pictures
            have to be at the same paths on every node; the output is written here.

    Raises:
        UserError: no such model or pictures, or `out` belongs to another model, other pictures or options.
        RunError: the output cannot be written, or the model's answers are not finite.
    """
    paths, out = [paths] if isinstance(paths, str | Path) else list(paths), Path(out)
    if top < 1 or batch_size < 1 or workers < 0:
        raise UserError(f"top={top} and batch_size={batch_size} have to be above 0, workers={workers} 0 or more.")
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}: {did_you_mean(engine, ENGINES)}")
    if out.suffix != ".parquet" or out.is_dir():
        raise UserError(f"{out} is not a name for the output: it has to end in .parquet and not be a folder.")
    where = resolve_device(device)
    checkpoint = load(model, device=where)
    check_classifier(checkpoint)
    pictures, files = open_pictures(paths, out=out)
    job = Job(
        model=fingerprint(checkpoint),
        input=digest_of_files(files),
        pictures=len(pictures),
        top=min(top, len(checkpoint.classes)),
        embeddings=embeddings,
        batch_size=batch_size,
        size=size,
        part=batch_size * max(1, PART // batch_size),
    )
    checkpoint.at(size)  # refused now, if it is no size
    parts = Parts(out, job)
    if parts.finished():
        if parts.folder.exists():
            with parts.opened(_machine(where)):
                parts.clear()
    else:
        _fill(parts, pictures, files, checkpoint, where, workers, engine)
    predicted = _rows(out)
    return Summary(out, parts.bad, str(checkpoint.path), job.pictures, predicted, job.pictures - predicted)


def _fill(
    parts: Parts,
    pictures: Pictures,
    files: list[Path],
    checkpoint: Checkpoint,
    where: torch.device,
    workers: int,
    engine: str,
) -> None:
    """Compute the parts that are missing, and join all."""
    job = parts.job
    with parts.opened(_machine(where)):
        if not parts.finished():  # by another process, while this one waited
            there = parts.done()
            missing = [part for part in range(job.parts) if part not in there]
            done = job.pictures - sum(len(numbers) for part in missing for numbers in job.slices(part))
            if done:
                log(f"goes on after {done:,} of {job.pictures:,} pictures")
            if engine == "ray":
                from dynamixer.many.on_ray import compute, some  # noqa: PLC0415 - of an extra

                computed = compute(pictures, some(files), checkpoint, job, missing, where)
            else:
                computed = _compute(pictures, checkpoint, job, missing, where, workers)
            with progress("predicting", job.pictures, done) as meter:
                for part, rows in computed:
                    parts.write(part, rows)
                    meter.advance(len(rows))
            if digest_of_files(files) != job.input:
                parts.forget()  # those that were lost for a while, and are as before, would stay bad pictures
                raise RunError(
                    "the pictures were changed while they were read, nothing can be said of them: start again."
                )
            parts.join()
        parts.clear()


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of all that a checkpoint's predictions depend on."""
    about = [checkpoint.name, checkpoint.args, checkpoint.classes, checkpoint.preprocessing.to_dict()]
    with checkpoint.path.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps([about, weights], sort_keys=True).encode()).hexdigest()


def _machine(device: torch.device) -> dict[str, Any]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type}


def _rows(out: Path) -> int:
    return int(pq.read_metadata(out).num_rows)


def _compute(
    pictures: Pictures, checkpoint: Checkpoint, job: Job, missing: list[int], device: torch.device, workers: int
) -> Iterator[tuple[int, pa.Table]]:
    """The missing parts, in order, decoded by workers of this machine."""
    slices = Slices(pictures, checkpoint.preprocessing.at(job.size), job.batch_size)
    predictor = Predictor(checkpoint, device, job.top, job.embeddings)
    order: Any = [numbers for part in missing for numbers in job.slices(part)]
    loader: DataLoader[Batch] = DataLoader(
        slices, batch_size=None, sampler=order, num_workers=workers, worker_init_fn=worker_signals
    )
    batches = started(loader)
    with from_workers():
        for part in missing:
            yield part, predictor.rows(next(batches) for _ in job.slices(part))
