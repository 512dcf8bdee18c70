"""See how a model mixes: its matrices, from where a token's value comes, and what changes with the picture."""

from dynamixer.explain.average import Average, AxisAverage, BlockAverage, average
from dynamixer.explain.matrices import BlockMixing, Explanation, look, mixing_matrices, record
from dynamixer.explain.receptive import Receptive, receptive, rollout

__all__ = [
    "Average",
    "AxisAverage",
    "BlockAverage",
    "BlockMixing",
    "Explanation",
    "Receptive",
    "average",
    "look",
    "mixing_matrices",
    "receptive",
    "record",
    "rollout",
]
