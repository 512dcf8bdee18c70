"""The JSON API: what it answers, and how it refuses."""

import base64
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import dynamixer
from dynamixer import UserError
from dynamixer.cli import main
from dynamixer.serve import Settings
from dynamixer.serve.guard import HEADERS
from serve.world import Client, agrees, offline, picture, server_here, write_model


@pytest.fixture(scope="module")
def strict(model):
    """A server with a token and small limits."""
    with server_here(model, token="a long enough secret", max_bytes=20_000, max_pixels=30_000, body_seconds=1) as made:
        yield made


def form(*parts, boundary="xyz", end="--"):
    """A multipart body of (name, content) parts."""
    body = b""
    for name, content in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="../../etc/passwd"\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}{end}\r\n".encode()


FORM = "multipart/form-data; boundary=xyz"


def test_answers_are_the_offline_ones(here, model, tmp_path):
    address, _ = here
    pictures = [picture(seed, size=(80 + 9 * seed, 120)) for seed in range(6)]
    answers = offline(model, pictures, tmp_path)
    client = Client(address)  # one that waits too long is closed
    for encoded, expected in zip(pictures, answers, strict=True):
        status, _, answer = client.post("/v1/predict?top=7", encoded, "image/jpeg")
        assert status == 200
        assert agrees(answer, expected)
        assert len(answer["top"]) == 7
        _, _, in_a_form = client.post("/v1/predict?top=2", form(("note", b"x"), ("image", encoded)), FORM)
        assert in_a_form["top"] == answer["top"][:2]
        _, _, mixed = client.post("/v1/mixing", encoded)
        assert agrees(mixed, expected)


def test_mixing_is_what_the_model_mixes_with(here, model):
    address, _ = here
    encoded = picture(3)
    checkpoint = dynamixer.load(model)
    x = checkpoint.preprocessing(dynamixer.predict.__globals__["decode"](encoded))[None]
    with torch.inference_mode():
        tokens = checkpoint.model.patch_embed(x)
        layer = checkpoint.model.stages[0].blocks[0]
        matrices = layer.mixer.row.matrices_for(layer.norm1(tokens))[0]
        columns = layer.mixer.column.matrices_for(layer.norm1(tokens).transpose(1, 2))[0]
    client = Client(address)
    _, _, answer = client.post("/v1/mixing?blocks=0&encoding=float32", encoded)
    (block,) = answer["blocks"]
    for axis, expected in ((block["row"], matrices), (block["column"], columns)):
        got = np.frombuffer(base64.b64decode(axis["data"]), "<f4").reshape(axis["shape"])
        assert np.abs(got - expected.numpy()).max() < 1e-6
        assert np.abs(got - got.swapaxes(2, 3)).max() > 0.3  # a transposed one would not pass for it
    assert (block["grid"], block["cell"]) == ([8, 8], [0.125, 0.125])
    assert abs(sum(block["branches"].values()) - 1) < 1e-5
    _, _, listed = client.post("/v1/mixing?blocks=2&encoding=lists", encoded)
    rows = np.array(listed["blocks"][0]["row"]["data"])
    assert rows.shape == (4, 4, 4, 4)
    assert np.abs(rows.sum(-1) - 1).max() < 1e-5
    assert listed["view"] is None
    _, _, halves = client.post("/v1/mixing?view=true", encoded)
    assert [b["block"] for b in halves["blocks"]] == [0, 1, 2]
    assert halves["view"].startswith("data:image/jpeg;base64,/9j/")


def test_the_average_is_over_the_samples(here):
    address, service = here
    end = time.monotonic() + 60
    client = Client(address)
    while (found := client.get("/v1/average"))[0] == 503 and time.monotonic() < end:
        assert found[1]["Retry-After"] == "2"
        time.sleep(0.2)
        client = Client(address)
    average = found[2]
    sums = 0
    for sample in service.samples:
        _, _, answer = client.post("/v1/mixing?blocks=1&encoding=float32", sample.encoded)
        sums = sums + np.frombuffer(base64.b64decode(answer["blocks"][0]["column"]["data"]), "<f4")
    got = np.frombuffer(base64.b64decode(average["blocks"][1]["column"]["data"]), "<f2")
    assert average["pictures"] == len(service.samples) == 8
    assert np.abs(got - sums / 8).max() < 1e-3
    _, _, listed = client.get("/v1/samples")
    assert len(listed["samples"]) == 8
    assert client.ask("GET", "/v1/samples/3")[2] == service.samples[3].encoded


def test_the_model_is_described(here):
    _, _, about = Client(here[0]).get("/v1/model")
    assert about["classes"] == [f"class {letter}" for letter in "ABCDEFG"]
    assert about["mixing"]["softmax"] is True
    assert [(b["stage"], b["segments"], b["weights"]) for b in about["blocks"]] == [
        (0, 2, 2048),
        (0, 2, 2048),
        (1, 4, 512),
    ]
    assert about["preprocessing"]["size"] == [64, 64]


REFUSALS = [
    ("POST", "/v1/predict", b"hello", {"Content_Type": "text/plain"}, 415, "'text/plain' is not accepted"),
    ("POST", "/v1/predict", b"hello", {}, 415, "the body's type is not said"),
    ("POST", "/v1/predict", b"hello", {"Content_Type": "image/png"}, 415, "JPEG, PNG, WebP and BMP"),
    ("POST", "/v1/predict", b"", {"Content_Type": "image/png"}, 422, "its body is empty"),
    ("POST", "/v1/predict?top=0", b"", {"Content_Type": "image/png"}, 422, "top='0' is not a number of classes"),
    ("POST", "/v1/predict?top=1&top=2", b"", {"Content_Type": "image/png"}, 422, "given twice"),
    ("POST", "/v1/predict?tops=1", b"", {"Content_Type": "image/png"}, 422, "did you mean 'top'?"),
    ("POST", "/v1/mixing?blocks=x", b"", {"Content_Type": "image/png"}, 422, "numbers from 0 with commas"),
    ("POST", "/v1/mixing?blocks=0,3", b"", {"Content_Type": "image/png"}, 422, "blocks 0 to 2"),
    ("POST", "/v1/mixing?encoding=png", b"", {"Content_Type": "image/png"}, 422, "float16, float32, lists"),
    ("POST", "/v1/predict", form(("picture", b"x")), {"Content_Type": FORM}, 422, "no fields called 'image'"),
    ("POST", "/v1/predict", form(("image", b"x"), ("image", b"y")), {"Content_Type": FORM}, 422, "2 fields"),
    ("POST", "/v1/predict", form(("image", b"x"), end=""), {"Content_Type": FORM}, 422, "before its last boundary"),
    ("POST", "/v1/predict", b"nothing", {"Content_Type": FORM}, 422, "cannot be read"),
    ("POST", "/v1/predict", b"", {"Content_Type": "multipart/form-data"}, 422, "no boundary"),
    ("POST", "/v1/predict", b"", {"Content_Type": f"multipart/form-data; boundary={'y' * 300}"}, 422, "cannot be read"),
    ("POST", "/v1/predict", form(*[("a", b"")] * 200), {"Content_Type": FORM}, 422, "too many parts"),
    ("POST", "/v1/predict", b"--xyz\r\n" + b"A: b\r\n" * 200, {"Content_Type": FORM}, 422, "cannot be read"),
    ("GET", "/v1/predict", None, {}, 405, "GET is not what '/v1/predict' takes"),
    ("GET", "/etc/passwd", None, {}, 404, "there is nothing at '/etc/passwd'"),
    ("GET", "/../../etc/passwd", None, {}, 404, "nothing at"),
    ("GET", "/%2e%2e/settings.py", None, {}, 404, "nothing at"),
    ("GET", "/v1/samples/12", None, {}, 404, "no sample 12"),
    pytest.param("GET", "/v1/samples/" + "1" * 5000, None, {}, 404, "there is no sample 111", id="a sample of 5,000 digits"),
    ("GET", "/v1/model?x=1", None, {}, 422, "takes none"),
    ("GET", "/healthz", None, {"Host": "evil.example"}, 421, "does not answer as 'evil.example'"),
    ("POST", "/v1/predict", b"", {"Content_Type": "image/png", "Sec_Fetch_Site": "cross-site"}, 403, "pages of other sites"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "headers", "status", "words"), REFUSALS)
def test_refusals_are_sentences(here, method, path, body, headers, status, words):
    got, answered, answer = Client(here[0]).ask(method, path, body, **headers)
    assert got == status
    assert words in json.loads(answer)["error"]
    for name, value in HEADERS.items():
        assert answered[name] == value


def test_limits_of_a_body(strict):
    address, _ = strict
    pass_ = {"Authorization": "Bearer a long enough secret"}
    start = time.monotonic()
    status, _, answer = Client(address).post("/v1/predict", bytes(30_000), "image/png", **pass_)
    assert (status, answer["error"]) == (413, "the body is larger than the 20,000 bytes that are accepted.")
    chunks = (bytes(4000) for _ in range(10))  # of a length that is not said
    client = Client(address)
    client.connection.request(
        "POST", "/v1/predict", chunks, {"Content-Type": "image/png", **pass_}, encode_chunked=True
    )
    assert client.connection.getresponse().status == 413
    status, _, answer = Client(address).post("/v1/predict", picture(1, size=(400, 100)), **pass_)
    assert status == 413
    assert "400x100 pixels" in answer["error"]
    assert time.monotonic() - start < 2
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, port)) as slow:
        slow.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\nContent-Type: image/png\r\n"
            b"Authorization: Bearer a long enough secret\r\n\r\nabc"
        )
        answer = slow.recv(4000)
        assert b" 408 " in answer
        assert b"connection: close" in answer.lower()


def test_a_token_is_asked_for(strict):
    address, _ = strict
    for path in ("/v1/model", "/v1/samples", "/v1/average", "/metrics", "/openapi.json", "/nothing"):
        status, headers, answer = Client(address).get(path)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "Authorization: Bearer TOKEN" in answer["error"]
        status, _, answer = Client(address).get(path, Authorization="Bearer a long enough secreT")
        assert (status, answer["error"]) == (401, "this is not the token that the server asks for.")
    for path in ("/", "/main.js", "/style.css", "/healthz", "/readyz"):
        assert Client(address).ask("GET", path)[0] == 200
    assert Client(address).get("/v1/model", Authorization="Bearer a long enough secret")[0] == 200


def test_metrics_count(here):
    address, service = here
    client = Client(address)
    before = (
        service.metrics.registry.get_sample_value("dynamixer_requests_total", {"path": "/v1/predict", "status": "200"})
        or 0
    )
    for seed in range(3):
        client.post("/v1/predict", picture(seed))
    _, headers, text = client.ask("GET", "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=")
    assert f'dynamixer_requests_total{{path="/v1/predict",status="200"}} {before + 3}' in text.decode()
    assert "dynamixer_ready 1.0" in text.decode()
    assert "process_resident_memory_bytes" in text.decode()
    client.ask("GET", "/some/name/of/a/stranger")
    assert "stranger" not in client.ask("GET", "/metrics")[2].decode()


def test_a_failure_is_a_sentence_too(model, monkeypatch, capsys):
    with server_here(model) as (address, service):
        monkeypatch.setattr(service.bodies, "picture", lambda request: 1 / 0)
        status, headers, answer = Client(address).post("/v1/predict", picture(1))
        assert (status, answer["error"]) == (500, "the server failed at this request; its log says how.")
        assert all(headers[name] == value for name, value in HEADERS.items())
        assert "division by zero" in capsys.readouterr().err
        assert Client(address).get("/healthz")[0] == 200


def test_limits_below_our_own_pictures_do_not_keep_it_from_serving(model):
    with server_here(model, max_bytes=5000, max_pixels=500) as (address, service):
        assert service.samples == []
        assert Client(address).post("/v1/predict", picture(1, size=(20, 20), format="PNG"))[0] == 200


def test_not_ready_where_the_served_answer_is_another(model):
    def tamper(service):
        honest = service.classifier._infer
        service.classifier._infer = lambda items: [[p + 2e-5 for p in row] for row in honest(items)]

    with server_here(model, change=tamper) as (address, service):
        end = time.monotonic() + 60
        while "warming up" in (service.not_ready or "") and time.monotonic() < end:
            time.sleep(0.05)
        status, headers, answer = Client(address).get("/readyz")
        assert (status, headers["Retry-After"]) == (503, "2")
        assert "differs by 2e-05 from that of dynamixer.predict" in answer["error"]
        assert Client(address).post("/v1/predict", picture(1))[0] == 503
        assert Client(address).get("/healthz")[0] == 200


def test_the_fast_way_answers_as_offline_alone_and_in_batches(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIXER_CACHE", str(tmp_path / "cache"))
    pictures = [picture(seed, size=(80 + 9 * seed, 120)) for seed in range(12)]
    expected = offline(model, pictures, tmp_path)
    with server_here(model, fast=True, batch=4) as (address, service):
        taken = []
        for part in ("few", "many"):
            fast = getattr(service.classifier, part)
            monkeypatch.setattr(fast, "forward", lambda x, run=fast.run: taken.append((run.batch, len(x))) or run(x))
        service.classifier.checkpoint.model.forward = None  # from here on it would be an error to ask it
        assert agrees(Client(address).post("/v1/predict?top=7", pictures[0])[2], expected[0])
        with ThreadPoolExecutor(12) as pool:
            answers = [*pool.map(lambda encoded: Client(address).post("/v1/predict?top=7", encoded)[2], pictures)]
        assert all(agrees(*pair) for pair in zip(answers, expected, strict=True))
        assert taken[0] == (1, 1)
        assert {batch for batch, _ in taken} == {1, 4}
        assert all(batch == (4 if count > 2 else 1) for batch, count in taken)


def test_a_model_of_another_kind_is_served_too(tmp_path):
    path = write_model(tmp_path / "other.safetensors", "resnet10t")
    encoded = picture(7)
    with server_here(path) as (address, _):
        status, _, answer = Client(address).post("/v1/predict", encoded)
        assert status == 200
        assert agrees(answer, offline(path, [encoded], tmp_path)[0])
        status, _, answer = Client(address).post("/v1/mixing", encoded)
        assert (status, answer["error"]) == (422, "resnet10t has no mixing matrices: it is not a DynaMixer.")
        assert Client(address).get("/v1/model")[2]["mixing"] is None


def test_too_many_connections_are_told_so(model):
    with server_here(model, connections=4) as (address, _):
        held = [Client(address) for _ in range(4)]
        for client in held:
            assert client.get("/healthz")[0] == 200
        refused = Client(address)
        response = refused.connection
        response.request("GET", "/healthz")
        answer = response.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
        assert held[0].get("/healthz")[0] == 200


def test_what_is_not_http_is_told_so(here):
    host, port = here[0].removeprefix("http://").rstrip("/").split(":")
    for said in (
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000,
        b"\x16\x03\x01\x02\0\r\n\r\n",
    ):
        with socket.create_connection((host, port), 5) as connection:
            connection.sendall(said)
            answer = b"".join(iter(lambda: connection.recv(4000), b""))  # until the server closes it
            assert answer.startswith(b"HTTP/1.1 400 "), answer
            assert json.loads(answer.split(b"\r\n\r\n")[1])["error"].startswith("this is not HTTP")


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="token is too short"):
        Settings(token="short")
    for token in ("", " 0123456789abcdef", "0123456789abcdef\n", "0123456789abcdeé"):
        with pytest.raises(UserError, match="token is too short or has letters"):
            Settings(token=token)
    assert Settings(token="0123456789abcdef").token
    with pytest.raises(UserError, match="max_bytes=1000000000 is more than all bodies together"):
        Settings(max_bytes=1_000_000_000)
    with pytest.raises(UserError, match="queue=0 has to be 1 or more"):
        Settings(queue=0)
    with pytest.raises(UserError, match="no address to listen on is given"):
        Settings(host="")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("127.1", True), ("LocalHost", True), ("::1", True), ("0:0:0:0:0:0:0:1", True),
     ("0.0.0.0", False), ("::", False), ("127.example.org", False), ("10.0.0.1", False)],
)  # fmt: skip
def test_only_this_machine_reaches_a_loopback_address(host, loopback):
    assert Settings(host=host).loopback is loopback


@pytest.fixture
def command(capsys):
    """The command in this process: (exit code, what it said)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main(["serve", *map(str, words)])
        return caught.value.code, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_users_mistakes_are_one_sentence(model, tmp_path, command, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = command("--model", model, "--port", port)
        assert code == 1
        assert f"127.0.0.1 port {port} cannot be listened on: Address already in use." in said
    code, said = command("--model", model, "--port", 0, "--samples", tmp_path)
    assert code == 2
    assert "has no picture that the server accepts" in said
    code, said = command("--model", model, "--port", 0, "--host", "no.such.host.invalid")
    assert code == 2
    assert "is not an address of this machine" in said
    monkeypatch.setenv("DYNAMIXER_TOKEN", "x")
    code, said = command("--model", model, "--port", 0)
    assert code == 2
    assert "the token is too short" in said
    monkeypatch.setenv("DYNAMIXER_TOKEN", "")  # a secret that nobody set
    code, said = command("--model", model, "--port", 0)
    assert code == 2
    assert "the token is too short" in said
    (tmp_path / "token").write_bytes(b"\xff")
    code, said = command("--model", model, "--port", 0, "--token-file", tmp_path / "token")
    assert code == 2
    assert "cannot be read as a token: it is not text." in said
    code, said = command("--model", model, "--port", 0, "--token-file", tmp_path / "none")
    assert code == 2
    assert "none cannot be read as a token: No such file or directory." in said
