import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import zoo
from tfkit.compression.movement_pruning import MovementMask, MovementPruning


def dense_model(units=20):
    return keras.Sequential([keras.Input((10,)), keras.layers.Dense(units, use_bias=False)])


def test_gradients_are_the_papers():
    rng = np.random.default_rng(0)
    weight, upstream = tf.constant(rng.normal(size=(5, 4))), tf.constant(rng.normal(size=(5, 4)))
    mask = MovementMask(0.5, dtype="float64")
    mask.build((5, 4))
    keep = rng.integers(0, 2, (5, 4))
    mask.mask.assign(keep)
    with tf.GradientTape() as tape:
        tape.watch(weight)
        out = mask.transform(weight)
        loss = tf.reduce_sum(out * upstream)
    by_weight, by_score = tape.gradient(loss, [weight, mask.scores.value])
    np.testing.assert_array_equal(out, np.where(keep, weight, 0))
    assert not np.signbit(out.numpy()[keep == 0]).any()
    np.testing.assert_allclose(by_weight, upstream * keep)
    np.testing.assert_allclose(by_score, upstream * weight, rtol=1e-6)  # Where the mask is 0, too.


def test_scores_add_up_what_sgd_moves():
    # Equation 3 of the paper: S after T steps is -lr * sum of dL/dW * W, here for a linear loss with constant gradient.
    pruning = MovementPruning(0.5, begin=1.0, end=1.0)
    prepared = pruning.prepare(dense_model())
    start = np.asarray(prepared.layers[-1].layer.kernel).astype("float64")
    x = np.random.default_rng(0).normal(size=(1, 10)).astype("float32")
    prepared.compile(keras.optimizers.SGD(0.1), loss=lambda y, p: tf.reduce_sum(p))
    prepared.fit(x, np.zeros((1, 20)), epochs=3, verbose=0)
    gradient = np.repeat(x.T, 20, axis=1).astype("float64")
    expected = sum(-0.1 * gradient * (start - 0.1 * t * gradient) for t in range(3))
    scores = np.asarray(prepared.layers[-1].transforms["kernel"][0].scores)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_weights_that_shrink_go_and_weights_that_grow_stay():
    model = dense_model(2)
    model.layers[-1].kernel.assign(np.array([[1.0, 0.1]] * 10))
    pruning = MovementPruning(0.5, begin=3, end=4, frequency=1, schedule="constant")
    prepared = pruning.prepare(model)
    # The first column shrinks from 1, the second grows from 0.1: magnitude would keep the first, movement the second.
    prepared.compile(keras.optimizers.SGD(0.01), loss=lambda y, p: tf.reduce_sum(p * tf.constant([1.0, -1.0])))
    prepared.fit(np.ones((6, 10)), np.zeros((6, 2)), batch_size=1, verbose=0, callbacks=pruning.callbacks())
    kernel = np.asarray(pruning.finalize(prepared).layers[-1].kernel)
    assert np.all(kernel[:, 0] == 0) and np.all(kernel[:, 1] > 0.1)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_is_exact(scope):
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(30, activation="relu"), keras.layers.Dense(20)])
    pruning = MovementPruning(0.8, begin=0.2, end=0.8, frequency=1, scope=scope)
    final = pruning.apply(model, lambda m, callbacks: zoo.train(m, np.ones((6, 10)), steps=5, callbacks=callbacks))
    zeros = [np.sum(np.asarray(layer.kernel) == 0) for layer in final.layers if layer.weights]
    assert sum(zeros) == 0.8 * 900
    if scope == "layer":
        assert zeros == [240, 480]
    assert len(final.trainable_variables) == 4  # The scores are gone.


def test_without_training_the_smallest_weights_go():
    model = dense_model()
    final = MovementPruning(0.5, schedule="constant", begin=0).apply(model)
    before, after = np.abs(np.asarray(model.layers[-1].kernel)), np.asarray(final.layers[-1].kernel)
    assert np.sum(after == 0) == 100 and before[after == 0].max() <= before[after != 0].min()
