"""What every request passes, in and out: who may ask, which headers go with an answer, how a failure is told."""

import hmac
import json
import re
import time

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamixer.logs import log
from dynamixer.serve.metrics import Metrics
from dynamixer.serve.sending import in_pieces
from dynamixer.serve.settings import LOOPBACK, Refused, Settings

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
SAMPLE = "/v1/samples/{number}"
_SAMPLE = re.compile(r"/v1/samples/[0-9]+")
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


def refusal(error: Refused) -> Response:
    """The answer that tells a refusal."""
    return Response(json.dumps({"error": error.sentence}), error.status, error.headers, "application/json")


FAILED = Refused(500, "the server failed at this request; its log says how.")


class Guard:
    """Wraps the application. `open_paths` need no token, `known_paths` are counted by name."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        *,
        open_paths: frozenset[str],
        known_paths: frozenset[str],
    ):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.open_paths, self.known_paths = open_paths, known_paths
        self.draining = False  # after SIGTERM: answers close their connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, answered = time.perf_counter(), 0, 0.0

        async def dressed(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], time.perf_counter()
                message["headers"] = [*message.get("headers", []), *_RAW_HEADERS]
                if self.draining and not any(name.lower() == b"connection" for name, _ in message["headers"]):
                    message["headers"].append((b"connection", b"close"))
            await in_pieces(message, send)

        try:
            self._check(scope)
            await self.app(scope, receive, dressed)
        except Refused as error:
            if not status:
                await refusal(error)(scope, receive, dressed)
        except Exception as error:
            log(f"error: {scope['method']} {scope['path'][:80]!r} failed: {error!r}")
            if not status:
                await refusal(FAILED)(scope, receive, dressed)
        finally:
            path = SAMPLE if _SAMPLE.fullmatch(scope["path"]) else scope["path"]
            path = path if path in self.known_paths else "other"
            self.metrics.requests.labels(path, status or 499).inc()
            self.metrics.seconds.labels(path).observe((answered or time.perf_counter()) - start)

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self.settings.loopback or self.settings.hosts:
            host = _host(headers.get(b"host", b"").decode("latin-1"))
            if host not in {*LOOPBACK, *map(_host, (self.settings.host, *self.settings.hosts))}:
                raise Refused(421, f"this server does not answer as {host[:80]!r}: --allow-host names other hosts.")
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            raise Refused(403, "pages of other sites may not use this server.")
        if self.settings.token is not None and scope["path"] not in self.open_paths:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.settings.token.encode()):
                sentence = "this server asks for a token: send it as Authorization: Bearer TOKEN."
                if given.startswith(b"Bearer "):
                    sentence = "this is not the token that the server asks for."
                raise Refused(401, sentence, headers={"WWW-Authenticate": "Bearer"})


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.lower() if header.count(":") > 1 else header.partition(":")[0].lower()
