"""Reading what a request carries: bounded in bytes, seconds and memory, raw or as multipart/form-data."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from dynamixer.serve.settings import Refused, Settings

RAW_TYPES = (
    "image/jpeg", "image/jpg", "image/png", "image/webp", "image/bmp", "image/x-ms-bmp", "application/octet-stream",
)  # fmt: skip
FIELD = "image"  # of the multipart form
MOST_PARTS = 100  # of a form: each costs calls while nobody else is served


class Bodies:
    """Reads bodies, of which all that are arriving share one budget of memory."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.held = 0  # bytes

    @asynccontextmanager
    async def picture(self, request: Request) -> AsyncIterator[bytes]:
        """The encoded picture that a request carries, counted as held meanwhile.

        Raises:
            Refused: 408 too slow, 413 too large, 415 another type, 422 a form without one picture, 503 no memory for it now.
        """
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        name = kind.decode("latin-1").lower()
        if name != "multipart/form-data" and name not in RAW_TYPES:
            said = f"a body of type {name[:60]!r} is not accepted" if name else "the body's type is not said"
            raise Refused(
                415, f"{said}: send a picture with its Content-Type, such as image/jpeg, or as multipart/form-data."
            )
        if name == "multipart/form-data" and not options.get(b"boundary"):
            raise Refused(422, "the form's Content-Type names no boundary.")
        counted = _Counted(self)
        try:
            body = await self._read(request, counted)
            yield body if name in RAW_TYPES else _only_picture(body, options[b"boundary"])
        finally:
            self.held -= counted.bytes

    async def _read(self, request: Request, counted: "_Counted") -> bytes:
        parts = []
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                self._check_declared(request)
                async for part in request.stream():
                    counted.add(len(part))
                    if counted.bytes > self.settings.max_bytes:
                        raise self._too_large()
                    if self.held > self.settings.body_memory:
                        raise Refused(503, "too many bytes are arriving at once: try again.", retry_after=2)
                    parts.append(part)
        except TimeoutError:
            sentence = f"the body did not arrive within {self.settings.body_seconds:g} seconds."
            raise Refused(408, sentence, headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise Refused(400, "the connection was closed before the body's end.") from None
        return b"".join(parts)

    def _check_declared(self, request: Request) -> None:
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.settings.max_bytes:
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than the {self.settings.max_bytes:,} bytes that are accepted.")


class _Counted:
    """Bytes of one body, which are held until it is answered."""

    def __init__(self, bodies: Bodies):
        self.bodies, self.bytes = bodies, 0

    def add(self, number: int) -> None:
        self.bytes += number
        self.bodies.held += number


def _only_picture(body: bytes, boundary: bytes) -> bytes:
    """The one file of a form, whose field is called `image`."""
    found: list[bytearray] = []
    header: dict[str, bytearray] = {}
    state = {"wanted": False, "ended": False, "parts": 0}

    def part_begin() -> None:
        state["wanted"] = False
        state["parts"] += 1
        if state["parts"] > MOST_PARTS:
            raise Refused(422, "the form has too many parts: send one picture in one field.")

    def header_begin() -> None:
        header.update(name=bytearray(), value=bytearray())

    def header_end() -> None:
        if header["name"].lower() == b"content-disposition":
            _, options = parse_options_header(bytes(header["value"]))
            if options.get(b"name") == FIELD.encode():
                state["wanted"] = True
                found.append(bytearray())

    def part_data(data: bytes, start: int, end: int) -> None:
        if state["wanted"]:
            found[-1] += data[start:end]

    def finish() -> None:
        state["ended"] = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": part_begin,
                "on_header_begin": header_begin,
                "on_header_field": lambda data, start, end: header["name"].extend(data[start:end]),
                "on_header_value": lambda data, start, end: header["value"].extend(data[start:end]),
                "on_header_end": header_end,
                "on_part_data": part_data,
                "on_end": finish,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Refused(422, "the form cannot be read: it is not what multipart/form-data looks like.") from None
    if not state["ended"]:
        raise Refused(422, "the form ends before its last boundary.")
    if len(found) != 1:
        raise Refused(422, f"the form has {len(found) or 'no'} fields called {FIELD!r}: send one picture in one.")
    return bytes(found[0])
