import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from dynamixer.native import keep_memory
assert keep_memory() if sys.argv[1] == "keep" else True
def step():
    return [torch.zeros(2**22) for _ in range(4)]
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
