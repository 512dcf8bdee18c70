import os

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
