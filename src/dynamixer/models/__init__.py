"""The backbone, its variants, and the files that weights are kept in."""

from dynamixer.models.count import Counts, count
from dynamixer.models.dynamixer import DynaMixer
from dynamixer.models.official import load_official

__all__ = ["Counts", "DynaMixer", "count", "load_official"]
