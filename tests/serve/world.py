"""Servers, clients and pictures for the tests of `dynamixer.serve`."""

import functools
import http.client
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import timm
import torch
from PIL import Image

import dynamixer
from dynamixer.data import Preprocessing
from dynamixer.models.checkpoint import save_checkpoint
from dynamixer.serve import Settings
from dynamixer.serve.app import Service
from dynamixer.serve.samples import find_samples
from dynamixer.serve.server import Server, address_of, listen
from helpers import sharpen

SMALL = {"patch_size": 8, "img_size": 64, "depths": (2, 1), "dims": (16, 32), "segments": (2, 4), "num_classes": 7}


def write_model(path, name="dynamixer_nano", **options):
    """A checkpoint with mixing far from uniform."""
    args = (SMALL if name.startswith("dynamixer") else {"num_classes": 7}) | options
    torch.manual_seed(0)
    made = sharpen(timm.create_model(name, **args)).eval()
    classes = tuple(f"class {letter}" for letter in "ABCDEFGHIJ"[: args["num_classes"]])
    about = {"name": name, "args": json.loads(json.dumps(args)), "classes": classes, "trained": {}}
    save_checkpoint(path, made.state_dict(), preprocessing=Preprocessing.of(made), **about)
    return path


def picture(seed, size=(150, 110), format="JPEG", mode="RGB", **options):  # noqa: A002 - Pillow's word
    """The bytes of a smooth random picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    coarse.convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


class Client:
    """One keep-alive connection that may not be opened a second time behind our back."""

    def __init__(self, address, timeout=60):
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=timeout)
        self.connection.connect()
        self.connection.auto_open = False

    def __del__(self):
        if hasattr(self, "connection"):
            self.connection.close()

    def ask(self, method, path, body=None, **headers):
        """(status, headers, body) of one exchange."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, named)
        response = self.connection.getresponse()
        return response.status, response.headers, response.read()

    def post(self, path, body, kind="application/octet-stream", **headers):
        """The same for a picture, its answer as JSON."""
        status, got, answer = self.ask("POST", path, body, Content_Type=kind, **headers)
        return status, got, json.loads(answer)

    def get(self, path, **headers):
        """The same, as JSON."""
        status, got, answer = self.ask("GET", path, **headers)
        return status, got, json.loads(answer)


def wait_ready(address, seconds=60):
    """Until /readyz says yes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            status, _, answer = Client(address, 5).get("/readyz")
            if status == 200:
                return
        except OSError as error:
            answer = error
        time.sleep(0.05)
    raise AssertionError(f"not ready after {seconds} s: {answer}")


@contextmanager
def server_here(model, *, change=None, **settings):
    """A server in a thread of this process: (address, service)."""
    chosen = Settings(port=0, **settings)
    checkpoint = dynamixer.load(model)
    service = Service(checkpoint, chosen, find_samples(chosen.samples, chosen.limits, checkpoint.classes))
    if change is not None:
        change(service)
    listener = listen(chosen)
    started = threading.Event()
    server = Server(service.guard, chosen, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        assert started.wait(20)
        address = address_of(listener)
        if change is None:
            wait_ready(address)
        yield address, service
    finally:
        server.should_exit = True
        thread.join(40)
        assert not thread.is_alive()


class Process:
    """`dynamixer serve` as a user starts it."""

    def __init__(self, model, *words, **environment):
        command = [sys.executable, "-m", "dynamixer", "serve", "--model", str(model), "--port", "0", "--json", *words]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.address = json.loads(line)["address"]
        wait_ready(self.address)

    def memory(self, what="VmRSS"):
        """Resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{what}:")[1].split()[0]) / 1024

    def stop(self, number=15):
        """(exit code, what it said)."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height, *more):
    """A PNG that claims a size and holds next to nothing."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + data + png_chunk(b"IEND", b"")


def zip_bytes():
    import zipfile  # noqa: PLC0415

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "x" * 100)
    return buffer.getvalue()


def with_exif(exif):
    """A JPEG with these bytes as its EXIF block."""
    plain = picture(5)
    block = b"Exif\0\0" + exif
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


@functools.cache
def hostile():
    """(name, bytes) of what no server may accept: 300 and more."""
    rng = np.random.default_rng(0)
    made = []
    whole = {
        "jpeg": picture(1),
        "progressive": picture(2, progressive=True),
        "png": picture(3, format="PNG"),
        "webp": picture(4, format="WEBP"),
        "lossless": picture(4, format="WEBP", lossless=True),
        "bmp": picture(5, format="BMP", size=(60, 40)),
    }
    for name, encoded in whole.items():  # truncations at many offsets, the very end included
        cuts = {*range(1, 24, 3), len(encoded) - 1, len(encoded) - 2, len(encoded) - 7}
        cuts |= set(rng.integers(24, len(encoded) - 8, 26).tolist())
        made += [(f"{name} cut at {cut}", encoded[:cut]) for cut in sorted(cuts)]
    jpeg, png, webp, bmp = whole["jpeg"], whole["png"], whole["webp"], whole["bmp"]
    for width, height in ((60_000, 60_000), (65_500, 700), (2**31 - 1, 1), (20_000, 3), (0, 10), (9_000, 9_000)):
        made.append((f"png of {width}x{height}", png_header(width, height)))
        made.append((f"bmp of {width}x{height}", b"BM" + struct.pack("<IIIIiiHHIIiiII", 4096, 0, 54, 40, width & (2**31 - 1),
                     height, 1, 24, 0, 0, 0, 0, 0, 0).ljust(4094, b"\0")))  # fmt: skip
    at = jpeg.index(b"\xff\xc0")
    for height in (65_000, 0):
        made.append((f"jpeg of height {height}", jpeg[: at + 5] + struct.pack(">H", height) + jpeg[at + 7 :]))
    made.append(
        (
            "text that unpacks to 60 MB",
            png_header(10, 10, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 60_000_000))),
        )
    )
    made.append(
        (
            "profile that unpacks to 60 MB",
            png_header(10, 10, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 60_000_000))),
        )
    )
    scan = jpeg.index(b"\xff\xda")  # what makes the search for the picture's end long, or its decoding
    made.append(("scan of a million fill bytes", jpeg[: scan + 14] + b"\xff" * 1_000_000 + b"\0"))
    made.append(("200,000 empty segments", jpeg[:2] + b"\xff\xef\0\2" * 200_000 + jpeg[2:]))
    last = whole["progressive"].rindex(b"\xff\xda")
    repeated = whole["progressive"][last:-2] * 200
    made.append(("200 scans", whole["progressive"][:-2] + repeated + b"\xff\xd9"))
    archive = zip_bytes()
    tails = {
        "zip": archive,
        "html": b"<html><script>alert(1)</script></html>",
        "php": b"<?php system('id'); ?>",
        "pdf": b"%PDF-1.7\n%%EOF",
        "elf": b"\x7fELF" + bytes(range(100)),
        "pickle": b"\x80\x04cos\nsystem\n.",
        "rar": b"Rar!\x1a\x07\x01\x00" + bytes(40),
    }
    for tail, content in tails.items():
        made += [
            (f"{name} and {tail}", body + content)
            for name, body in (("jpeg", jpeg), ("png", png), ("webp", webp), ("bmp", bmp))
        ]
    made.append(("jpeg, its preview, and zip", jpeg + jpeg + archive))
    made.append(("jpeg with a pdf inside", jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 12) + b"%PDF-1.7\n\n" + jpeg[2:]))
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    made += [("svg", svg), ("zip", archive), ("json", b'{"image": "/etc/passwd"}'), ("html", b"<!doctype html><p>x")]
    made += [(f"bytes like {start[:9]!r}", start + bytes(100)) for start in (
        b"hello", b"/etc/passwd", b"http://127.0.0.1/a.png", b"%PDF-1.7\n", b"\x7fELF", b"\x1f\x8b\x08", b"%!PS-Adobe-3.0",
        b"\0\0\0\x18ftypmp42", b"\0\0\0\x18ftypheic", b"\0\0\0\x1cftypavif", b"RIFF\x24\0\0\0WAVEfmt ", b"\x80\x04\x95",
        b"\0\0\1\0\1\0", b"gimp xcf v011", b"\xff" * 1000, b"\0" * 1000, b"II*\0", b"8BPS\0\1",
    )]  # fmt: skip
    made.append(("empty", b""))
    for format_ in ("GIF", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "SGI", "AVIF"):
        made.append((f"format {format_}", picture(6, format=format_, size=(64, 64))))
    frames = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(4)]
    for format_ in ("PNG", "WEBP", "GIF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, format_, save_all=True, append_images=frames[1:], duration=100)
        made.append((f"animated {format_}", buffer.getvalue()))
    directory = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)
    broken = {
        "no header": b"garbage!" * 4,
        "other order": b"XX" + directory[2:],
        "directory far away": b"II*\0\xff\xff\xff\x7f" + directory[8:],
        "65535 entries": directory[:8] + b"\xff\xff" + directory[10:],
        "unknown type": directory.replace(struct.pack("<HH", 0x0112, 3), struct.pack("<HH", 0x0112, 99)),
        "value far away": directory[:10] + struct.pack("<HHII", 0x010F, 2, 4000, 2**31) + bytes(4),
        "endless count": directory[:10] + struct.pack("<HHII", 0x0112, 3, 2**32 - 1, 8) + bytes(4),
        "cut": directory[:14],
        "only a mark": b"II*\0",
    }
    made += [(f"exif: {name}", with_exif(exif)) for name, exif in broken.items()]
    for name, encoded in whole.items():  # overwritten headers
        for _ in range(4):
            bad = bytearray(encoded)
            bad[8:40] = rng.integers(0, 256, 32, dtype=np.uint8).tobytes()
            if name != "bmp":
                made.append((f"{name} with a random head", bytes(bad)))
    return made


def legitimate():
    """(name, bytes) of photographs that have to be answered as the offline path answers them."""
    grey16 = np.linspace(0, 65535, 90 * 120).reshape(90, 120).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey16).save(buffer, "PNG")
    exif = Image.Exif()
    made = [
        ("16-bit", buffer.getvalue()),
        ("cmyk", picture(10, mode="CMYK")),
        ("palette", picture(11, format="PNG", mode="P")),
    ]
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        made.append((f"rotated {orientation}", picture(12, exif=exif.tobytes())))
    made += [
        ("rotated png", picture(12, format="PNG", exif=exif.tobytes())),
        ("rotated webp", picture(12, format="WEBP", exif=exif.tobytes())),
        ("grey", picture(13, mode="L")),
        ("grey and alpha", picture(14, mode="LA", format="PNG")),
        ("alpha", picture(15, mode="RGBA", format="PNG")),
        ("one bit", picture(16, mode="1", format="PNG")),
        ("progressive", picture(17, progressive=True)),
        ("lossless", picture(18, format="WEBP", lossless=True)),
        ("bmp", picture(19, format="BMP")),
        ("tiny", picture(20, size=(1, 1))),
        ("long", picture(21, size=(1200, 20))),
        ("large", picture(22, size=(4000, 3000))),
        ("with its moving part", picture(23) + b"\0\0\0\x18ftypmp42" + bytes(500)),
        ("with zeros behind", picture(24) + bytes(64)),
    ]
    buffer = io.BytesIO()
    first, second = (Image.open(io.BytesIO(picture(seed))) for seed in (25, 26))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    return [*made, ("two in one jpeg", buffer.getvalue())]


def offline(model, encoded, folder):
    """{class: probability} for each of the pictures, by dynamixer.predict."""
    files = []
    for i, content in enumerate(encoded):
        files.append(folder / f"{i:04}.bin")
        files[-1].write_bytes(content)
    found = dynamixer.predict(files, model, top=1000, device="cpu")
    assert not found.errors
    return [{guess.label: guess.probability for guess in result.top} for result in found.results]


def agrees(answer, expected):
    """Whether an answer's classes are within 1e-5 of the offline ones, the first the same (or a tie)."""
    got = {guess["label"]: guess["probability"] for guess in answer["top"]}
    first = answer["top"][0]["label"]
    near = all(abs(p - expected[label]) <= 1e-5 for label, p in got.items())
    return near and max(expected.values()) - expected[first] <= 1e-5
