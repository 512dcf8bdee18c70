"""Training: a configuration, recipes that make one, and the engine that runs it."""

from dynamixer.training.config import TrainConfig
from dynamixer.training.engine import Result, train
from dynamixer.training.recipes import RECIPES

__all__ = ["RECIPES", "Result", "TrainConfig", "train"]
