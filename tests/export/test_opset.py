"""The opaque operator in ONNX's own operators, against the operator, on lines of every length."""

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from torch.export import Dim

from dynamixer.export.opset import translations
from dynamixer.layers import AxisMixer, Mixing
from helpers import error, sharpen

LENGTH, LENGTHS = 8, (8, 1, 2, 5, 7, 8, 9, 10, 13, 16, 17, 31, 8)
OPTIONS = [
    {},
    {"softmax": False, "static": True, "windows": False},
    {"generator": "dense", "static": True},
    {"generator": "static"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_translation_mixes_as_the_operator_does(options, tmp_path):
    mixer = AxisMixer(12, LENGTH, 3, 2, Mixing(**options))
    mixer.init_weights()
    model = sharpen(mixer, seed=3).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, 11, 12),), dynamic_shapes=({2: Dim.DYNAMIC},))
    assert any("mixing_matrices" in str(node.target) for node in program.graph.nodes)
    torch.onnx.export(
        program, f=tmp_path / "m.onnx", custom_translation_table=translations(), external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for length in LENGTHS:
        x = torch.randn(2, 3, length, 12)
        expected = model(x).detach()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert error(torch.from_numpy(found), expected) < 1e-5, length
        if mixer.generator != "static":  # of which OpenVINO 2026.4 forgets the softmax after a change of length
            assert error(torch.from_numpy(np.array(compiled(x.numpy())[0])), expected) < 1e-5, length
        matrices = model.matrices_for(x)
        if length > 1:
            assert error(matrices.transpose(-1, -2), matrices) > 0.1  # a transposed matrix would show
