"""The quickest way to run a trained model on the machine at hand, kept on disk for the next start (docs/adr/0007-speed.md).

Letters: B images, N the batch that a model is made ready for.
"""

import copy
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dynamixer.errors import UserError, did_you_mean, first_line, install
from dynamixer.export.formats import need
from dynamixer.export.int8 import quantise
from dynamixer.logs import log
from dynamixer.native import cache_folder, computes_in_bf16, digest
from dynamixer.ops.kernel import load_kernel
from dynamixer.speed.frozen import freeze
from dynamixer.speed.kernel import use_kernel

Run = Callable[[Tensor], Tensor]
Precision = Literal["auto", "fp32", "bf16", "int8"]
PRECISIONS = ("auto", "fp32", "bf16", "int8")
NEAR = 1e-4  # of the largest logit: what fp32 may differ by


@dataclass(frozen=True)
class Optimized:
    """A model made ready: pictures [B, 3, height, width] float32 -> logits [B, classes] float32, for any B.

    Pictures are run N at a time, the last ones with zeros beside them, so that an answer does not depend on its neighbours.
    """

    run: Run
    batch: int  # N
    way: str  # kernel, openvino, aoti or eager
    precision: str
    seconds: float  # that it took to be ready
    cached: bool

    def __call__(self, pictures: Tensor) -> Tensor:
        """The logits of the pictures."""
        answers = []
        for part in pictures.float().split(self.batch):
            missing = self.batch - len(part)
            whole = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part.contiguous()
            answers.append(self.run(whole)[: len(part)].float())
        return torch.cat(answers) if answers else self.run(pictures.new_zeros(self.batch, *pictures.shape[1:]))[:0]

    def __str__(self) -> str:
        made = "from the cache" if self.cached else "made"
        return f"{self.way} in {self.precision}, {made} in {self.seconds:.1f} s"


def optimize(
    model: nn.Module,
    example: Tensor,
    *,
    way: str = "auto",
    precision: Precision = "auto",
    calibration: Iterable[np.ndarray] | None = None,
) -> Optimized:
    """Make a model ready for inference on this machine's processor; the second time it comes from the user's cache folder.

    Args:
        model: any model of pictures, on the CPU.
        example: pictures [N, 3, height, width] float32 as it will be given; best are real ones.
        way: "kernel" (our C++ kernels with packed weights: a C++ compiler, and a minute once), "openvino" (extra `openvino`),
            "aoti" (torch's ahead-of-time compiler: minutes and a C++ compiler), "eager", or the first of them that works here.
        precision: "auto" is bf16 where the processor computes in it, else fp32.
        calibration: for int8 by OpenVINO, some hundred pictures in arrays of the example's shape; the kernels need none.

    Raises:
        UserError: the way or precision that was named cannot be had here.
    """
    if way not in ("auto", *WAYS):
        raise UserError(f"unknown way {way!r}: {did_you_mean(way, ('auto', *WAYS))}")
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: {did_you_mean(precision, PRECISIONS)}")
    model = copy.deepcopy(model).eval()
    kind = ("bf16" if computes_in_bf16() else "fp32") if precision == "auto" else precision
    whys: list[str] = []
    pictures = None if calibration is None else [*calibration]
    for name in WAYS if way == "auto" else [way]:
        try:
            return _by(name, model, example, kind, pictures)
        except UserError as error:
            if way != "auto":
                raise
            whys.append(f"not by {name}: {error}")
            log(whys[-1])
    raise UserError(f"no way on this machine runs it in {kind}: {' '.join(whys)}")


class FastModel(nn.Module):
    """A model that runs the quickest way on this machine's processor, in the place of the one that it was made from.

    Args:
        model: the model, on `device`.
        size: (height, width) of the pictures.
        images: how many pictures are expected, and
        batch: at most how many at a time: few pictures are not run as if they were many.
        device: has to be a processor.
        precision: see `optimize`.

    Raises:
        UserError: another device than a processor.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        *,
        images: int,
        batch: int,
        device: torch.device,
        precision: Precision = "auto",
    ):
        super().__init__()
        if device.type != "cpu":
            raise UserError(f"--fast is for processors, and this runs on {device.type}: leave it out.")
        few = 1 << max(0, images - 1).bit_length()
        example = torch.randn(min(batch, few), 3, *size, generator=torch.Generator().manual_seed(0))
        self.run = optimize(model, example, precision=precision)
        log(f"fast: {self.run}")

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, height, width] -> logits [B, classes] float32."""
        return self.run(pictures)


def _by(name: str, model: nn.Module, *about: Any) -> Optimized:
    try:
        return _made(name, model, *about)
    except UserError:
        raise
    except Exception as error:  # exporters and compilers fail in many ways
        raise UserError(f"{name} does not take this model: {first_line(error)}") from error


def _made(
    name: str, model: nn.Module, example: Tensor, precision: str, calibration: list[np.ndarray] | None
) -> Optimized:
    began = time.perf_counter()
    way = WAYS[name]
    if why_not := way.why_not(precision):
        raise UserError(why_not)
    with torch.inference_mode():
        path, cached = None, False
        if way.suffix:
            key = digest(
                *_identity(model),
                str(tuple(example.shape)),
                name,
                precision,
                way.version(),
                version("dynamixer"),
                *(a.tobytes() for a in calibration or ()),
            )
            path = cache_folder("optimized") / f"{key}{way.suffix}"
            cached = path.exists()
            if not cached:
                log(f"making the model ready for this machine by {name} in {precision}, once")
                _write(path, lambda temporary: way.make(model, example, precision, calibration, temporary))
        try:
            run = way.load(model, path, precision)
        except Exception as error:  # whatever a damaged file makes the library say
            if path is None or not cached:
                raise
            log(f"{path} cannot be read ({first_line(error)}): it is made again")
            path.unlink(missing_ok=True)
            return _made(name, model, example, precision, calibration)
        _check(model, run, example, precision)
    return Optimized(run, len(example), name, precision, time.perf_counter() - began, cached)


def _write(path: Path, make: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as space:
        make(Path(space) / path.name)
        with (Path(space) / path.name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(Path(space) / path.name, path)


def _identity(model: nn.Module) -> list[bytes | str]:
    """All that decides what a model computes: its weights, its parts and their plain attributes."""
    parts: list[bytes | str] = [repr(model)]
    for name, part in model.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str | tuple)}
        parts.append(f"{name} {sorted(plain.items())}")
    for name, value in model.state_dict().items():
        parts += [f"{name} {value.dtype} {tuple(value.shape)}", value.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return parts


def _check(model: nn.Module, run: Run, example: Tensor, precision: str) -> None:
    """Refuse answers that are not the model's.

    Raises:
        UserError: how far they are from them.
    """
    if precision == "int8":
        return  # what it costs is a matter of accuracy, not of logits: `dynamixer export --int8` compares top-1
    expected, found = model(example), run(example).float()
    difference = float((found - expected).abs().max())
    allowed = NEAR * max(1.0, float(expected.abs().max()))
    if precision == "bf16":
        with torch.autocast("cpu", torch.bfloat16):
            allowed = 2 * float((model(example).float() - expected).abs().max()) + NEAR
    if not difference <= allowed:
        raise UserError(f"its logits differ by {difference:.2g} where {allowed:.2g} are allowed.")


class _Kernel:
    """The C++ kernels, with weights that are packed once."""

    suffix = ""

    def why_not(self, precision: str) -> str | None:
        if precision == "int8" and not load_kernel() and not torch.ops.dynamixer.multiplies_bytes():
            return "this processor does not multiply eight bits."
        return None

    def version(self) -> str:
        return ""

    def make(self, *_: Any) -> None: ...

    def load(self, model: nn.Module, path: Path | None, precision: str) -> Run:
        """With int8 what is not in eight bits is in bf16, where the processor computes in it."""
        around = precision if precision != "int8" else "bf16" if computes_in_bf16() else "fp32"
        kind = torch.bfloat16 if around == "bf16" else torch.float32
        frozen = freeze(use_kernel(copy.deepcopy(model)), kind, int8=precision == "int8")
        return _Eager().load(frozen, None, around)


class _Eager:
    """The model as it is."""

    suffix = ""

    def why_not(self, precision: str) -> str | None:
        if precision != "int8":
            return None
        return f"eager does not compute in int8, which needs openvino and nncf: {install('openvino')}"

    def version(self) -> str:
        return ""

    def make(self, *_: Any) -> None: ...

    def load(self, model: nn.Module, path: Path | None, precision: str) -> Run:
        def run(pictures: Tensor) -> Tensor:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return model(pictures)

        return run


class _Aoti:
    """Compiled ahead of time by torch, with frozen weights."""

    suffix = ".pt2"

    def why_not(self, precision: str) -> str | None:
        return "torch's compiler has no int8 here." if precision == "int8" else None

    def version(self) -> str:
        return torch.__version__

    def make(self, model: nn.Module, example: Tensor, precision: str, _: Any, path: Path) -> None:
        inner = copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        with torch.no_grad():
            try:
                program = torch.export.export(inner, (example.to(kind),))
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs={"freezing": True}
                )
            except Exception as error:  # of the compiler's many kinds
                raise UserError(f"torch could not compile the model: {str(error).strip().splitlines()[0]}") from None

    def load(self, model: nn.Module, path: Path | None, precision: str) -> Run:
        package: Any = torch._inductor.aoti_load_package(str(path))
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        return lambda pictures: package(pictures.to(kind))


class _OpenVino:
    """Compiled by OpenVINO, which packs the weights for the processor."""

    suffix = ".blob"

    def why_not(self, precision: str) -> str | None:
        try:
            need("openvino", "openvino")
        except UserError as error:
            return str(error)
        return None

    def version(self) -> str:
        return str(need("openvino", "openvino").__version__)

    def make(
        self, model: nn.Module, example: Tensor, precision: str, calibration: list[np.ndarray] | None, path: Path
    ) -> None:
        openvino = need("openvino", "openvino")
        if precision == "int8" and not calibration:
            raise UserError("int8 by OpenVINO has to be calibrated on real pictures: give some hundred as calibration.")
        with torch.no_grad():
            program = torch.export.export(model, (example,))
            made = openvino.convert_model(program)
        made.reshape([*example.shape])
        if precision == "int8":
            made = quantise(made, calibration or [])
        compiled = openvino.Core().compile_model(made, "CPU", self._options(precision))
        made = io.BytesIO()
        compiled.export_model(made)
        path.write_bytes(made.getvalue())

    def load(self, model: nn.Module, path: Path | None, precision: str) -> Run:
        openvino = need("openvino", "openvino")
        data = io.BytesIO(Path(path or "").read_bytes())
        compiled = openvino.Core().import_model(data, "CPU", self._options(precision))
        return lambda pictures: torch.from_numpy(np.array(compiled(pictures.numpy())[0]))

    def _options(self, precision: str) -> dict[str, Any]:
        kind = "f32" if precision == "fp32" or not computes_in_bf16() else "bf16"
        return {
            "INFERENCE_PRECISION_HINT": kind,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }


WAYS: dict[str, Any] = {"kernel": _Kernel(), "openvino": _OpenVino(), "aoti": _Aoti(), "eager": _Eager()}
