"""Trained models as files for other runtimes, run and compared before they are kept."""

from dynamixer.export.run import DYNAMIC, FORMATS, Exported, export

__all__ = ["DYNAMIC", "FORMATS", "Exported", "export"]
