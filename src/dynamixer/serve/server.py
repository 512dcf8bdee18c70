"""The process: uvicorn, with connections that stall closed and an end that answers everything it took in."""

import asyncio
import json
import math
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dynamixer.device import resolve_device
from dynamixer.errors import RunError, UserError
from dynamixer.files import reason
from dynamixer.logs import log
from dynamixer.models.checkpoint import check_classifier, load
from dynamixer.models.shipped import DEFAULT
from dynamixer.serve.app import Service
from dynamixer.serve.guard import Guard
from dynamixer.serve.samples import find_samples
from dynamixer.serve.sending import PIECE
from dynamixer.serve.settings import Settings

STOP_SECONDS = 25  # after SIGTERM, for what is being answered


def _raw_refusal(status: str, sentence: str, *headers: str) -> bytes:
    """A whole answer, for connections on which there is no request to answer."""
    body = json.dumps({"error": sentence}).encode()
    head = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def serve(
    model: str | Path = DEFAULT,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve a trained model until SIGTERM or SIGINT.

    Args:
        model: a run folder, a checkpoint, or a model whose weights ship, which dynamixer_tiny is.
        settings: where to listen and what to accept.
        device: auto, cpu, cuda, mps or xpu.
        ready: called with the address of the page once it can be opened.

    Raises:
        UserError: no such model, no such folder of samples, an address that is not this machine's, `fast` without a processor.
        RunError: the port is taken.
    """
    settings = settings or Settings()
    listener = listen(settings)
    try:
        checkpoint = load(model, device=resolve_device(device))
        check_classifier(checkpoint)
        samples = find_samples(settings.samples, settings.limits, checkpoint.classes)
        service = Service(checkpoint, settings, samples)
        if not settings.loopback and settings.token is None:
            log(f"everybody who reaches {settings.host} may use this server: DYNAMIXER_TOKEN asks for a token")
        server = Server(service.guard, settings, lambda: ready(address_of(listener)))
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:  # uvicorn passes on the signals that ended it, to handlers that do nothing
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        listener.close()


def listen(settings: Settings) -> socket.socket:
    """A socket bound to the settings' address, so that a taken port is told before a model is loaded."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Without it the system takes megabytes for a slow client at once and then nothing for many seconds; not all have it.
    with suppress(AttributeError, OSError):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PIECE)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen()
    except (socket.gaierror, OverflowError, UnicodeError):
        listener.close()
        raise UserError(f"{settings.host} is not an address of this machine.") from None
    except OSError as error:
        listener.close()
        raise RunError(f"{settings.host} port {settings.port} cannot be listened on: {reason(error)}.") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class _Connection(H11Protocol):
    """One connection, refused with a sentence where there are too many."""

    most = 0
    resumed = 0  # how often its client took what was written before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new one."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            sentence = "too many connections are open: try again."
            transport.write(_raw_refusal("503 Service Unavailable", sentence, "Retry-After: 2"))
            transport.close()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls on bytes that are not HTTP."""
        self.transport.write(_raw_refusal("400 Bad Request", "this is not HTTP, or its head is too long."))
        self.transport.close()

    def resume_writing(self) -> None:
        """More may be written."""
        self.resumed += 1
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, unless the connection is being closed."""
        if not self.transport.is_closing():
            super().data_received(data)


class Server(uvicorn.Server):
    """uvicorn's, which watches its connections and ends in order."""

    def __init__(self, guard: Guard, settings: Settings, on_start: Callable[[], None]):
        protocol = type("Connection", (_Connection,), {"most": settings.connections})
        super().__init__(
            uvicorn.Config(
                guard,
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=math.ceil(settings.body_seconds),
                timeout_graceful_shutdown=STOP_SECONDS,
                loop="asyncio",
            )
        )
        self.guard, self.settings, self.on_start = guard, settings, on_start
        self._since: dict[Any, tuple[object, float]] = {}  # connection -> what it waits for, and since when

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self.on_start()

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second."""
        self._close_stalled()
        return await super().on_tick(counter)

    def _close_stalled(self) -> None:
        """Close connections that for too long sent no whole head of a request, or took nothing of their answer."""
        now, before, self._since = time.monotonic(), self._since, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            cycle, unsent = connection.cycle, connection.transport.get_write_buffer_size()
            if not unsent and cycle is not None and not cycle.response_complete:
                continue  # its answer is being made, or its body is arriving, which has a time of its own
            what = (cycle, unsent, connection.resumed)
            known, since = before.get(connection, (None, now))
            since = since if known == what else now
            if now - since > self.settings.body_seconds:
                connection.transport.abort()
            else:
                self._since[connection] = what, since

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connection, answer what those that are open still send, then close the idle ones."""
        log("stopping: what was taken in is answered first")
        self.guard.draining = True
        for server in self.servers:
            server.close()
        end = time.monotonic() + self.settings.drain_seconds
        while self.server_state.connections and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
        log("stopped")
