"""LeNet-300-100 and LeNet-5, the networks of Deep Compression's MNIST tables.

LeCun, Bottou, Bengio, Haffner. Gradient-based learning applied to document recognition. Proc. IEEE 86, 1998.
Han, Mao, Dally. Deep compression. https://arxiv.org/abs/1510.00149 (tables 2 and 3).
Differs: LeNet-5 is Caffe's, as in Deep Compression: wider, with ReLU on the fully connected layer only. The papers on
quantization have a wider one still, with ReLU throughout: `lenet5_wide`.
"""

from __future__ import annotations

import keras

from tfkit.models.seeds import seeds


def lenet_300_100(
    input_shape: tuple[int, ...] = (28, 28, 1), classes: int = 10, *, seed: int | None = None
) -> keras.Model:
    """A fully connected network with hidden layers of 300 and 100 units.

    Args:
        input_shape: shape of one example; flattened.
        classes: number of outputs.
        seed: makes the initial weights repeat.

    Returns:
        A functional model to logits (batch, classes); 266,610 parameters for MNIST.
    """
    draw = seeds(seed)
    inputs = keras.Input(input_shape, name="image")
    x = keras.layers.Flatten(name="flatten")(inputs)
    for name, units in (("fc1", 300), ("fc2", 100)):
        init = keras.initializers.HeNormal(seed=next(draw))
        x = keras.layers.Dense(units, activation="relu", kernel_initializer=init, name=name)(x)
    init = keras.initializers.GlorotUniform(seed=next(draw))
    outputs = keras.layers.Dense(classes, kernel_initializer=init, name="logits")(x)
    return keras.Model(inputs, outputs, name="lenet_300_100")


def lenet5(
    input_shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10, *, seed: int | None = None
) -> keras.Model:
    """Caffe's LeNet-5: two 5x5 convolutions (20, 50), each with 2x2 max pooling, and 500 hidden units.

    Args:
        input_shape: (height, width, channels), at least 16 pixels each way.
        classes: number of outputs.
        seed: makes the initial weights repeat.

    Returns:
        A functional model to logits (batch, classes); 430,500 weights and 580 biases for MNIST.
    """
    return _lenet5("lenet5", (20, 50), 500, None, input_shape, classes, seed)


def lenet5_wide(
    input_shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10, *, seed: int | None = None
) -> keras.Model:
    """The LeNet-5 of the quantization papers, 32C5-MP2-64C5-MP2-512FC, with ReLU after each of the three layers.

    Args:
        input_shape: (height, width, channels), at least 16 pixels each way.
        classes: number of outputs.
        seed: makes the initial weights repeat.

    Returns:
        A functional model to logits (batch, classes); 581,408 weights and 618 biases for MNIST.
    """
    return _lenet5("lenet5_wide", (32, 64), 512, "relu", input_shape, classes, seed)


def _lenet5(
    name: str,
    filters: tuple[int, int],
    units: int,
    activation: str | None,
    input_shape: tuple[int, int, int],
    classes: int,
    seed: int | None,
) -> keras.Model:
    draw = seeds(seed)

    def init() -> keras.Initializer:
        return keras.initializers.GlorotUniform(seed=next(draw))

    inputs = x = keras.Input(input_shape, name="image")
    for number, width in enumerate(filters, 1):
        x = keras.layers.Conv2D(width, 5, activation=activation, kernel_initializer=init(), name=f"conv{number}")(x)
        x = keras.layers.MaxPooling2D(2, name=f"pool{number}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(units, activation="relu", kernel_initializer=init(), name="fc1")(x)
    outputs = keras.layers.Dense(classes, kernel_initializer=init(), name="logits")(x)
    return keras.Model(inputs, outputs, name=name)
