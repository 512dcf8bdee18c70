"""Classify many pictures into a Parquet file: resumable, exactly once, on one machine or on a Ray cluster."""

from dynamixer.many.run import Summary, predict_many

__all__ = ["Summary", "predict_many"]
