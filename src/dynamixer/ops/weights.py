"""The parameters of one mixing operation, as tensors: what the ops take and the layers own.

Letters: L native line length, C channels, S segments, d reduced width.
"""

from typing import NamedTuple

from torch import Tensor


class DynamicWeights(NamedTuple):
    """The paper's operation: matrices generated from the contents of the whole line."""

    reduce_weight: Tensor  # [S*d, C], rows ordered (segment, reduced)
    reduce_bias: Tensor  # [S*d]
    generate_weight: Tensor  # [L*L, L*d], rows ordered (output token, input token), columns (token, reduced)
    generate_bias: Tensor  # [L*L]
    project_weight: Tensor  # [C, C]
    project_bias: Tensor  # [C]
    static: Tensor | None = None  # [S, L, L], added to the generated logits


class DenseWeights(NamedTuple):
    """The paper's `dense` ablation: a token generates its own row of the matrix, from itself alone."""

    hidden_weight: Tensor  # [C, C]
    hidden_bias: Tensor  # [C]
    row_weight: Tensor  # [S*L, C], rows ordered (segment, input token)
    row_bias: Tensor  # [S*L]
    project_weight: Tensor  # [C, C]
    project_bias: Tensor  # [C]
    static: Tensor | None = None  # [S, L, L], added to the generated logits


class StaticWeights(NamedTuple):
    """The paper's `static` ablation: trained matrices without content."""

    matrices: Tensor  # [S, L, L]
    project_weight: Tensor  # [C, C]
    project_bias: Tensor  # [C]
    static: None = None


Weights = DynamicWeights | DenseWeights | StaticWeights
