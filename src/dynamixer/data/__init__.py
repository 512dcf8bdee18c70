"""Where pictures come from: decoding, sources, and order and augmentation as functions of (seed, epoch, index)."""

from dynamixer.data.decode import BadImage, Limits, decode
from dynamixer.data.preprocess import Preprocessing
from dynamixer.data.sources import Source, open_data

__all__ = ["BadImage", "Limits", "Preprocessing", "Source", "decode", "open_data"]
