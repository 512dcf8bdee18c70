"""Eight-bit weights and activations by post-training quantisation: OpenVINO's NNCF, calibrated on real pictures."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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


def sensitive(model: Any) -> set[str]:
    """The names of what costs much accuracy in int8 and little time in fp32.

    The convolutions, and the products that decide how to mix: those without trained weights, the generators of those, and those
    that make one row a picture, which are the reweighting and the classifier.
    """
    convolutions = {node.friendly_name for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"}
    products = _products(model)
    mixing = [node for node in products if not _is_trained(node, 1) and not _is_trained(node, 0)]
    generators = {made.friendly_name for node in mixing for made in _makers(node)}
    rows = {node.friendly_name for node in products if node.input(0).get_partial_shape().rank.get_length() == 2}
    return convolutions | {node.friendly_name for node in mixing} | generators | rows


def square(model: Any) -> set[str]:
    """The names of the linear layers with as many outputs as inputs: the projections and the channel branch."""
    return {
        node.friendly_name
        for node in _products(model)
        if _is_trained(node, 1) and len({*node.input(1).get_partial_shape().to_shape()[-2:]}) == 1
    }


def _products(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]


IN_FP32: dict[str, Callable[[Any], set[str]]] = {  # what is left in fp32, ever more of it
    "convolutions, mixing, generators, reweighting and classifier": sensitive,
    "these and the projections": lambda model: sensitive(model) | square(model),
}


def quantise(model: Any, pictures: Sequence[np.ndarray], *, in_fp32: Callable[[Any], set[str]] = sensitive) -> Any:
    """An int8 copy of an OpenVINO model: the linear layers that read every token, which are most multiply-adds.

    Weights have seven of the eight bits: with all of them the sums overflow on processors without VNNI or AMX, where the file
    would say something else than on others (docs/adr/0011-export-and-share.md).

    Args:
        model: an `openvino.Model` in fp32 that takes one input of a fixed picture size.
        pictures: calibration input, arrays [B, 3, height, width] float32 of the model's batch, normalised as for the model.
        in_fp32: gives the names of the operations that stay as they are; one of `IN_FP32`.

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
            nncf.Dataset(pictures),
            subset_size=len(pictures),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=sorted(in_fp32(model))),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )


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
