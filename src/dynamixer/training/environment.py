"""What a run was computed by: versions, machine, code."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

import dynamixer
from dynamixer.native import computes_in_bf16, processor_name


def cpu_name() -> str:
    """The processor, and whether it computes in bf16 itself, or else how it does in fp32."""
    return f"{processor_name()} ({'bf16' if computes_in_bf16() else torch.backends.cpu.get_cpu_capability()})"


def commit() -> str | None:
    """That of the code, where it lies in its repository."""
    found = None
    for words in (["ls-files", "--error-unmatch", __file__], ["rev-parse", "HEAD"]):
        git = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None  # installed from a wheel, perhaps inside somebody else's repository
    return found


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, machine and the commit of the code, as environment.json of a run folder holds them."""
    return {
        "dynamixer": dynamixer.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }
