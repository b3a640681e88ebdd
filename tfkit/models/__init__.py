"""The small reference networks of the papers, as functions that give Keras models.

Every model ends in logits: train it with `from_logits=True`, and take `keras.ops.softmax` for probabilities.

>>> from tfkit import models
>>> models.get("lenet5")().count_params()
431080
"""

from collections.abc import Callable

import keras

from tfkit.internal import checks
from tfkit.models.convnet_bn import convnet_bn
from tfkit.models.lenet import lenet5, lenet5_wide, lenet_300_100
from tfkit.models.resnet import resnet8, resnet20

_MODELS: dict[str, Callable[..., keras.Model]] = {
    "lenet_300_100": lenet_300_100,
    "lenet5": lenet5,
    "lenet5_wide": lenet5_wide,
    "convnet_bn": convnet_bn,
    "resnet8": resnet8,
    "resnet20": resnet20,
}


def names() -> tuple[str, ...]:
    """The names that `get` knows."""
    return tuple(_MODELS)


def get(name: str) -> Callable[..., keras.Model]:
    """Returns the function that makes the named model; it takes `input_shape`, `classes` and `seed`.

    Raises:
        ValueError: if the name is unknown; the message lists the names.
    """
    return _MODELS[checks.choice("name", name, _MODELS)]


__all__ = ["convnet_bn", "get", "lenet5", "lenet5_wide", "lenet_300_100", "names", "resnet8", "resnet20"]
