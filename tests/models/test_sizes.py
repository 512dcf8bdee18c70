"""Picture sizes as timm keeps them: what timm saves after another native size is what timm and dynamixer read."""

import json

import pytest
import timm
import torch

import dynamixer
from helpers import sharpen

NAME = "dynamixer_nano"


@pytest.mark.parametrize("resized", [False, True], ids=["built at the size", "resized to it"])
def test_what_timm_saves_at_another_size_is_read_at_that_size(tmp_path, resized):
    model = timm.create_model(NAME, num_classes=3, **({} if resized else {"img_size": (40, 24)}))
    sharpen(model)
    if resized:
        model.set_input_size((40, 24))
    timm.models.save_for_hf(
        model.eval(), tmp_path / "saved", safe_serialization=True, model_config={"label_names": ["x", "y", "z"]}
    )
    x = torch.randn(2, 3, 40, 24)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(theirs(x), model(x))
    assert (model(x) - model(x.flip(-1))).abs().max() > 1e-2
    ours = dynamixer.load(tmp_path / "saved")
    assert ours.preprocessing.size == (40, 24)
    assert torch.equal(ours.model(x), model(x))
    other = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, img_size=(48, 48)).eval()
    model.set_input_size((48, 48))
    torch.testing.assert_close(other(x.repeat(1, 1, 2, 2)[..., :48, :48]), model(x.repeat(1, 1, 2, 2)[..., :48, :48]))


def test_a_size_in_the_configuration_alone_changes_no_weights():
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"input_size": (3, 48, 48)}).eval()
    plain = timm.create_model(NAME, pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), plain(x))


def test_a_loaded_model_tells_timm_of_its_own_preprocessing_and_classes(tmp_path):
    model = timm.create_model(NAME, num_classes=2, img_size=(40, 24))
    about = {"label_names": ["x", "y"], "pretrained_cfg": {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}}
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["pretrained_cfg"] |= about.pop("pretrained_cfg")
    (tmp_path / "saved/config.json").write_text(json.dumps(config | about))
    loaded = dynamixer.load(tmp_path / "saved")
    data = timm.data.resolve_model_data_config(loaded.model)
    assert (data["input_size"], data["mean"], data["crop_pct"]) == ((3, 40, 24), (0.1, 0.2, 0.3), 0.8)
    assert loaded.model.pretrained_cfg["label_names"] == ("x", "y")


def test_fresh_weights_have_no_names_of_the_classes_of_others():
    assert "label_names" not in timm.create_model(NAME, num_classes=10).pretrained_cfg
    assert timm.create_model(NAME, pretrained=True).pretrained_cfg["label_names"][0] == "airplane"
