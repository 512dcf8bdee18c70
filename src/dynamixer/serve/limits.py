"""What a picture is refused for before a pixel of it is decoded; then the decoder of all of dynamixer decodes it."""

import io
import re
import struct
import warnings

from PIL import Image

from dynamixer.data.decode import BadImage, Limits, decode
from dynamixer.serve.settings import Refused

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker in a JPEG's scan: neither stuffing nor a restart
MOST_SCANS = 100  # of a progressive JPEG, each of which goes over all of the picture again; encoders write about ten
MOST_MARKERS = 5_000  # of a JPEG; a photo has some hundred at most
_EXIF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of each type's value


def open_picture(encoded: bytes, limits: Limits) -> Image.Image:
    """Decode what a stranger sent: the upright RGB picture that the offline path decodes too.

    Raises:
        Refused: 413 too large, 415 another format, 422 damaged, several frames, or something else behind the picture.
    """
    if not encoded:
        raise Refused(422, "the request has no picture: its body is empty.")
    kind = _format(encoded)
    _refuse_more_than_a_picture(encoded, kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused below
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as header:
                frames = getattr(header, "n_frames", 1) if header.format != "MPO" else 1  # a photo with its preview
                exif = header.info.get("exif", b"")
    except Exception:  # whatever Pillow raises on bytes that only begin like a picture
        frames, exif = 1, b""  # the decoder finds the words for it
    if frames > 1:
        raise Refused(422, f"the picture is animated ({frames} frames): send one frame.")
    if isinstance(exif, bytes) and exif and not _exif_is_sound(exif.removeprefix(b"Exif\0\0")):
        raise Refused(
            422, "the picture's EXIF data is malformed, so that which side is up is unknown: save it without."
        )
    try:
        return decode(encoded, name="the picture", limits=limits)
    except BadImage as error:
        raise Refused(413 if error.kind == "absurd-size" else 422, str(error)) from None


def _format(encoded: bytes) -> str:
    if encoded.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return "WEBP"
    if encoded.startswith(b"BM"):
        return "BMP"
    raise Refused(415, "the picture is in none of the formats that are accepted: JPEG, PNG, WebP and BMP.")


def _refuse_more_than_a_picture(encoded: bytes, kind: str) -> None:
    """Refuse pictures that end before their end, and files that are a picture and something else at once."""
    try:
        end = {"JPEG": _end_of_jpeg, "PNG": _end_of_png, "WEBP": _end_of_webp, "BMP": _end_of_bmp}[kind](encoded)
    except (ValueError, IndexError, struct.error):
        end = len(encoded) + 1
    if end > len(encoded):
        raise Refused(422, f"the picture is damaged: this {kind} file ends before the picture does.")
    rest = encoded[end:]
    if rest.strip(b"\0\r\n ") and not (kind == "JPEG" and _from_a_camera(rest)):
        raise Refused(422, f"{len(rest):,} bytes follow the end of the picture: send the picture alone.")
    if b"%PDF-" in encoded[:1024] or _is_zip(encoded):
        raise Refused(422, "the file is a picture and a document or archive at once: send the picture alone.")


def _from_a_camera(rest: bytes) -> bool:
    """Whether what follows a JPEG is what telephones append: a second picture, the moving part, their index."""
    return rest.startswith(b"\xff\xd8\xff") or rest[4:8] == b"ftyp" or rest.endswith(b"SEFT")


def _is_zip(encoded: bytes) -> bool:
    """Whether readers of archives, which start at the end, would find one: the record there closes with the file."""
    at = encoded.rfind(b"PK\x05\x06", max(0, len(encoded) - 65557))
    return 0 <= at <= len(encoded) - 22 and at + 22 + struct.unpack_from("<H", encoded, at + 20)[0] == len(encoded)


def _end_of_jpeg(encoded: bytes) -> int:
    at, scans = 2, 0
    for _ in range(MOST_MARKERS):
        at = encoded.index(b"\xff", at)
        while encoded[at] == 0xFF:
            at += 1
        marker = encoded[at]
        at += 1
        if marker == 0xD9:
            return at
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue
        at += struct.unpack_from(">H", encoded, at)[0]
        if marker == 0xDA:
            scans += 1
            if scans > MOST_SCANS:
                raise Refused(422, f"the picture has more than {MOST_SCANS} scans: save it anew.")
            found = _SCAN_END.search(encoded, at)
            if found is None:
                return len(encoded) + 1
            at = found.start()
    raise Refused(422, f"the picture has more than {MOST_MARKERS:,} markers: save it anew, without its metadata.")


def _end_of_png(encoded: bytes) -> int:
    at = 8
    while True:
        length, name = struct.unpack_from(">I4s", encoded, at)
        at += 12 + length
        if name == b"IEND":
            return at


def _end_of_webp(encoded: bytes) -> int:
    size: int = struct.unpack_from("<I", encoded, 4)[0]
    padded = size % 2 and len(encoded) > 8 + size  # to an even number, which not every writer does
    return 8 + size + int(padded)


def _end_of_bmp(encoded: bytes) -> int:
    size: int = struct.unpack_from("<I", encoded, 2)[0]
    return size if size >= 26 else len(encoded)  # some writers leave the size out; the decoder knows then


def _exif_is_sound(exif: bytes) -> bool:
    """Whether the first directory, in which the orientation stands, can be read and keeps inside the block."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return False
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            _, kind, values, at = struct.unpack_from(f"{order}HHII", exif, entry)
            size = _EXIF_BYTES.get(kind, 0) * values
            if kind not in _EXIF_BYTES or (size > 4 and at + size > len(exif)):
                return False
    except struct.error:
        return False
    return True
