"""Builds what is in csrc for the processor at hand, once, and loads it (docs/adr/0007-speed.md)."""

import contextlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from dynamixer.errors import UserError
from dynamixer.native import cache_folder, digest
from dynamixer.ops.flops import register_formulas

SOURCES = Path(__file__).with_name("csrc")
SECONDS = 600  # that a compiler may take


@cache
def load_kernel() -> str | None:
    """Make `torch.ops.dynamixer.mix` exist: None if it does now, or one sentence that says why it cannot.

    The first call on a machine compiles for about half a minute.
    """
    try:
        library = _built()
        try:
            torch.ops.load_library(library)
        except (OSError, RuntimeError):  # of another machine that shares the folder, or cut short by a power failure
            library.unlink(missing_ok=True)
            torch.ops.load_library(_built())
    except (OSError, RuntimeError, UserError, subprocess.SubprocessError) as error:
        return f"the C++ kernel cannot be used: {str(error).strip().splitlines()[0]}"
    register_formulas()
    return None


def _built() -> Path:
    command = _command()
    folder = cache_folder("kernels")
    library = folder / f"kernels-{digest(*(file.read_bytes() for file in sorted(SOURCES.iterdir())), *command)}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as space:  # linked when whole: no lock that a kill could leave behind
        made = Path(space) / library.name
        done = subprocess.run([*command, "-o", made], capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or ["the compiler failed"]
            raise RuntimeError(errors[0])
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # never in the place of a library that others have loaded
            os.link(made, library)
    return library


def _command() -> list[str]:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of missing CUDA when imported
    from torch.utils import cpp_extension  # noqa: PLC0415

    capability = torch.backends.cpu.get_cpu_capability()
    vectors = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"] if capability.startswith("AVX") else []
    return [
        cpp_extension.get_cxx_compiler(),
        *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
        *vectors,
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *(str(file) for file in sorted(SOURCES.glob("*.cpp"))),
        *(f"-L{path}" for path in cpp_extension.library_paths()),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    ]
