"""The mixing operation as functions of tensors, in more than one way; `reference` is the one that the others are held to."""

from dynamixer.ops.batched import batched_mixing, mixing_matrices
from dynamixer.ops.reference import reference_mixing
from dynamixer.ops.weights import DenseWeights, DynamicWeights, StaticWeights, Weights

__all__ = [
    "DenseWeights",
    "DynamicWeights",
    "StaticWeights",
    "Weights",
    "batched_mixing",
    "mixing_matrices",
    "reference_mixing",
]
