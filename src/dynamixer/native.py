"""The user's own folder for native code: compiled here, for this processor, and never taken from anywhere else."""

import ctypes
import hashlib
import os
import platform
import stat
from functools import cache
from pathlib import Path

import torch

from dynamixer.errors import UserError


def cache_folder(kind: str) -> Path:
    """A folder of `kind` in $DYNAMIXER_CACHE, or else ~/.cache/dynamixer, that nobody else can write to (mode 0700).

    Raises:
        UserError: it belongs to somebody else, others can write to it, or it cannot be made.
    """
    base = os.environ.get("DYNAMIXER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dynamixer")
    folder = Path(base).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): set DYNAMIXER_CACHE to another folder.") from None
    if hasattr(os, "getuid") and about.st_uid != os.getuid():
        raise UserError(
            f"{folder} belongs to another user, whose code is not run: set DYNAMIXER_CACHE to a folder of yours."
        )
    if not stat.S_ISDIR(about.st_mode) or stat.S_IMODE(about.st_mode) & 0o022:
        raise UserError(f"others can write to {folder}, whose code is not run then: chmod 700 it, or remove it.")
    folder.chmod(0o700)
    return folder


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for its next step, in place of giving it back page by page.

    For a process of one's own, such as a command's: it holds the most that it ever needed until it ends.

    Returns:
        Whether the C library could be told (glibc can).
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 2**26)])


def digest(*parts: bytes | str) -> str:
    """A name for what was made from `parts` with this torch on this processor."""
    made = hashlib.sha256()
    for part in (*parts, torch.__version__, processor()):
        made.update(part.encode() if isinstance(part, str) else part)
        made.update(b"\0")
    return made.hexdigest()[:32]


def computes_in_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def processor() -> str:
    """The processor's architecture and the instructions that it knows."""
    told = _cpuinfo()
    flags = told.get("flags") or told.get("features") or platform.processor()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {flags}"


@cache
def processor_name() -> str:
    """The processor as the system calls it; with its family where the name is a line of products, such as AMD EPYC."""
    told = _cpuinfo()
    name = told.get("model name") or platform.processor() or platform.machine()
    family = told.get("cpu family")
    return f"{name}, family {family}" if family and not any(c.isdigit() for c in name) else name


def _cpuinfo() -> dict[str, str]:
    """What Linux tells of the first core, by lower-case names; elsewhere nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in lines}
