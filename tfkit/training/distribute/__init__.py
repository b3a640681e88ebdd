"""Training on several replicas: one call that gives the weights of one process."""

from tfkit.training.distribute.checkpoint import Position
from tfkit.training.distribute.fit import fit
from tfkit.training.distribute.keras_mend import check, enable, example_weighted, mean_over_examples
from tfkit.training.distribute.planning import ScalingPoint, scaling
from tfkit.training.distribute.strategies import is_chief, strategy, workers

__all__ = [
    "Position",
    "ScalingPoint",
    "check",
    "enable",
    "example_weighted",
    "fit",
    "is_chief",
    "mean_over_examples",
    "scaling",
    "strategy",
    "workers",
]
