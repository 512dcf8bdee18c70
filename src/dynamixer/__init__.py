"""DynaMixer: vision MLPs that decide from the picture how to mix it.

Importing this package registers its models with timm: `timm.create_model("dynamixer_s")`.
"""

import warnings
from importlib.metadata import entry_points, version

import timm

from dynamixer.errors import RunError, UserError
from dynamixer.evaluate import evaluate
from dynamixer.explain import mixing_matrices, receptive
from dynamixer.export import export
from dynamixer.hub import push
from dynamixer.many import predict_many
from dynamixer.models import DynaMixer, count, load_official
from dynamixer.models.checkpoint import Checkpoint, load
from dynamixer.predict import predict
from dynamixer.speed import optimize, use_kernel
from dynamixer.training import RECIPES, TrainConfig, train

__version__ = version("dynamixer")
__all__ = [
    "RECIPES",
    "Checkpoint",
    "DynaMixer",
    "RunError",
    "TrainConfig",
    "UserError",
    "count",
    "evaluate",
    "export",
    "load",
    "load_official",
    "mixing_matrices",
    "optimize",
    "predict",
    "predict_many",
    "push",
    "receptive",
    "train",
    "use_kernel",
]


plugin_models: list[str] = []  # the names that other packages registered


def _load_model_plugins() -> None:
    """Import what other packages offer in the entry-point group `dynamixer.models`; importing registers with timm."""
    before = set(timm.list_models())
    for entry in entry_points(group="dynamixer.models"):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(f"the models of {entry.value} could not be loaded: {error!r}", stacklevel=2)
    plugin_models.extend(sorted(set(timm.list_models()) - before))


_load_model_plugins()
