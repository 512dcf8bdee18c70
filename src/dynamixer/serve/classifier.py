"""What the server does with a picture: decode and preprocess in threads, the model in one thread of its own."""

import asyncio
import base64
import io
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dynamixer.data.decode import DEFAULT_LIMITS, Limits
from dynamixer.explain import average
from dynamixer.explain.matrices import blocks_of, look
from dynamixer.logs import quiet
from dynamixer.models import DynaMixer
from dynamixer.models.checkpoint import Checkpoint
from dynamixer.predict import predict
from dynamixer.serve.batching import Batcher
from dynamixer.serve.limits import open_picture
from dynamixer.serve.mixing import Layout, layouts, written
from dynamixer.serve.settings import Refused, Settings

TOLERANCE = 1e-5  # between a served probability and the offline one
MOST_NUMBERS = 32_000_000  # weights in one answer: 64 MB as half floats
MOST_LISTED = 200_000  # as JSON lists
VIEW = 448  # pixels: the least size of what the page shows


@dataclass(frozen=True)
class Prepared:
    """A picture as the model reads it, [3, height, width], and on request as a person sees that."""

    tensor: Tensor
    view: str | None = None  # data URL of a JPEG


@dataclass(frozen=True)
class MixingQuery:
    """Which blocks of a model, and how their numbers are written."""

    blocks: frozenset[int] | None = None  # None: all
    encoding: str = "float16"  # base64 of little-endian float16 or float32, or "lists"
    view: bool = False  # with a JPEG of what the model saw


class Classifier:
    """A checkpoint that answers, with its threads; `run` has to be running.

    Raises:
        UserError: with `settings.fast`, another device than a processor.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings):
        self.checkpoint, self.limits, self.batch = checkpoint, settings.limits, settings.batch
        self.device = next(checkpoint.model.parameters()).device
        self.transform = checkpoint.preprocessing.transform()
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.averaging = ThreadPoolExecutor(1, thread_name_prefix="average")
        self.closed = False
        self.batcher = Batcher(self._work, settings.batch)
        self.batches: list[Any] = []  # called with the size of each batch
        size = checkpoint.preprocessing.size
        larger = max(1, -(-VIEW // max(size)))
        self._view_transform = checkpoint.preprocessing.at((size[0] * larger, size[1] * larger)).transform()
        model = checkpoint.model
        blank = torch.zeros(1, len(checkpoint.preprocessing.mean), *size, device=self.device)
        self.layouts: list[Layout] = layouts(model, blank) if isinstance(model, DynaMixer) else []
        self.few: nn.Module = model
        self.many: nn.Module = model
        if settings.fast:
            from dynamixer.speed.fast import FastModel  # noqa: PLC0415 - seldom wanted

            # In fp32 everywhere: a served answer is the offline one. A lone picture is not run as if it were many.
            self.few, self.many = (
                FastModel(model, size, images=n, batch=n, device=self.device, precision="fp32")
                for n in (1, settings.batch)
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the logits."""
        return self.checkpoint.classes

    async def prepare(self, encoded: bytes, *, view: bool = False, limits: Limits | None = None) -> Prepared:
        """Decode and preprocess, outside the event loop.

        Raises:
            Refused: it is not a picture that is accepted.
        """
        return await asyncio.get_running_loop().run_in_executor(self.decoders, self._prepare, encoded, view, limits)

    def _prepare(self, encoded: bytes, view: bool, limits: Limits | None = None) -> Prepared:
        picture = open_picture(encoded, limits or self.limits)
        return Prepared(self.transform(picture), self._view(picture) if view else None)

    def _view(self, picture: Image.Image) -> str:
        """The part of the picture that the model reads, in more pixels."""
        pre = self.checkpoint.preprocessing
        std, mean = (torch.tensor(values)[:, None, None] for values in (pre.std, pre.mean))
        pixels = (self._view_transform(picture) * std + mean).clamp(0, 1).mul(255).round().byte()
        shown = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        shown.thumbnail((2 * VIEW, 2 * VIEW))
        buffer = io.BytesIO()
        shown.save(buffer, "JPEG", quality=88)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    async def probabilities(self, prepared: Prepared) -> list[float]:
        """Of each class, in a batch with whoever else waits."""
        return await self.batcher(prepared.tensor)

    async def _work(self, items: list[Tensor]) -> list[list[float]]:
        for watch in self.batches:
            watch(len(items))
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._infer, items)

    @torch.inference_mode()
    def _infer(self, items: list[Tensor]) -> list[list[float]]:
        network = self.many if 2 * len(items) > self.batch else self.few
        logits: Tensor = network(torch.stack(items).to(self.device))
        rows: list[list[float]] = logits.float().softmax(1).tolist()
        return rows

    def top(self, probabilities: Sequence[float], k: int) -> list[dict[str, Any]]:
        """The likeliest classes, the likeliest first."""
        order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:k]
        return [{"label": self.classes[i], "probability": probabilities[i]} for i in order]

    async def mixing(self, encoded: bytes, query: MixingQuery, k: int) -> bytes:
        """The JSON answer of /v1/mixing.

        Raises:
            Refused: not a picture, another kind of model, or more numbers than one answer may hold.
        """
        self.check(query)
        prepared = await self.prepare(encoded, view=query.view)
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._mixing, prepared, query, k)

    def check(self, query: MixingQuery) -> None:
        """Refuse what the model does not have, or an answer that would be too large."""
        if not self.layouts:
            raise Refused(422, f"{self.checkpoint.name} has no mixing matrices: it is not a DynaMixer.")
        wanted = range(len(self.layouts)) if query.blocks is None else query.blocks
        if beyond := [block for block in wanted if block >= len(self.layouts)]:
            raise Refused(422, f"there is no block {beyond[0]}: the model has blocks 0 to {len(self.layouts) - 1}.")
        total, most = sum(self.layouts[block].weights for block in wanted), MOST_NUMBERS
        if query.encoding == "lists":
            most = MOST_LISTED
        if total > most:
            raise Refused(422, f"these blocks have {total:,} weights; an answer holds {most:,}: ask for fewer blocks.")

    def _mixing(self, prepared: Prepared, query: MixingQuery, k: int) -> bytes:
        blocks = None if query.blocks is None else [*query.blocks]
        seen = look(self.checkpoint.model, prepared.tensor[None].to(self.device), blocks=blocks)
        answer = {
            "model": self.checkpoint.name,
            "top": self.top(seen.logits.float().softmax(1)[0].tolist(), k),
            "view": prepared.view,
        }
        return json.dumps(answer | written(seen.blocks, self.layouts, query.encoding)).encode()

    @property
    def shows_all(self) -> bool:
        """Whether there are matrices, and one answer can hold those of all blocks."""
        return 0 < sum(layout.weights for layout in self.layouts) <= MOST_NUMBERS

    async def average(self, pictures: Sequence[bytes]) -> bytes | None:
        """The mean over pictures, as JSON like that of /v1/mixing; None without two pictures, or unless `shows_all`."""
        if len(pictures) < 2 or not self.shows_all:
            return None
        return await asyncio.get_running_loop().run_in_executor(self.averaging, self._average, pictures)

    def _average(self, pictures: Sequence[bytes]) -> bytes:
        tensors = (self._prepare(encoded, False).tensor[None].to(self.device) for encoded in pictures)
        mean = average(self.checkpoint.model, takewhile(lambda _: not self.closed, tensors))
        about = {"model": self.checkpoint.name, "pictures": mean.pictures}
        return json.dumps(about | written(mean.blocks, self.layouts, MixingQuery().encoding)).encode()

    async def check_golden(self) -> None:
        """Classify one fixed picture by `dynamixer.predict`, from the file on the disk, and as requests are; compare.

        Raises:
            RuntimeError: they differ.
        """
        encoded = golden_picture()
        loop = asyncio.get_running_loop()
        offline = await loop.run_in_executor(self.decoders, self._offline, encoded)
        prepared = await self.prepare(encoded, limits=DEFAULT_LIMITS)  # it is ours, and no user's limit is about it
        for together in (1, self.batch):  # alone, and in as large a batch as there can be
            served = await asyncio.gather(*(self.probabilities(prepared) for _ in range(together)))
            if len(offline) == len(self.classes):  # else a label does not name a probability
                worst = np.abs(np.array(served) - [offline[label] for label in self.classes]).max()
                if not worst <= TOLERANCE:
                    raise RuntimeError(f"a served probability differs by {worst:.2g} from that of dynamixer.predict.")
        if self.shows_all:
            await loop.run_in_executor(self.thread, self._mixing, prepared, MixingQuery(), 1)

    def _offline(self, encoded: bytes) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = Path(folder) / "golden.png"
            path.write_bytes(encoded)
            found = predict([path], self.checkpoint.path, top=len(self.classes), device=str(self.device))
        return {guess.label: guess.probability for guess in found.results[0].top}

    def describe(self) -> dict[str, Any]:
        """What /v1/model says."""
        checkpoint, model = self.checkpoint, self.checkpoint.model
        about: dict[str, Any] = {
            "model": checkpoint.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "classes": list(checkpoint.classes),
            "preprocessing": checkpoint.preprocessing.to_dict(),
            "trained": checkpoint.trained,
            "shows_all": self.shows_all,
            "mixing": None,
            "blocks": [
                {"block": number, "stage": layout.stage, "segments": layout.segments, "weights": layout.weights}
                for number, layout in enumerate(self.layouts)
            ],
        }
        if self.layouts:
            _, block = blocks_of(model)[0]
            mixer: Any = block.row if block.row is not None else block.column
            about["mixing"] = {
                "generator": mixer.generator,
                "softmax": mixer.softmax,
                "static": mixer.static is not None,
                "row": block.row is not None,
                "column": block.shared or block.column is not None,
                "channel": block.channel is not None,
                "reweight": block.reweight is not None,
                "shared": block.shared,
            }
        return about

    def close(self) -> None:
        """End the threads."""
        self.closed = True
        for pool in (self.decoders, self.thread, self.averaging):
            pool.shutdown(wait=False, cancel_futures=True)


def golden_picture() -> bytes:
    """A PNG of rings and slopes in 96x128 pixels, the same on every machine."""
    y, x = np.mgrid[0:96, 0:128]
    rings = 127 + 127 * np.sin(((x - 40) ** 2 + (y - 50) ** 2) / 300)
    pixels = np.stack([rings, 2 * x, 255 - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
