import pytest
import torch

from dynamixer.speed.memory import peak_mib

MIB = 2**18  # numbers of four bytes


def test_the_peak_is_what_a_call_holds_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.ones(4 * MIB)

    def together():
        return sum(part.sum() for part in [torch.ones(4 * MIB) for _ in range(3)])

    assert peak_mib(one_after_the_other) == pytest.approx(4, abs=0.01)
    assert peak_mib(together) == pytest.approx(12, abs=0.01)
    assert peak_mib(lambda: None) == 0


def test_torchs_profiler_is_not_heard(capfd):
    peak_mib(lambda: None)
    assert capfd.readouterr() == ("", "")


def test_what_was_there_before_and_what_is_let_go_do_not_count():
    held = [torch.ones(8 * MIB)]

    def let_go():
        held.clear()
        return torch.ones(2 * MIB)

    assert peak_mib(let_go) == pytest.approx(2, abs=0.01)


def test_gradients_count_and_weights_do_not():
    layer, x = torch.nn.Linear(1024, 1024), torch.ones(1, 1024)

    def step():
        layer(x).sum().backward()
        layer.zero_grad()

    assert peak_mib(step) == pytest.approx(4, abs=0.1)
