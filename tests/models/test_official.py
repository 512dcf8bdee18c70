"""Parity with the published code, and its weights in every wrapping."""

import argparse
import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dynamixer import DynaMixer, UserError, load_official
from dynamixer.models.official import _published_name
from helpers import FIXTURES

WEIGHTS, OUTPUTS = FIXTURES / "tiny_official_state_dict.safetensors", FIXTURES / "tiny_official_outputs.safetensors"


def tiny(num_classes=7):
    c = json.loads((FIXTURES / "tiny_config.json").read_text())
    return DynaMixer(
        img_size=c["img_size"],
        num_classes=num_classes,
        patch_size=c["patch_size"],
        depths=c["layers"],
        dims=c["embed_dims"],
        segments=c["num_heads"],
        reduced=c["reduced_dims"],
    )


def test_values_loss_and_gradients_are_those_of_the_published_code():
    model, expected = tiny(), load_file(OUTPUTS)
    load_official(model, WEIGHTS)
    got = {}
    layer = model.stages[0].blocks[0]
    layer.norm1.register_forward_hook(lambda _, given, y: got.update(tokens=given[0], norm1=y))
    layer.mixer.column.register_forward_hook(lambda _, given, y: got.update(mix_h=y))
    layer.mixer.row.register_forward_hook(lambda _, given, y: got.update(mix_w=y))
    layer.mixer.register_forward_hook(lambda _, given, y: got.update(block=y))
    images = expected.pop("images").requires_grad_()
    logits = model(images)
    loss = F.cross_entropy(logits, torch.tensor([0, 3, 6]))
    loss.backward()
    generate = layer.mixer.row.generate.weight.grad
    got |= {
        "logits": logits,
        "loss": loss,
        "grad_images": images.grad,
        "grad_compress_h0": layer.mixer.column.reduce.weight.grad,
        "grad_generate_w0": generate.unflatten(0, (6, 6)).transpose(0, 1).flatten(0, 1),
    }
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # The fixture would show the mistake that the layout invites: generator rows left as published.
    wrong = dict(model.state_dict())
    for key, value in model.state_dict().items():
        if ".generate." in key:
            length = round(len(value) ** 0.5)
            wrong[key] = value.unflatten(0, (length, length)).transpose(0, 1).flatten(0, 1)
    model.load_state_dict(wrong)
    assert (model(images) - expected["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["s", "m", "l"])
def test_the_published_keys_and_shapes_are_ours_renamed(name):
    keys = json.loads((FIXTURES / f"official_keys_{name}.json").read_text())
    model = timm.create_model(f"dynamixer_{name}", device="meta")
    ours = {_published_name(k, model): list(v.shape) for k, v in model.state_dict().items()}
    assert ours == keys


def published():
    return load_file(WEIGHTS)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {f"module.{k}": v for k, v in sd.items()},
        lambda sd: {"state_dict": sd, "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
        lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}},
        lambda sd: {"state_dict": {k: torch.zeros_like(v) for k, v in sd.items()}, "state_dict_ema": sd},
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_every_wrapping_loads(wrap, as_file, tmp_path):
    content = wrap(published())
    if as_file:
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        content = tmp_path / "checkpoint.pth.tar"
    model = tiny()
    load_official(model, content)
    expected = load_file(OUTPUTS)
    torch.testing.assert_close(model(expected["images"]), expected["logits"], rtol=0, atol=1e-5)


def test_another_class_count_loads_without_the_head():
    model = tiny(num_classes=3)
    head = model.head.weight.clone()
    load_official(model, WEIGHTS, head=False)
    assert torch.equal(model.head.weight, head)
    expected = load_file(OUTPUTS)
    hidden = model.forward_head(model.forward_features(expected["images"]), pre_logits=True)
    logits = F.linear(hidden, published()["head.weight"], published()["head.bias"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)


def test_a_mismatch_is_one_message_with_every_key_and_changes_nothing():
    given = published()
    del given["network.0.0.norm1.bias"], given["norm.weight"]
    given["network.0.0.attn.extra"] = torch.zeros(1)
    given["patch_embed.proj.bias"] = torch.zeros(17)
    model = tiny(num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_official(model, given)
    message = str(caught.value)
    assert "missing: network.0.0.norm1.bias, norm.weight;" in message
    assert "unexpected: network.0.0.attn.extra;" in message
    assert "patch_embed.proj.bias (17,), not (16,)" in message
    assert "head.weight (7, 24), not (3, 24)" in message
    assert "head=False" in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_option_of_ours_is_a_missing_key():
    model = timm.create_model("dynamixer_nano", static=True)
    with pytest.raises(UserError, match=r"missing: .*mixer\.row\.static"):
        load_official(model, {"head.bias": torch.zeros(10)})


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_file_that_would_execute_code_is_refused(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"state_dict": Harmful()}, protocol=2))
    torch.save({"state_dict": Harmful()}, tmp_path / "evil2.pth")
    for evil in (path, tmp_path / "evil2.pth"):
        with pytest.raises(UserError, match="cannot be read as weights"):
            load_official(tiny(), evil)
    assert "executed" not in capsys.readouterr().out


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*nothing"):
        load_official(tiny(), tmp_path / "nothing.pth")
    (tmp_path / "short.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match=r"short.safetensors cannot be read"):
        load_official(tiny(), tmp_path / "short.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        load_official(tiny(), tmp_path / "list.pt")
    with pytest.raises(UserError, match="no tensors"):
        load_official(tiny(), {"epoch": 3})
    save_file({"head.bias": torch.zeros(7)}, tmp_path / "partial.safetensors")
    with pytest.raises(UserError, match=r"missing: head.weight"):
        load_official(tiny(), tmp_path / "partial.safetensors")
