"""Files of strangers: refused with a sentence, and nothing in them is run, imported or opened (an audit hook looks)."""

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import dynamixer
from dynamixer import UserError
from dynamixer.data import Preprocessing
from dynamixer.hub import timm_config
from dynamixer.models.about import KEY
from dynamixer.models.checkpoint import create_model, save_checkpoint

ARGS = {"num_classes": 2, "depths": [1], "dims": [8], "segments": [2], "reduced": [2]}
WATCHED = {"exec", "compile", "import", "marshal.loads", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork",
           "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "shutil.rmtree", "os.remove",
           "os.rename"}  # fmt: skip
seen, inside, watching = [], [""], [False]


def _hook(event, arguments):
    if not watching[0]:
        return
    outside = event == "open" and isinstance(arguments[0], str | bytes)
    outside = outside and not os.fsdecode(arguments[0]).startswith(inside[0])
    if event in WATCHED or outside:
        seen.append((event, str(arguments)[:200]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder):
    seen.clear()
    inside[0], watching[0] = str(folder), True
    try:
        yield
    finally:
        watching[0] = False


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/dynamixer-was-here",)


def weights():
    return {k: v.clone() for k, v in create_model("dynamixer_nano", **ARGS).state_dict().items()}


def grey():
    return create_model("dynamixer_nano", **ARGS, in_chans=1)


def about(**change):
    pre = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3).to_dict()
    made = {"format": 1, "dynamixer": "0", "model": "dynamixer_nano", "model_args": ARGS, "classes": ["a", "b"]}
    return {**made, "preprocessing": pre, "trained": {}} | change


def raw(header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def packed(made=None, text=None, **change):
    """A safetensors file written by hand: what the library would not write, it has to refuse to read."""
    header, data = {"__metadata__": {KEY: json.dumps(about(**change)) if text is None else text}}, b""
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16", torch.bool: "BOOL", torch.float64: "F64"}
    for key, value in (weights() if made is None else made).items():
        content = value.numpy().tobytes()
        header[key] = {
            "dtype": kinds[value.dtype],
            "shape": [*value.shape],
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return header, data


def file(**change):
    return raw(*packed(**change))


def spoilt(change):
    header, data = packed()
    change(header)
    return raw(header, data)


def with_weights(change):
    made = weights()
    change(made)
    return file(made=made)


def set_value(made, key, value):
    made[key].view(-1)[0] = value


def zipped(*members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def torch_saved(value, **options):
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def numpy_saved(value):
    out = io.BytesIO()
    np.save(out, value, allow_pickle=True)
    return out.getvalue()


def twice():
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return raw(f"{{{one},{one}}}".encode(), bytes(4))


def entry(**change):
    def apply(header):
        header["norm.bias"] |= change

    return spoilt(apply)


def args(**change):
    return file(model_args=ARGS | change)


def preprocessing(**change):
    return file(preprocessing=about()["preprocessing"] | change)


BEST = {  # a run folder's best.safetensors
    "pickle": lambda: pickle.dumps(Bomb()),
    "pickle, protocol 0": lambda: pickle.dumps(Bomb(), protocol=0),
    "torch.save": lambda: torch_saved({"a": Bomb()}),
    "torch.save, old format": lambda: torch_saved({"a": Bomb()}, _use_new_zipfile_serialization=False),
    "torch.save of good weights": lambda: torch_saved(weights()),
    "numpy object array": lambda: numpy_saved(np.array([Bomb()])),
    "zip": lambda: zipped(("data.pkl", pickle.dumps(Bomb()))),
    "zip that climbs": lambda: zipped(("../../../etc/cron.d/x", b"* * * * * root touch /tmp/x")),
    "zip bomb": lambda: zipped(("a", b"\0" * 10**7)),
    "zip after a header": lambda: raw({}, zipped(("data.pkl", pickle.dumps(Bomb())))),
    "good file with a zip behind": lambda: file() + zipped(("data.pkl", pickle.dumps(Bomb()))),
    "good file with a pickle behind": lambda: file() + pickle.dumps(Bomb()),
    "python": lambda: b"import os; os.system('touch /tmp/dynamixer-was-here')",
    "shell": lambda: b"#!/bin/sh\ntouch /tmp/dynamixer-was-here\n",
    "shared library": lambda: b"\x7fELF" + bytes(200),
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "header of zero bytes": lambda: raw(b""),
    "header longer than the file": lambda: raw(b"{}", length=10**6),
    "header of 2**63 bytes": lambda: raw(b"{}", length=2**63),
    "header of 2**64 - 1 bytes": lambda: raw(b"{}", length=2**64 - 1),
    "header of 101 MB": lambda: raw(b"{" + b" " * 101_000_000 + b"}"),
    "header that is no JSON": lambda: raw(b"not json"),
    "header that is a list": lambda: raw([1]),
    "header that is no text": lambda: raw(b"\xff\xfe{}"),
    "header nested deeply": lambda: raw(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "key twice": twice,
    "metadata that is no text": lambda: spoilt(lambda h: h.update({"__metadata__": {KEY: {"a": 1}}})),
    "overlap": lambda: entry(data_offsets=[0, 32]),
    "offsets backwards": lambda: entry(data_offsets=[64, 32]),
    "offsets behind the end": lambda: entry(data_offsets=[10**9, 10**9 + 32]),
    "negative offset": lambda: entry(data_offsets=[-32, 0]),
    "hole": lambda: spoilt(lambda h: h.pop("norm.bias")),
    "shape larger than its bytes": lambda: entry(shape=[10**6]),
    "shape that overflows": lambda: entry(shape=[2**32, 2**32, 2**32]),
    "negative shape": lambda: entry(shape=[-8]),
    "unknown dtype": lambda: entry(dtype="PICKLE"),
    "8-bit floats": lambda: spoilt(lambda h: h["norm.bias"].update(dtype="F8_E4M3", shape=[32])),
    "complex": lambda: spoilt(lambda h: h["norm.bias"].update(dtype="C64", shape=[4])),
    "truncated": lambda: file()[:-1],
    "no weights": lambda: file(made={}),
    "wrong shape": lambda: with_weights(lambda w: w.update({"head.bias": torch.zeros(3)})),
    "missing weight": lambda: with_weights(lambda w: w.pop("head.bias")),
    "weight too many": lambda: with_weights(lambda w: w.update({"extra": torch.zeros(1)})),
    "whole numbers for weights": lambda: with_weights(lambda w: w.update({"head.bias": torch.zeros(2, dtype=torch.int64)})),
    "NaN": lambda: with_weights(lambda w: set_value(w, "head.bias", float("nan"))),
    "infinity": lambda: with_weights(lambda w: set_value(w, "stages.0.blocks.0.mixer.row.generate.weight", float("inf"))),
    "NaN in fp16": lambda: with_weights(lambda w: w.update({"head.bias": torch.tensor([0, float("nan")]).half()})),
    "a model of timm's for which no memory is enough": lambda: file(
        model="vit_tiny_patch16_224", model_args={"num_classes": 2, "embed_dim": 2**15, "depth": 32, "num_heads": 8}
    ),
    "nested description": lambda: file(text="[" * 100_000),
    "number of 10,000 digits": lambda: file(text="1" * 10_000),
    "class of Python as model": lambda: file(model="os.system"),
    "path as model": lambda: file(model="/etc/passwd"),
    "address as model": lambda: file(model="hf-hub:evil/model"),
    "folder as model": lambda: file(model="local-dir:/tmp"),
    "checkpoint_path": lambda: args(checkpoint_path="/etc/passwd"),
    "pretrained": lambda: args(pretrained=True),
    "pretrained_cfg with a file": lambda: args(pretrained_cfg={"file": "/etc/passwd", "custom_load": True}),
    "cache_dir": lambda: args(cache_dir="/etc"),
    "code in an option": lambda: args(generator="__import__('os').system('id')"),
    "class in an option": lambda: args(stem="torch.nn.Module"),
    "option of another kind": lambda: args(dims={"__reduce__": "os.system"}),
    "a thousand million layers": lambda: args(depths=[10**9]),
    "layers without weights": lambda: args(depths=[999]),
    "words as layers": lambda: args(depths=["a"]),
    "nothing as layers": lambda: args(depths=[None]),
    "one channel": lambda: file(made=grey().state_dict(), model_args=ARGS | {"in_chans": 1}),
    "no pooling": lambda: args(global_pool=""),
    "a size without sides": lambda: preprocessing(size=[]),
    "a size of one side": lambda: preprocessing(size=[32]),
    "a size of three sides": lambda: preprocessing(size=[32, 32, 32]),
    "terabytes of weights": lambda: args(dims=[8_000_000]),
    "picture of 10**9 pixels": lambda: args(img_size=10**9),
    "escape codes in a class name": lambda: file(classes=["a", "\x1b]0;owned\x07b"]),
    "classes that are no words": lambda: file(classes=[{"__class__": "os.system"}, 1]),
    "more classes than outputs": lambda: file(classes=["a", "b", "c"]),
    "NaN as std": lambda: file(text=json.dumps(about(preprocessing=about()["preprocessing"] | {"std": [float("nan")] * 3}))),
    "std 0": lambda: preprocessing(std=[0, 1, 1]),
    "absurd picture size": lambda: preprocessing(size=[10**9, 10**9]),
    "path as interpolation": lambda: preprocessing(interpolation="../../x"),
    "code in preprocessing": lambda: preprocessing(__class__="os.system"),
    "format 99": lambda: file(format=99),
    "no description": lambda: spoilt(lambda h: h.pop("__metadata__")),
}  # fmt: skip


def config(**change):
    checkpoint = dynamixer.models.checkpoint.Checkpoint(
        create_model("dynamixer_nano", **ARGS), "dynamixer_nano", ARGS, ("a", "b"),
        Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3), {}, None,
    )  # fmt: skip
    return timm_config(checkpoint) | change


def pretrained(**change):
    made = config()
    return made | {"pretrained_cfg": made["pretrained_cfg"] | change}


CONFIGS = {  # the config.json beside a model.safetensors without a description of ours
    "no JSON": lambda: "not json",
    "a list": lambda: "[]",
    "nested": lambda: "[" * 100_000,
    "20 MB": lambda: " " * 20_000_000,
    "class as architecture": lambda: config(architecture="os.system"),
    "path as architecture": lambda: config(architecture="../../etc/passwd"),
    "list as architecture": lambda: config(architecture=["dynamixer_nano"]),
    "file": lambda: pretrained(file="/etc/passwd"),
    "url": lambda: pretrained(url="http://evil.example/x.bin"),
    "hf_hub_id": lambda: pretrained(hf_hub_id="evil/model"),
    "custom_load": lambda: pretrained(custom_load=True),
    "checkpoint_path": lambda: config(model_args=ARGS | {"checkpoint_path": "/etc/passwd"}),
    "features_only": lambda: config(model_args=ARGS | {"features_only": True}),
    "no classes": lambda: config(num_classes=0, label_names=[]),
    "a million million classes": lambda: config(num_classes=10**12, label_names=None),
    "labels missing": lambda: config(label_names={"0": "a"}),
    "input_size a word": lambda: pretrained(input_size="big"),
    "squash": lambda: pretrained(crop_mode="squash"),
}


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory):
    """What Python imports late, it imports here; and the good files of both kinds are read."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "best.safetensors").write_bytes(file())
    assert dynamixer.load(folder).classes == ("a", "b")
    (folder / "hub").mkdir()
    (folder / "hub" / "model.safetensors").write_bytes(BEST["no description"]())
    (folder / "hub" / "config.json").write_text(json.dumps(config()))
    assert dynamixer.load(folder / "hub").classes == ("a", "b")
    for model in ("os.system", "test_vit"):
        with contextlib.suppress(UserError):
            create_model(model, num_classes=2, nothing=1)


def refused(path, folder):
    started = time.monotonic()
    with pytest.raises(UserError) as raised, watched(folder):
        dynamixer.load(path)
    watching[0] = False
    assert seen == []
    assert time.monotonic() - started < 10
    text = str(raised.value)
    assert len(text) < 1500
    assert "\x1b" not in text
    assert "Traceback" not in text
    return text


def test_there_are_as_many_as_the_page_says():
    page = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
    assert f"{len(BEST) + len(CONFIGS)} files under an audit hook" in page


@pytest.mark.parametrize("name", BEST)
def test_a_hostile_checkpoint_is_refused_and_nothing_is_run(name, tmp_path):
    path = tmp_path / "best.safetensors"
    path.write_bytes(BEST[name]())
    assert str(path) in refused(tmp_path, tmp_path)
    assert not os.path.exists("/tmp/dynamixer-was-here")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_refused_and_nothing_is_run(name, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(BEST["no description"]())
    value = CONFIGS[name]()
    (tmp_path / "config.json").write_text(value if isinstance(value, str) else json.dumps(value))
    assert str(tmp_path) in refused(tmp_path, tmp_path)


def test_pickles_beside_a_config_are_not_looked_at(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    for name in ("pytorch_model.bin", "model.pth", "best.pt"):
        (tmp_path / name).write_bytes(torch_saved({"a": Bomb()}))
    assert "is not a run folder" in refused(tmp_path, tmp_path)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc", "loop"])
def test_a_link_out_of_the_folder_does_not_hang(target, tmp_path):
    (tmp_path / "best.safetensors").symlink_to(tmp_path / "best.safetensors" if target == "loop" else target)
    with pytest.raises(UserError):
        dynamixer.load(tmp_path)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "best.safetensors")
    with pytest.raises(UserError):
        dynamixer.load(tmp_path)


def test_the_hook_sees_what_it_should(tmp_path):
    with watched(tmp_path):
        pickle.loads(pickle.dumps(save_checkpoint))
        with open("/etc/passwd"):
            pass
    assert {event for event, _ in seen} == {"pickle.find_class", "open"}
