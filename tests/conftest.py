import os

import pytest
import torch

from dynamixer.ops.kernel import load_kernel

os.environ["MPLBACKEND"] = "Agg"


def pytest_sessionstart(session):
    """Build the kernel once, before several workers want it at the same time."""
    if not hasattr(session.config, "workerinput"):
        load_kernel()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
