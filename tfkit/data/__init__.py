"""Named data sets and the user's own, as plain arrays.

>>> from tfkit import data
>>> digits = data.load("mnist5k")
>>> digits.x_train.shape, digits.x_validation.shape, digits.x_test.shape, digits.num_classes
((3600, 28, 28, 1), (400, 28, 28, 1), (1000, 28, 28, 1), 10)
"""

from tfkit.data.catalog import Location, describe, names
from tfkit.data.dataset import DataError, Dataset
from tfkit.data.loading import load

__all__ = ["DataError", "Dataset", "Location", "describe", "load", "names"]
