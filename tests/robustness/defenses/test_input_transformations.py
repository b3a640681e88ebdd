"""Input transformations: what they do to inputs and to gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from tfkit.robustness.defenses import BitDepthReduction, FalseSecurityWarning, MedianFilter


def make(kind, *args, **kwargs):
    with pytest.warns(FalseSecurityWarning):
        return kind(*args, **kwargs)


def test_bit_depth():
    x = np.array([[0.0, 0.49, 0.51, 1.0, -3.0]], "float32")
    np.testing.assert_array_equal(make(BitDepthReduction, 1)(x), [[0, 0, 1, 1, 0]])
    np.testing.assert_allclose(make(BitDepthReduction, 2)(x), [[0, 1 / 3, 2 / 3, 1, 0]], rtol=1e-6)


def test_median_is_that_of_scipy():
    x = np.random.default_rng(0).uniform(size=(2, 7, 6, 3)).astype("float32")
    wanted = np.stack(
        [np.stack([ndimage.median_filter(i[..., c], 3, mode="reflect") for c in range(3)], -1) for i in x]
    )
    np.testing.assert_array_equal(make(MedianFilter, 3)(x), wanted)


@pytest.mark.parametrize("straight", [False, True])
def test_gradient_is_hidden_unless_it_goes_straight_through(straight, recwarn):
    layer = BitDepthReduction(1, straight_through=straight)
    assert bool(len(recwarn)) == (not straight)
    x = tf.constant([[0.2, 0.7]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(3 * layer(x))
    slope = tape.gradient(value, x)
    np.testing.assert_array_equal(0 if slope is None else slope, 3.0 if straight else 0.0)


@pytest.mark.filterwarnings("ignore::tfkit.robustness.defenses.FalseSecurityWarning")
@pytest.mark.parametrize("layer", [lambda: BitDepthReduction(3), lambda: MedianFilter(5, straight_through=True)])
def test_round_trip(layer, tmp_path):
    inputs = keras.Input((6, 6, 1))
    model = keras.Model(inputs, layer()(inputs))
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).uniform(size=(2, 6, 6, 1)).astype("float32")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


def test_bad_arguments():
    with pytest.warns(FalseSecurityWarning), pytest.raises(ValueError, match="odd"):
        MedianFilter(4)
