import pytest
import torch

from dynamixer import UserError
from dynamixer.device import resolve_device


def test_the_choice_is_logged(capsys):
    assert resolve_device("cpu") == torch.device("cpu")
    assert "device: cpu" in capsys.readouterr().err
    chosen = resolve_device("auto")
    assert chosen.type == (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("cuda:x", "unknown device"),
        ("cpu:99999999999999999999", "there is no cpu:9"),
        ("cpu:128", "numbered from 0 to 127"),
        ("cpu:007", "there is no cpu:007"),
        ("", "unknown"),
        ("cpu:", "unknown device 'cpu:'"),
        ("cpu:²", "unknown device"),
        ("auto:1", "unknown device 'auto:1'"),
    ],
)
def test_unknown_devices_are_refused(name, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_devices_that_are_not_there_are_refused(name):
    if getattr(torch, name).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(UserError, match=f"no {name} device that torch can use: choose device=auto"):
        resolve_device(name)
