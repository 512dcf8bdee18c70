"""freeze=PATTERN: what fits stays as it was, to the bit; the rest is trained, and resuming works."""

import pytest
import torch

import dynamixer
from dynamixer import TrainConfig, UserError
from dynamixer.training.setup import build_network

ARGS = {"patch_size": 8, "depths": (1, 1), "dims": (16, 32), "segments": (2, 4)}


def config(**change):
    options = {
        "model_args": ARGS, "epochs": 2, "limit_train": 128, "batch_size": 64, "crop": "none", "device": "cpu", "lr": 5e-3,
        "holdout": 0.02, "track": "none", "freeze": "*.generate.*", "ema": 0.9, "warmup_epochs": 0,
    }  # fmt: skip
    return TrainConfig(**(options | change))


def start():
    torch.manual_seed(0)
    return build_network(config(), "abcdefghij").model.state_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return dynamixer.train(config(), tmp_path_factory.mktemp("freeze") / "run").run


def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(run):
    before, after = start(), dynamixer.load(run / "last.safetensors").model.state_dict()
    frozen = {name for name in before if ".generate." in name}
    assert len(frozen) == 8  # weight and bias of two axes in two blocks
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (name in frozen), name


def test_a_resumed_run_has_the_same_bits(run, tmp_path, monkeypatch):
    from dynamixer.training import engine  # noqa: PLC0415

    class StopError(Exception):
        pass

    step = engine._Run._step

    def stopping(self, number, loader, meter):
        if number == 3:
            raise StopError
        step(self, number, loader, meter)

    monkeypatch.setattr(engine._Run, "_step", stopping)
    with pytest.raises(StopError):
        dynamixer.train(config(checkpoint_every=1), tmp_path / "run")
    monkeypatch.undo()
    resumed = dynamixer.train(config(checkpoint_every=1), tmp_path / "run").run
    one, other = (dynamixer.load(folder / "last.safetensors").model.state_dict() for folder in (run, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_kernel_trains_the_rest_too():
    from dynamixer.speed import use_kernel  # noqa: PLC0415

    network = build_network(config(), "abcdefghij")
    model = use_kernel(network.model)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, _ in model.named_parameters()} - grads == {
        name for name, _ in model.named_parameters() if ".generate." in name
    }


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("*.generator.*", r"freeze=\*.generator.\* fits no parameter of dynamixer_nano: their names are like stages"),
        ("*", "freeze=.* fits every parameter of dynamixer_nano, which leaves nothing to train"),
    ],
)
def test_a_pattern_that_fits_nothing_or_all_is_a_sentence(pattern, sentence):
    with pytest.raises(UserError, match=sentence):
        build_network(config(freeze=pattern), "abcdefghij")
