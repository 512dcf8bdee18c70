"""Eight-bit weights and activations by post-training quantisation: OpenVINO's NNCF, calibrated on real pictures."""

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from dynamixer.export.formats import need


def quantise(model: Any, pictures: Iterable[np.ndarray], count: int, *, fast_bias_correction: bool = True) -> Any:
    """An int8 copy of an OpenVINO model.

    Weights are quantised by output channel, activations by tensor, softmax and normalisation stay in floating point.

    Args:
        model: an `openvino.Model` in fp32 that takes one input.
        pictures: calibration input, arrays [B, 3, height, width] float32 of the model's batch, normalised as for the model.
        count: how many arrays to use.
        fast_bias_correction: correct biases layer by layer; without it by running the whole model, slower.

    Returns:
        An `openvino.Model`.

    Raises:
        UserError: NNCF is not installed.
    """
    os.environ.setdefault("NNCF_CI", "1")  # NNCF sends nothing about its use then
    nncf = need("nncf", "openvino")
    with contextlib.redirect_stdout(sys.stderr):  # its bars
        return nncf.quantize(
            model,
            nncf.Dataset([*pictures]),
            subset_size=count,
            preset=nncf.QuantizationPreset.MIXED,
            fast_bias_correction=fast_bias_correction,
        )
