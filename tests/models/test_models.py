"""The reference networks: sizes by hand count, logits, seeds."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tfkit import models


def resnet_parameters(blocks: int) -> int:
    """Counted from He et al., section 4.2: weights of every convolution, four numbers a channel of batch norm."""
    total = 9 * 3 * 16 + 4 * 16
    width = 16
    for filters in (16, 32, 64):
        for block in range(blocks):
            total += 9 * width * filters + 9 * filters * filters + 2 * 4 * filters
            if block == 0 and filters != 16:
                total += width * filters + 4 * filters
            width = filters
    return total + 64 * 10 + 10


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet_300_100", 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
        ("lenet5", 430_500 + 580),
        ("lenet5_wide", 25 * 32 + 25 * 32 * 64 + 1024 * 512 + 512 * 10 + (32 + 64 + 512 + 10)),
        ("convnet_bn", 140_586),
        ("resnet8", resnet_parameters(1)),
        ("resnet20", resnet_parameters(3)),
    ],
)
def test_parameters(name, parameters):
    model = models.get(name)()
    assert model.count_params() == parameters
    assert model.name == name


def test_paper_counts():
    """Deep Compression, tables 2 and 3: 267K and 431K parameters; ResNet paper, table 6: 0.27M."""
    kernels = [weight for weight in models.lenet5().weights if weight.name == "kernel"]
    assert [int(np.prod(weight.shape)) for weight in kernels] == [500, 25_000, 400_000, 5_000]
    assert round(models.lenet_300_100().count_params(), -3) == 267_000
    assert round(models.resnet20().count_params() / 1e6, 2) == 0.27


@pytest.mark.parametrize("name", models.names())
def test_logits_seed_and_shape(name):
    make = models.get(name)
    shape = make().input_shape[1:]
    first, again, other = make(classes=7, seed=1), make(classes=7, seed=1), make(classes=7, seed=2)
    assert first.output_shape == (None, 7)
    assert first.layers[-1].name == "logits" and first.layers[-1].activation is keras.activations.linear
    x = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    y = np.asarray(first(x, training=False))
    assert np.array_equal(y, np.asarray(again(x, training=False)))
    assert not np.allclose(y, np.asarray(other(x, training=False)))
    assert np.isfinite(y).all() and (y < 0).any()


def test_layers_do_not_share_their_random_numbers():
    kernels = [np.asarray(layer.kernel) for layer in models.resnet8(seed=0).layers if hasattr(layer, "kernel")]
    starts = [kernel.ravel()[:16] / kernel.std() for kernel in kernels]
    for i, start in enumerate(starts):
        for other in starts[:i]:
            assert abs(np.corrcoef(start, other)[0, 1]) < 0.95


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'lenet5'"):
        models.get("lenet6")


def test_resnet_halves_twice():
    model = models.resnet20()
    assert model.get_layer("stage3_block3_add").output.shape == (None, 8, 8, 64)
    assert sum(isinstance(layer, keras.layers.Conv2D) for layer in model.layers) == 19 + 2  # and 2 shortcuts
