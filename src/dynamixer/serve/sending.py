"""Sending answers: piece by piece, the next when the one before was taken, so that nobody holds memory by not reading."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from dynamixer.serve.settings import Refused

PIECE = 2**16  # bytes


def answer(value: Any) -> Response:
    """A result as JSON."""
    return Response(value if isinstance(value, bytes) else json.dumps(value), media_type="application/json",
                    headers={"Cache-Control": "no-store"})  # fmt: skip


class Answers:
    """Answers that are made for one request and are larger than a piece share one budget of memory while they are sent.

    Of the others, which all requests share, no more than a piece is copied.
    """

    def __init__(self, most: int):
        self.most, self.held = most, 0  # bytes

    def __call__(self, value: Any) -> Response:
        """A result as JSON that counts while it is sent."""
        made = answer(value)
        return _Counted(self, made.body, headers=dict(made.headers)) if len(made.body) > PIECE else made

    @contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Count bytes for a while; a lone answer may be larger than the budget.

        Raises:
            Refused: 503, others hold too many.
        """
        if self.held and self.held + number > self.most:
            raise Refused(503, "too many bytes of answers are still to be taken: try again.", retry_after=2)
        self.held += number
        try:
            yield
        finally:
            self.held -= number


class _Counted(Response):
    """An answer that is refused or counted when it is sent."""

    def __init__(self, answers: Answers, content: bytes | memoryview, headers: dict[str, str]):
        super().__init__(content, headers=headers)
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self.answers.hold(len(self.body)):
            await super().__call__(scope, receive, send)


async def in_pieces(message: Message, send: Send) -> None:
    """Send a message, its body piece by piece: uvicorn waits before each for the client to have taken those before."""
    body = message.get("body", b"")
    last = max(0, len(body) - 1) // PIECE * PIECE
    for at in range(0, last, PIECE):
        await send({**message, "body": body[at : at + PIECE], "more_body": True})
    await send({**message, "body": body[last:]} if last else message)
