"""Networks for GANs: perceptrons for points, and DCGAN's convolutions for small images, plain or conditional.

Paper: Radford, Metz, Chintala. Unsupervised representation learning with deep convolutional generative adversarial
networks. ICLR 2016, https://arxiv.org/abs/1511.06434.

Differs: the discriminator has no batch normalisation, which gradient penalties and spectral normalisation exclude; its
convolutions are 4x4, in steps of 2.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tfkit.internal import checks


def mlp_generator(
    size: int = 2, latent: int = 2, width: int = 128, depth: int = 2, *, seed: int | None = None
) -> keras.Model:
    """Noise (batch, latent) to points (batch, size), through `depth` hidden layers of `width` rectified units."""
    return _mlp("generator", latent, size, width, depth, seed, False)


def mlp_discriminator(
    size: int = 2, width: int = 128, depth: int = 2, *, spectral: bool = False, seed: int | None = None
) -> keras.Model:
    """Points (batch, size) to scores (batch, 1); `spectral` normalises each layer to spectral norm 1."""
    return _mlp("discriminator", size, 1, width, depth, seed, spectral)


def dcgan_generator(
    shape: tuple[int, int, int] = (28, 28, 1),
    latent: int = 64,
    width: int = 64,
    *,
    classes: int = 0,
    activation: str = "sigmoid",
    seed: int | None = None,
) -> keras.Model:
    """Noise (batch, latent) to images (batch, height, width, channels).

    Args:
        shape: of an image; its sides are divisible by 4.
        latent: length of the noise.
        width: channels of the last hidden layer; twice as many before it.
        classes: number of labels of a conditional generator, whose second input they are; 0: none.
        activation: of the images: "sigmoid" for [0, 1], "tanh" for [-1, 1].
        seed: makes the initial weights repeat.
    """
    height, breadth, channels = _checked(shape, classes)
    kernel = _initializer(seed)
    inputs = noise = keras.Input((latent,), name="noise")
    if classes:
        labels = keras.Input((), dtype="int32", name="label")
        inputs = [noise, labels]
        noise = keras.layers.Concatenate()([noise, _one_hot(labels, classes)])
    x = keras.layers.Dense(height // 4 * (breadth // 4) * 2 * width, use_bias=False, kernel_initializer=kernel())(noise)
    x = keras.layers.Reshape((height // 4, breadth // 4, 2 * width))(_normalised(x))
    x = keras.layers.Conv2DTranspose(width, 4, 2, "same", use_bias=False, kernel_initializer=kernel())(x)
    x = _normalised(x)
    x = keras.layers.Conv2DTranspose(channels, 4, 2, "same", activation=activation, kernel_initializer=kernel())(x)
    return keras.Model(inputs, x, name="generator")


def dcgan_discriminator(
    shape: tuple[int, int, int] = (28, 28, 1),
    width: int = 64,
    *,
    classes: int = 0,
    spectral: bool = False,
    seed: int | None = None,
) -> keras.Model:
    """Images to scores (batch, 1).

    Args:
        shape: of an image; its sides are divisible by 4.
        width: channels of the first layer; twice as many after it.
        classes: number of labels of a conditional discriminator, whose second input they are, as one-hot planes.
        spectral: normalise each layer to spectral norm 1.
        seed: makes the initial weights repeat.
    """
    height, breadth, _ = _checked(shape, classes)
    kernel = _initializer(seed)
    inputs = x = keras.Input(shape, name="image")
    if classes:
        labels = keras.Input((), dtype="int32", name="label")
        inputs = [x, labels]
        planes = keras.layers.Reshape((1, 1, classes))(_one_hot(labels, classes))
        x = keras.layers.Concatenate()([x, keras.layers.UpSampling2D((height, breadth))(planes)])
    for filters in (width, 2 * width):
        x = _maybe(keras.layers.Conv2D(filters, 4, 2, "same", kernel_initializer=kernel()), spectral)(x)
        x = keras.layers.LeakyReLU(0.2)(x)
    x = keras.layers.Flatten()(x)
    x = _maybe(keras.layers.Dense(1, kernel_initializer=kernel()), spectral)(x)
    return _started(keras.Model(inputs, x, name="discriminator"), seed)


def _mlp(name: str, inputs: int, outputs: int, width: int, depth: int, seed: int | None, spectral: bool) -> keras.Model:
    for argument, value in (("size", outputs), ("latent", inputs), ("width", width), ("depth", depth)):
        checks.integer(argument, value, 1)
    given = x = keras.Input((inputs,))
    for layer in range(depth + 1):
        init = keras.initializers.HeNormal(None if seed is None else 97 * seed + layer)
        last = layer == depth
        dense = keras.layers.Dense(
            outputs if last else width, activation=None if last else "relu", kernel_initializer=init
        )
        x = _maybe(dense, spectral)(x)
    return _started(keras.Model(given, x, name=name), seed)


def _checked(shape: tuple[int, int, int], classes: int) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[0] % 4 or shape[1] % 4:
        raise checks.error("shape", "(height, width, channels) with sides divisible by 4", shape, "Pad the images.")
    checks.integer("classes", classes, 0)
    return shape


def _one_hot(labels: Any, classes: int) -> Any:
    return keras.layers.CategoryEncoding(classes, "one_hot")(keras.layers.Reshape((1,))(labels))


def _initializer(seed: int | None) -> Any:
    """DCGAN's initial weights, N(0, 0.02^2), with a seed of their own for each layer."""
    count = iter(range(10_000))
    return lambda: keras.initializers.RandomNormal(0.0, 0.02, None if seed is None else 97 * seed + next(count))


def _normalised(x: Any) -> Any:
    return keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))


def _started(model: keras.Model, seed: int | None) -> keras.Model:
    """Draws the starts of the power iterations from the seed too; Keras offers no argument for them."""
    if seed is not None:
        rng = np.random.default_rng(seed)
        for layer in model.layers:
            if isinstance(layer, keras.layers.SpectralNormalization):
                layer.vector_u.assign(rng.normal(size=layer.vector_u.shape))
    return model


def _maybe(layer: keras.layers.Layer, spectral: bool) -> keras.layers.Layer:
    return keras.layers.SpectralNormalization(layer) if spectral else layer
