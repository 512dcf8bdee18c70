"""captum's methods on our models keep their own promises."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from small_models import BAG, pictures, saved, small

captum = pytest.importorskip("captum.attr", reason="the extra `explain` is not installed")
ROOT = Path(__file__).parents[2]
OPTIONS = pytest.mark.parametrize("options", [{}, {"softmax": False}, {"generator": "dense"}, {"enlarge": True}])


@OPTIONS
def test_integrated_gradients_add_up_to_what_the_logit_gains(options):
    model, x = small(**options), 0.3 * pictures((12, 18))
    with torch.no_grad():
        gain = (model(x) - model(torch.zeros_like(x)))[:, 1]
    found = captum.IntegratedGradients(model).attribute(x, target=1, n_steps=300, internal_batch_size=64)
    assert (found.sum((1, 2, 3)) - gain).abs().max() < 0.05 * gain.abs().max()


@OPTIONS
def test_occlusion_is_what_the_logit_loses(options):
    model, x = small(**options), pictures(count=1)
    found = captum.Occlusion(model).attribute(x, sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4), target=2)
    covered = x.clone()
    covered[:, :, 4:8, 8:12] = 0
    with torch.no_grad():
        loss = float((model(x) - model(covered))[0, 2])
    assert float(found[0, 0, 5, 9]) == pytest.approx(loss, abs=1e-4)


def test_ablation_and_shapley_values_keep_their_promises():
    model, x = small(), pictures(count=1)
    quarters = (torch.arange(16)[:, None] // 8 * 2 + torch.arange(16)[None] // 8).repeat(1, 3, 1, 1)
    without = x * (quarters != 2)
    with torch.no_grad():
        logits, gone, nothing = (model(picture)[0, 1] for picture in (x, without, torch.zeros_like(x)))
    ablated = captum.FeatureAblation(model).attribute(x, target=1, feature_mask=quarters)
    assert float(ablated[0, 0, 9, 2]) == pytest.approx(float(logits - gone), abs=1e-4)
    shares = captum.ShapleyValues(model).attribute(x, target=1, feature_mask=quarters)
    total = float(shares[0, 0, ::8, ::8].sum())  # one pixel of each quarter
    assert total == pytest.approx(float(logits - nothing), abs=1e-4)


def test_grad_cam_is_that_of_the_maps_before_the_pooling():
    model, x = small(), pictures(count=1)
    found = captum.LayerGradCam(model, model.global_pool).attribute(x, target=0, attribute_to_layer_input=True)
    with torch.no_grad():
        maps = model.forward_features(x)
        expected = (model.head.weight[0] / 16) @ maps[0].flatten(1)  # the pooling is a mean over 4x4 tokens
    assert torch.allclose(found.flatten(), expected, atol=1e-5)


def test_the_example_draws_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attribution.py", str(BAG), str(saved(tmp_path)), str(tmp_path / "out.png")])
    runpy.run_path(str(ROOT / "examples" / "attribution.py"), run_name="__main__")
    words = capsys.readouterr().out.split()
    gain, total = float(words[4].rstrip(",")), float(words[-1])
    assert gain == pytest.approx(total, abs=0.1 * abs(gain) + 0.02)
    drawn = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    assert (np.abs(drawn[..., 0] - drawn[..., 2]) > 60).mean() > 0.02  # red and blue


def test_what_the_page_warns_of_is_so():
    model, x = small(), pictures(count=1)
    with torch.no_grad():
        gain = float((model(x) - model(torch.zeros_like(x)))[0, 1])
    simple = captum.InputXGradient(model).attribute(x.requires_grad_(), target=1)
    with pytest.warns(UserWarning, match="Setting forward, backward hooks"):
        deep = captum.DeepLift(model).attribute(x, target=1)
    assert torch.allclose(deep, simple, atol=1e-5)
    assert abs(float(deep.detach().sum()) - gain) > 0.2 * abs(gain)
    plain = captum.Saliency(model).attribute(x, target=1, abs=False)
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU"):
        guided = captum.GuidedBackprop(model).attribute(x, target=1)
    assert torch.allclose(guided, plain, atol=1e-5)
    with pytest.raises(TypeError, match="LayerNorm"):
        captum.LRP(model).attribute(x, target=1)
