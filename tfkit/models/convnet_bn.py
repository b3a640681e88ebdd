"""A small convolutional network with batch normalization, for 28x28 images such as Fashion-MNIST.

It has each block that quantization must fold: convolution, depthwise and pointwise convolution, each with batch
normalization and ReLU or ReLU6. The depthwise block is that of MobileNet: Howard et al.,
https://arxiv.org/abs/1704.04861.
"""

from __future__ import annotations

import keras

from tfkit.models.seeds import seeds


def convnet_bn(
    input_shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10, *, seed: int | None = None
) -> keras.Model:
    """Three convolution blocks, one depthwise-separable block, global average pooling.

    Args:
        input_shape: (height, width, channels).
        classes: number of outputs.
        seed: makes the initial weights repeat.

    Returns:
        A functional model to logits (batch, classes); 140,586 parameters for 28x28x1 and 10 classes.
    """
    draw = seeds(seed)

    def init() -> keras.Initializer:
        return keras.initializers.HeNormal(seed=next(draw))

    def conv(
        x: keras.KerasTensor, name: str, filters: int, kernel: int, strides: int, activation: str
    ) -> keras.KerasTensor:
        x = keras.layers.Conv2D(
            filters, kernel, strides, padding="same", use_bias=False, kernel_initializer=init(), name=name
        )(x)
        x = keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
        return keras.layers.Activation(activation, name=f"{name}_{activation}")(x)

    inputs = keras.Input(input_shape, name="image")
    x = conv(inputs, "conv1", 32, 3, 1, "relu")
    x = conv(x, "conv2", 64, 3, 2, "relu")
    x = keras.layers.DepthwiseConv2D(
        3, padding="same", use_bias=False, depthwise_initializer=init(), name="depthwise3"
    )(x)
    x = keras.layers.BatchNormalization(momentum=0.9, name="depthwise3_bn")(x)
    x = keras.layers.Activation("relu6", name="depthwise3_relu6")(x)
    x = conv(x, "pointwise3", 128, 1, 1, "relu6")
    x = keras.layers.MaxPooling2D(2, name="pool3")(x)
    x = conv(x, "conv4", 96, 3, 1, "relu")
    x = keras.layers.GlobalAveragePooling2D(name="pool4")(x)
    outputs = keras.layers.Dense(
        classes, kernel_initializer=keras.initializers.GlorotUniform(seed=next(draw)), name="logits"
    )(x)
    return keras.Model(inputs, outputs, name="convnet_bn")
