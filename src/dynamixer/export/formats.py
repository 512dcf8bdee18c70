"""Writers of the formats, and runners that read the written files back as a user's program would.

Letters: B images.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynamixer.errors import RunError, UserError, first_line, install

KEY = "dynamixer"  # of the metadata in every format
INPUT, OUTPUT = "pictures", "logits"
PT2_FILE = f"{KEY}.json"
Runner = Callable[[np.ndarray], np.ndarray]  # pictures [B, 3, height, width] float32 -> logits [B, classes]


def need(module: str, extra: str) -> Any:
    """A module of an optional dependency.

    Raises:
        UserError: which extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs {module}: {install(extra)}") from None


LIBRARIES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "pt2": (),
}


def check_libraries(kind: str, int8: bool) -> None:
    """Refuse a format whose libraries are missing, before the work is done.

    Raises:
        UserError: which extra to install.
    """
    for module in (*LIBRARIES[kind], *(("nncf",) if int8 else ())):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"this needs {module}: {install(kind)}")


def trace(model: nn.Module, shape: tuple[int, int, int, int], dynamic: str) -> torch.export.ExportedProgram:
    """The model as a graph for pictures of a shape, of which nothing, the batch, or the batch and both sides may change.

    Raises:
        UserError: the model cannot be traced so.
    """
    axes: dict[int, Any] = {"none": {}, "batch": {0: None}, "all": dict.fromkeys((0, 2, 3))}[dynamic]
    batch, channels, height, width = shape
    if dynamic != "none":
        batch = 2  # torch takes a 1 for fixed, and sides that are alike for the same
    if dynamic == "all" and height == width:
        width += max(8, width // 2)
    shapes = {"x": dict.fromkeys(axes, torch.export.Dim.DYNAMIC)} if axes else None
    example = torch.zeros(batch, channels, height, width)
    with torch.no_grad():
        try:
            return torch.export.export(_Plain(model), (example,), dynamic_shapes=shapes)
        except MemoryError:
            raise
        except Exception as error:  # of torch's many kinds
            raise UserError(
                f"the model cannot be exported with dynamic={dynamic}: {first_line(error).rstrip('.')}."
            ) from None


class _Plain(nn.Module):
    """Any model under one argument name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def write_onnx(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> list[Path]:
    """One .onnx file with its weights and, as metadata, `about`.

    Raises:
        RunError: the exporter failed.
    """
    need("onnx", "onnx")
    need("onnxscript", "onnx")
    from dynamixer.export.opset import translations  # noqa: PLC0415 - of an extra

    try:
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            custom_translation_table=translations(),
        )
    except Exception as error:  # of the exporter's many kinds
        raise RunError(f"torch's ONNX exporter failed: {first_line(error).rstrip('.')}.") from None
    names = dict(zip((d for d in made.model.graph.inputs[0].shape if not isinstance(d, int)), _AXES, strict=False))
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):  # s77 and s53 would tell a user nothing
        value.shape = type(value.shape)([names.get(d, d) for d in value.shape])
    made.model.metadata_props[KEY] = json.dumps(about)
    made.save(path, external_data=False)
    return [path]


_AXES = ("batch", "height", "width")


def write_openvino(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> list[Path]:
    """An .xml file with `about` in it and the weights in a .bin file beside it; by way of ONNX."""
    openvino = need("openvino", "openvino")
    stage = path.with_suffix(".onnx")
    write_onnx(program, stage, about)
    save_openvino(openvino.Core().read_model(stage), path, about)
    stage.unlink()
    return [path, path.with_suffix(".bin")]


def save_openvino(model: Any, path: Path, about: dict[str, Any]) -> None:
    """An openvino.Model as .xml and .bin, with `about` in it."""
    openvino = need("openvino", "openvino")
    model.set_rt_info(json.dumps(about), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def write_pt2(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> list[Path]:
    """torch.export's own archive, with `about` as a file in it."""
    torch.export.save(program, path, extra_files={PT2_FILE: json.dumps(about)})
    return [path]


def run_onnx(path: Path) -> tuple[Runner, dict[str, Any]]:
    """The file in ONNX Runtime, and the metadata in it."""
    runtime = need("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    return lambda pictures: session.run([OUTPUT], {INPUT: pictures})[0], about


def run_openvino(path: Path) -> tuple[Runner, dict[str, Any]]:
    """The files in OpenVINO, in fp32 also where the processor has bf16, and the metadata in them."""
    core = need("openvino", "openvino").Core()
    model = core.read_model(path)
    about = json.loads(model.get_rt_info([KEY]).value)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pictures: np.array(compiled(pictures)[0]), about


def run_pt2(path: Path) -> tuple[Runner, dict[str, Any]]:
    """The archive in torch, and the metadata in it."""
    extra = {PT2_FILE: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return lambda pictures: module(torch.from_numpy(pictures)).detach().numpy(), json.loads(extra[PT2_FILE])


WRITERS = {"onnx": write_onnx, "openvino": write_openvino, "pt2": write_pt2}
RUNNERS = {"onnx": run_onnx, "openvino": run_openvino, "pt2": run_pt2}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
