import subprocess
import sys
from pathlib import Path

import pytest

from dynamixer.native import processor_name

FAULTS = """
import resource, sys, torch
from dynamixer.native import keep_memory
assert keep_memory() if sys.argv[1] == "keep" else True
def step():
    return [torch.zeros(2**24) for _ in range(4)]  # more than glibc ever keeps by itself
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_memory_that_is_kept_is_not_asked_for_again():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("give back") / 5  # how large a page is, the system decides


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 26\n\nmodel name\t: another\n", "AMD EPYC, family 26"),
        ("cpu family\t: 25\nmodel name\t: AMD EPYC 7763 64-Core Processor\n", "AMD EPYC 7763 64-Core Processor"),
    ],
)
def test_a_processor_is_called_by_its_name_and_if_that_says_little_its_family(monkeypatch, told, name):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert processor_name.__wrapped__() == name
