"""Eight-bit weights and activations by post-training quantisation: OpenVINO's NNCF, calibrated on real pictures."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dynamixer.export.formats import need

SHAPING = {
    "Add",
    "Convert",
    "Reshape",
    "Softmax",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}  # between a generator and the mixing


def quantise(model: Any, pictures: Iterable[np.ndarray], count: int, *, fast_bias_correction: bool = True) -> Any:
    """An int8 copy of an OpenVINO model: convolutions and the linear layers that read every token.

    What decides how to mix stays in floating point: the generators, the mixing itself, the reweighting and the classifier. They
    are few multiply-adds, and in int8 they cost most of the accuracy that is lost (docs/adr/0011-export-and-share.md).

    Args:
        model: an `openvino.Model` in fp32 that takes one input of a fixed picture size.
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
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # its bars
        return nncf.quantize(
            model,
            nncf.Dataset([*pictures]),
            subset_size=count,
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            fast_bias_correction=fast_bias_correction,
            ignored_scope=nncf.IgnoredScope(names=sorted(deciding(model))),
        )


def deciding(model: Any) -> set[str]:
    """The names of the products that decide how to mix: without trained weights, generators of those, and one row a picture."""
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    mixing = [node for node in products if not _is_trained(node, 1) and not _is_trained(node, 0)]
    generators = {made.friendly_name for node in mixing for made in _makers(node)}
    rows = {node.friendly_name for node in products if node.input(0).get_partial_shape().rank.get_length() == 2}
    return {node.friendly_name for node in mixing} | generators | rows


def _source(node: Any, number: int) -> Any:
    return node.input(number).get_source_output().get_node()


def _is_trained(node: Any, number: int) -> bool:
    """Whether an operand comes from constants alone, at most reshaped."""
    source = _source(node, number)
    while source.get_type_name() in SHAPING and len(source.inputs()):
        source = _source(source, 0)
    return bool(source.get_type_name() == "Constant")


def _makers(node: Any) -> Iterator[Any]:
    """The linear layers whose output, shaped and normalised at most, a product reads."""
    for number in range(len(node.inputs())):
        source = _source(node, number)
        if source.get_type_name() == "MatMul":
            yield source
        elif source.get_type_name() in SHAPING:
            yield from _makers(source)
