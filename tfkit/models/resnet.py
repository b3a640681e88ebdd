"""Residual networks for CIFAR-10.

He, Zhang, Ren, Sun. Deep residual learning for image recognition. https://arxiv.org/abs/1512.03385 (section 4.2).
Differs: where a block changes the shape, the shortcut is a 1x1 convolution with batch normalization (the paper's
option B) instead of zero padding (option A), since zero padding has no counterpart in a quantized graph. The weight
decay of 1e-4 is the optimizer's to apply.
"""

from __future__ import annotations

from collections.abc import Iterator

import keras

from tfkit.internal import checks
from tfkit.models.seeds import seeds


def resnet20(
    input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10, *, seed: int | None = None
) -> keras.Model:
    """ResNet-20: three blocks a stage, stages of 16, 32 and 64 channels.

    Args:
        input_shape: (height, width, channels).
        classes: number of outputs.
        seed: makes the initial weights repeat.

    Returns:
        A functional model to logits (batch, classes); 0.27 million parameters.
    """
    return _resnet("resnet20", 3, input_shape, classes, seed)


def resnet8(
    input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10, *, seed: int | None = None
) -> keras.Model:
    """ResNet-8: one block a stage, the image classifier of MLPerf Tiny (https://arxiv.org/abs/2106.07597).

    Args:
        input_shape: (height, width, channels).
        classes: number of outputs.
        seed: makes the initial weights repeat.

    Returns:
        A functional model to logits (batch, classes); 78 thousand parameters.
    """
    return _resnet("resnet8", 1, input_shape, classes, seed)


def _resnet(name: str, blocks: int, input_shape: tuple[int, int, int], classes: int, seed: int | None) -> keras.Model:
    checks.integer("classes", classes, 1)
    draw = seeds(seed)
    inputs = keras.Input(input_shape, name="image")
    x = _conv_bn(inputs, "stem", 16, 3, 1, draw)
    x = keras.layers.Activation("relu", name="stem_relu")(x)
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(1, blocks + 1):
            x = _block(x, f"stage{stage}_block{block}", filters, 2 if stage > 1 and block == 1 else 1, draw)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    init = keras.initializers.GlorotUniform(seed=next(draw))
    outputs = keras.layers.Dense(classes, kernel_initializer=init, name="logits")(x)
    return keras.Model(inputs, outputs, name=name)


def _block(
    x: keras.KerasTensor, name: str, filters: int, strides: int, draw: Iterator[int | None]
) -> keras.KerasTensor:
    shortcut = x
    x = _conv_bn(x, f"{name}_conv1", filters, 3, strides, draw)
    x = keras.layers.Activation("relu", name=f"{name}_relu1")(x)
    x = _conv_bn(x, f"{name}_conv2", filters, 3, 1, draw)
    if strides != 1:
        shortcut = _conv_bn(shortcut, f"{name}_shortcut", filters, 1, strides, draw)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.Activation("relu", name=f"{name}_relu2")(x)


def _conv_bn(
    x: keras.KerasTensor, name: str, filters: int, kernel: int, strides: int, draw: Iterator[int | None]
) -> keras.KerasTensor:
    init = keras.initializers.HeNormal(seed=next(draw))
    x = keras.layers.Conv2D(
        filters, kernel, strides, padding="same", use_bias=False, kernel_initializer=init, name=name
    )(x)
    return keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
