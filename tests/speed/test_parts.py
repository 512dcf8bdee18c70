"""Where the time of the kernels goes."""

import pytest
import torch
from torch import nn

from dynamixer.cli import main
from dynamixer.layers import MixerLayer
from dynamixer.speed import parts as module
from dynamixer.speed.bench import Plan, example_model
from dynamixer.speed.parts import multiply_adds, parts
from dynamixer.speed.report import parts_table


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CALLS", 1)
        return parts(["dynamixer_nano"], Plan(batch=2))


def test_every_operation_of_a_step_has_its_time(found):
    inference, training = found["profiles"]
    assert (inference["what"], training["what"]) == ("inference", "training step")
    forward, step = ({p["operation"].rpartition(":")[2]: p for p in one["parts"]} for one in (inference, training))
    assert {"tail", "mix", "normed", "means", "mkldnn_convolution", module.REST} == set(forward)
    assert set(step) > {"tail", "tail_grads", "branch_grads", "mix_grads", "normed_grads", "pack", "_fused_adamw_"}
    for one in (inference, training):
        assert sum(part["share"] for part in one["parts"]) == pytest.approx(1)
        assert sum(part["ms"] for part in one["parts"]) == pytest.approx(one["ms"])
        assert one["bound_ms"] > 0
    assert training["bound_gflop_per_s"] * training["bound_ms"] == pytest.approx(
        3 * inference["bound_gflop_per_s"] * inference["bound_ms"], rel=0.05
    )  # both passes are three times one; the pictures have no gradients


def test_the_products_inside_are_those_of_the_linear_layers(found):
    model, seen = example_model("dynamixer_nano"), []

    def count(layer, given, out):
        tokens = out.numel() // out.shape[-1]
        for name, part in layer.named_modules():
            is_inside = name.rpartition(".")[2] in ("project", "channel", "fc1", "fc2") and "reweight" not in name
            seen.append(tokens * part.weight.numel() if isinstance(part, nn.Linear) and is_inside else 0)

    for layer in (part for part in model.modules() if isinstance(part, MixerLayer)):
        layer.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.randn(2, 3, 32, 32))
    (tail,) = (p for p in found["profiles"][0]["parts"] if p["operation"] == "dynamixer::tail")
    assert tail["gflop_per_s"] * tail["ms"] * 1e6 == pytest.approx(2 * sum(seen))
    rates = {p["operation"]: p["gflop_per_s"] * p["ms"] for p in found["profiles"][1]["parts"] if "gflop_per_s" in p}
    forward = rates.pop("dynamixer::tail")
    assert sum(rates.values()) == pytest.approx(2 * forward)
    assert multiply_adds("aten::mm", []) == 0


def test_the_table_and_the_mistakes(found, capsys):
    text = parts_table(found)
    assert "dynamixer_nano, 32x32, fp32, inference, batch 2" in text
    assert text.count("Its matrix products alone, each by itself") == 2
    assert "| fused_adamw | AdamW |" in text
    for words, said in (
        (["resnet18", "--parts"], "resnet18 is no DynaMixer"),
        (["--parts", "--scale"], "give one of them"),
        (["--parts", "--rounds", "3", "--no-fast"], "--parts has no use for --rounds and --fast"),
        (["--scale", "--train-batch", "3"], "--scale has no use for --train-batch"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["bench", *words])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
