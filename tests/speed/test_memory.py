from pathlib import Path

import pytest
import torch

from dynamixer.native import keep_memory
from dynamixer.speed import memory
from dynamixer.speed.memory import peak_mib


@pytest.mark.parametrize("kept", [False, True])
def test_the_peak_is_what_a_call_holds_at_once(kept):
    if kept:
        keep_memory()
    mib = 2**18  # numbers of four bytes

    def one_after_the_other():
        for _ in range(3):
            torch.ones(40 * mib)

    def together():
        return sum(part.sum() for part in [torch.ones(40 * mib) for _ in range(3)])

    assert peak_mib(one_after_the_other) == pytest.approx(40, abs=8)
    assert peak_mib(together) == pytest.approx(120, abs=8)
    assert peak_mib(lambda: None) == pytest.approx(0, abs=8)


def test_where_the_system_does_not_tell_there_is_no_figure(monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", Path("/nowhere"))
    assert peak_mib(lambda: None) is None
