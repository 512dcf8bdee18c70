"""What a server is told, and how it says no."""

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dynamixer.data.decode import Limits
from dynamixer.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):  # noqa: N818 - an answer, not a defect
    """A request that gets no result: its status, a sentence for the person who sent it, and seconds after which to try again."""

    def __init__(
        self, status: int, sentence: str, retry_after: int | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
        self.headers = dict(headers or {}) | ({} if retry_after is None else {"Retry-After": str(retry_after)})


@dataclass(frozen=True)
class Settings:
    """How a server is reached and what it accepts.

    `host` and `port` say where it listens; another host than a loopback one has to be asked for. Requests whose Host header is
    neither `host` nor one of `hosts` are refused on a loopback address, where a stranger's page could have its name point here,
    and on any other once `hosts` are given.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: tuple[str, ...] = ()
    token: str | None = None  # asked for as a bearer token on everything but the page and the two probes
    samples: Path | None = None  # folder of pictures for the page; without it, those that ship
    batch: int = 16  # pictures that the model takes at once
    fast: bool = False  # classify the quickest way on this machine's processor in fp32 (dynamixer.optimize)
    queue: int = 128  # requests between their last byte and their answer
    max_bytes: int = 16 * 2**20  # of a body
    max_pixels: int = 40_000_000
    body_seconds: float = 10.0  # for a body to arrive, and for the head of a request
    answer_seconds: float = 20.0  # from the last byte of a request to its answer
    drain_seconds: float = 1.0  # after SIGTERM, in which open connections may send another request
    connections: int = 800
    body_memory: int = 256 * 2**20  # of all bodies that are arriving
    answer_memory: int = 256 * 2**20  # of all large answers that are being sent

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: which value, and what it may be.
        """
        for name in ("batch", "queue", "max_bytes", "max_pixels", "connections", "body_memory", "answer_memory"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} has to be 1 or more.")
        if not self.host:
            raise UserError(
                "no address to listen on is given: 127.0.0.1 is this machine alone, 0.0.0.0 every address it has."
            )
        if not 0 <= self.port <= 65535:
            raise UserError(f"port {self.port} is not between 0 (any free one) and 65535.")
        if self.body_memory < self.max_bytes:
            raise UserError(
                f"max_bytes={self.max_bytes} is more than all bodies together may take: {self.body_memory} bytes (body_memory)."
            )
        if self.token is not None and not re.fullmatch(r"[!-~][ -~]{14,}[!-~]", self.token):
            raise UserError(
                "the token is too short or has letters that a header cannot hold: take 16 or more of ASCII, no space around."
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        host = self.host.lower()
        with suppress(ValueError):
            return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
        return re.fullmatch(r"127[.0-9]*", host) is not None  # 127.1, which the system takes for 127.0.0.1

    @property
    def limits(self) -> Limits:
        """What a picture may be."""
        return Limits(file_bytes=self.max_bytes, pixels=self.max_pixels, side=16_000)
