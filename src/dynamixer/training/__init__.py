"""Training: a configuration, recipes that make one, and the engine that runs it."""

from dynamixer.training.config import TrainConfig
from dynamixer.training.engine import train
from dynamixer.training.recipes import ABLATIONS, RECIPES, ablate
from dynamixer.training.state import Result

__all__ = ["ABLATIONS", "RECIPES", "Result", "TrainConfig", "ablate", "train"]
