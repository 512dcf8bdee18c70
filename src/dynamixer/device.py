"""Where things run: `auto`, or one named device that is there or is an error."""

import re
from typing import Any

import torch

from dynamixer.errors import UserError, did_you_mean
from dynamixer.logs import log

MOST = 127  # of the numbers that torch tells apart; larger ones come out as others
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def resolve_device(name: str = "auto") -> torch.device:
    """The device to run on; the choice is logged.

    Args:
        name: cpu, cuda, mps or xpu (with an index after a colon if there are several), or auto for the first accelerator
            that torch finds, else the CPU.

    Raises:
        UserError: an unknown name, or a device that this machine or this build of torch does not have.
    """
    kind, colon, index = name.partition(":")
    if kind not in DEVICES or (colon and (kind == "auto" or not re.fullmatch(r"[0-9]+", index))):
        raise UserError(f"unknown device {name!r}: {did_you_mean(kind, DEVICES)}")
    if kind == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found or torch.device("cpu")
    else:
        if index and (len(index) > 3 or str(int(index)) != index or int(index) > MOST):
            raise UserError(f"there is no {name}: devices are numbered from 0 to {MOST}.")
        device = torch.device(name)
        if kind != "cpu":
            backend: Any = getattr(torch, kind, None)
            if backend is None or not backend.is_available():
                raise UserError(
                    f"this machine has no {kind} device that torch can use: choose device=auto or device=cpu."
                )
            if index and int(index) >= backend.device_count():
                raise UserError(f"there is no {name}: this machine has {backend.device_count()} {kind} devices.")
    log(f"device: {device}" + (f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""))
    return device
