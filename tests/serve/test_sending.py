"""Answers that are taken slowly, or not at all."""

import contextlib
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from serve.world import Client, picture, server_here

SECONDS = 1.5  # of `body_seconds`


@pytest.fixture(scope="module")
def large(model, tmp_path_factory):
    """A server whose sample has 10 MB."""
    folder = tmp_path_factory.mktemp("large")
    Image.new("RGB", (1800, 1800)).save(folder / "large.bmp")
    with server_here(model, samples=folder, body_seconds=SECONDS) as made:
        yield made


@pytest.fixture
def asking():
    """Opens a connection, asks for something and reads the first bytes of the answer."""
    with contextlib.ExitStack() as opened:

        def ask(address, path="/v1/samples/0", body=b""):
            connection = opened.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
            connection.settimeout(20)
            connection.connect((urlsplit(address).hostname, urlsplit(address).port))
            head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            return connection, connection.recv(15)

        yield ask


def rest(connection, pace=0.0):
    """How many bytes still come."""
    taken = 0
    with contextlib.suppress(ConnectionResetError):
        while got := len(connection.recv(2**16)):
            taken += got
            time.sleep(pace * got)
    return taken


def resident():
    """Megabytes of this process."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def test_who_takes_an_answer_slowly_gets_all_of_it(large, asking):
    address, service = large
    connection, start = asking(address)
    assert start == b"HTTP/1.1 200 OK"
    began = time.monotonic()
    taken = rest(connection, pace=4 * SECONDS / len(service.samples[0].encoded))
    assert time.monotonic() - began > 3 * SECONDS
    assert taken > len(service.samples[0].encoded)
    # a quick one is not held up
    began = time.monotonic()
    assert Client(address).ask("GET", "/v1/samples/0")[2] == service.samples[0].encoded
    assert time.monotonic() - began < 2


def test_answers_that_nobody_takes_hold_no_memory_and_their_connections_are_closed(large, asking):
    address, service = large
    before = resident()
    idle = [asking(address)[0] for _ in range(30)]
    time.sleep(0.3)
    assert resident() - before < 60  # of 300 that were asked for
    assert Client(address).get("/healthz")[0] == 200
    time.sleep(SECONDS + 3)
    assert all(rest(connection) < len(service.samples[0].encoded) / 2 for connection in idle)


def test_large_answers_share_a_budget(model, asking):
    with server_here(model, answer_memory=10_000_000) as (address, service):

        async def mixing(*_):
            return b'"' + bytes(3_000_000) + b'"'

        service.classifier.mixing = mixing
        made = [asking(address, "/v1/mixing", picture(1)) for _ in range(6)]
        assert [start.split()[1] for _, start in made] == [b"200"] * 3 + [b"503"] * 3
        refusal = b""
        while b"too many bytes of answers are still to be taken: try again." not in refusal:
            more = made[-1][0].recv(2000)  # the body may come after the head
            assert more, refusal
            refusal += more
        text = Client(address).ask("GET", "/metrics")[2].decode()
        assert "dynamixer_answer_bytes 9.000006e+06" in text
        assert Client(address).post("/v1/predict", picture(1))[0] == 200  # small ones are not refused
        for connection, _ in made[:2]:
            connection.close()
        got = 0
        while got < 3_000_002:
            got += len(made[2][0].recv(2**16))
        end = time.monotonic() + 5
        while service.answers.held and time.monotonic() < end:
            time.sleep(0.02)
        assert service.answers.held == 0
        assert Client(address).ask("POST", "/v1/mixing", picture(1), Content_Type="image/jpeg")[0] == 200
