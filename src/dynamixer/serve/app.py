"""The application: which path gives what."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dynamixer.errors import did_you_mean
from dynamixer.logs import log
from dynamixer.models.checkpoint import Checkpoint
from dynamixer.serve.batching import Gate
from dynamixer.serve.body import Bodies
from dynamixer.serve.classifier import Classifier, MixingQuery
from dynamixer.serve.guard import FAILED, SAMPLE, Guard, refusal
from dynamixer.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from dynamixer.serve.openapi import ENCODINGS, document
from dynamixer.serve.samples import SHOWN, Sample
from dynamixer.serve.sending import Answers, answer
from dynamixer.serve.settings import Refused, Settings

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NO_AVERAGE = "there is no average: the model has no mixing matrices or too many weights, or there is one sample only."


def page_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by path, read once: no path is ever made from a request."""
    found = {}
    for entry in files("dynamixer.serve").joinpath("page").iterdir():
        kind = MEDIA_TYPES.get(entry.name[entry.name.rfind(".") :])
        if kind is not None:
            found[f"/{entry.name}"] = entry.read_bytes(), kind
    found["/"] = found.pop("/index.html")
    return found


class Service:
    """The answers, and what they share."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, samples: list[Sample]):
        self.settings, self.samples = settings, samples
        self.classifier = Classifier(checkpoint, settings)
        self.gate, self.bodies, self.metrics = Gate(settings.queue), Bodies(settings), Metrics()
        self.answers = Answers(settings.answer_memory)
        self.classifier.batches.append(self.metrics.batch.observe)
        self.metrics.inside.set_function(lambda: self.gate.inside)
        self.metrics.held.set_function(lambda: self.bodies.held)
        self.metrics.unsent.set_function(lambda: self.answers.held)
        self.page = page_files()
        self.not_ready: str | None = "the model is warming up."
        self.average: bytes | None = None
        self.average_missing = "the average is being computed."
        self.average_tried = asyncio.Event()
        self.guard = self._guard()

    def _guard(self) -> Guard:
        routes = [Route(path, self.file) for path in self.page]
        probes = [Route("/healthz", self.healthz), Route("/readyz", self.readyz)]
        api = [
            Route("/v1/predict", self.predict, methods=["POST"]),
            Route("/v1/mixing", self.mixing, methods=["POST"]),
            Route("/v1/model", self.model),
            Route("/v1/average", self.get_average),
            Route("/v1/samples", self.get_samples),
            Route(SAMPLE, self.sample),
            Route("/metrics", self.get_metrics),
            Route("/openapi.json", self.openapi),
        ]
        handlers: dict[Any, Callable[[Request, Any], Response | Awaitable[Response]]] = {
            Refused: lambda _, error: refusal(error),
            HTTPException: _no_such_thing,
            Exception: lambda _, error: refusal(FAILED),  # raised again for the guard, which logs it
        }
        app = Starlette(routes=[*routes, *probes, *api], exception_handlers=handlers, lifespan=self._lifespan)
        app.router.redirect_slashes = False
        return Guard(
            app,
            self.settings,
            self.metrics,
            open_paths=frozenset(self.page) | {"/healthz", "/readyz"},
            known_paths=frozenset(route.path for route in [*routes, *probes, *api]),
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.classifier.batcher.run()), asyncio.create_task(self._start())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.classifier.close()

    async def _start(self) -> None:
        """Warm up; ready only if the answer is the golden one. Then the average over the samples."""
        try:
            await self.classifier.check_golden()
        except Exception as error:
            self.not_ready = f"the warm-up inference failed: {error}"
            log(f"error: not ready: {self.not_ready}")
            return
        self.not_ready = None
        self.metrics.ready.set(1)
        log("ready")
        try:
            self.average = await self.classifier.average([sample.encoded for sample in self.samples])
            self.average_missing = NO_AVERAGE
        except Exception as error:
            self.average_missing = f"the average could not be computed: {error}"
            log(f"error: {self.average_missing}")
        self.average_tried.set()

    def _check_ready(self) -> None:
        if self.not_ready is not None:
            raise Refused(503, self.not_ready, retry_after=2)

    async def _with_picture(
        self, request: Request, use: Callable[[bytes], Awaitable[bytes | dict[str, Any]]]
    ) -> Response:
        """Read the picture, pass the gate, and do something with it in time."""
        self._check_ready()
        async with self.bodies.picture(request) as encoded:
            with self.gate.admit():
                try:
                    async with asyncio.timeout(self.settings.answer_seconds):
                        return self.answers(await use(encoded))
                except TimeoutError:
                    seconds = self.settings.answer_seconds
                    raise Refused(503, f"there was no answer within {seconds:g} seconds.", retry_after=2) from None
                except MemoryError:
                    raise Refused(503, "there is not enough memory for this picture now.", retry_after=2) from None

    async def predict(self, request: Request) -> Response:
        """The likeliest classes of a picture."""
        top = _top(_query(request, "top"))

        async def use(encoded: bytes) -> dict[str, Any]:
            probabilities = await self.classifier.probabilities(await self.classifier.prepare(encoded))
            return {"model": self.classifier.checkpoint.name, "top": self.classifier.top(probabilities, top)}

        return await self._with_picture(request, use)

    async def mixing(self, request: Request) -> Response:
        """The matrices of a picture."""
        given = _query(request, "top", "blocks", "encoding", "view")
        view = given.get("view", "false")
        if view not in ("true", "false"):
            raise Refused(422, f"view={view[:40]!r} is neither true nor false.")
        top = _top(given)
        query = MixingQuery(_blocks(given.get("blocks")), given.get("encoding", "float16"), view == "true")
        if query.encoding not in ENCODINGS:
            raise Refused(422, f"unknown encoding {query.encoding[:40]!r}: it is one of {', '.join(ENCODINGS)}.")
        self.classifier.check(query)
        return await self._with_picture(request, lambda encoded: self.classifier.mixing(encoded, query, top))

    async def model(self, request: Request) -> Response:
        """What is served."""
        _query(request)
        limits = {name: getattr(self.settings, name) for name in ("max_bytes", "max_pixels", "batch", "queue")}
        return answer(self.classifier.describe() | {"limits": limits})

    async def get_average(self, request: Request) -> Response:
        """The matrices averaged over the samples; for a while after the start this waits for them."""
        _query(request)
        self._check_ready()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.answer_seconds):
                await self.average_tried.wait()
        if self.average is not None:
            return answer(self.average)
        if self.average_missing == NO_AVERAGE:
            raise Refused(404, NO_AVERAGE)
        if self.average_tried.is_set():  # asking again does not help
            raise Refused(500, self.average_missing)
        raise Refused(503, self.average_missing, retry_after=2)

    async def get_samples(self, request: Request) -> Response:
        """The pictures that the page offers."""
        _query(request)
        shown = self.samples[:SHOWN]
        listed = [{"number": i, "name": s.name, "thumbnail": s.thumbnail} for i, s in enumerate(shown)]
        return answer({"samples": listed, "averaged": len(self.samples)})

    async def sample(self, request: Request) -> Response:
        """One of them, as it lies on the disk."""
        _query(request)
        text = request.path_params["number"]
        number = _number(text, min(SHOWN, len(self.samples)) - 1)
        if number is None:
            raise Refused(404, f"there is no sample {text[:40]}.")
        return Response(self.samples[number].encoded, media_type="application/octet-stream")

    async def healthz(self, _: Request) -> Response:
        """The process answers; for the page also whether, or why not yet, it is ready."""
        return answer({"status": "alive", "ready": self.not_ready is None, "reason": self.not_ready})

    async def readyz(self, _: Request) -> Response:
        """It answers rightly: the warm-up inference matched its golden answer, and it is not about to stop."""
        if self.guard.draining:
            raise Refused(503, "the server is stopping.", retry_after=5)
        self._check_ready()
        return answer({"status": "ready"})

    async def get_metrics(self, _: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, _: Request) -> Response:
        """The description of all this."""
        return answer(document(self.settings, len(self.classifier.classes)))

    async def file(self, request: Request) -> Response:
        """One of the page's files."""
        content, kind = self.page[request.url.path]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def _no_such_thing(request: Request, error: HTTPException) -> Response:
    sentences = {404: f"there is nothing at {request.url.path[:80]!r}: /openapi.json lists what there is.",
                 405: f"{request.method} is not what {request.url.path[:80]!r} takes."}  # fmt: skip
    sentence = sentences.get(error.status_code, error.detail)
    return refusal(Refused(error.status_code, sentence, headers=dict(error.headers or {})))


def _query(request: Request, *known: str) -> dict[str, str]:
    """The query's parameters, each known and given once."""
    pairs = request.query_params.multi_items()
    for name, _ in pairs:
        if name not in known:
            hint = did_you_mean(name[:40], known) if known else "this path takes none."
            raise Refused(422, f"unknown parameter {name[:40]!r}: {hint}")
    if len(dict(pairs)) < len(pairs):
        raise Refused(422, "a parameter is given twice.")
    return dict(pairs)


def _number(text: str, most: int) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 and int(text) <= most else None


def _top(given: dict[str, str]) -> int:
    number = _number(given.get("top", "5"), 100_000)
    if not number:
        raise Refused(422, f"top={given['top'][:40]!r} is not a number of classes, 1 or more.")
    return number


def _blocks(text: str | None) -> frozenset[int] | None:
    if text is None or text == "all":
        return None
    numbers = [_number(part, 9999) for part in text.split(",")]
    if None in numbers:
        raise Refused(422, f"blocks={text[:40]!r} is not 'all' or numbers from 0 with commas between, such as 0,3.")
    return frozenset(number for number in numbers if number is not None)
