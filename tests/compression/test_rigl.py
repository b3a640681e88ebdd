import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import zoo
from tfkit.compression import MagnitudePruning
from tfkit.compression.rigl import RigL, erdos_renyi_kernel, moved_mask, update_connections, update_fraction


def dense_model(units=30):
    return keras.Sequential([keras.Input((10,)), keras.layers.Dense(units, use_bias=False)])


def mask_of(model):
    return model.layers[-1].transforms["kernel"][0]


def test_fraction_follows_the_cosine():
    assert update_fraction(0, 100, 0.3) == 0.3
    assert update_fraction(50, 100, 0.3) == pytest.approx(0.15)
    assert update_fraction(25, 100, 0.3) == pytest.approx(0.15 * (1 + np.sqrt(0.5)))
    assert update_fraction(100, 100, 0.3) == update_fraction(500, 100, 0.3) == 0.0


def test_densities_are_those_of_the_paper():
    shapes = [(784, 300), (300, 100), (100, 10)]
    densities = erdos_renyi_kernel(shapes, 0.9)
    sizes = np.array([a * b for a, b in shapes])
    assert np.dot(densities, sizes) == pytest.approx(0.1 * sizes.sum())
    assert densities[2] == 1.0  # It would need 1.4 times what it has.
    assert densities[0] / densities[1] == pytest.approx((1084 / 235200) / (400 / 30000))
    assert erdos_renyi_kernel(shapes, 0.0) == [1.0, 1.0, 1.0]


def test_smallest_go_and_largest_gradients_come():
    value = np.array([5.0, 1.0, 4.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    gradient = np.array([0.0, 0.1, 9.0, 0.2, 3.0, -7.0, 1.0, 8.0])
    mask = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    allowed = np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)
    moved = moved_mask(value, gradient, mask, allowed, 0.5)
    assert moved.tolist() == [1, 0, 1, 0, 1, 1, 0, 0]
    np.testing.assert_array_equal(moved_mask(value, gradient, mask, allowed, 0.0), mask)
    # A dropped connection with the largest gradient comes back at once.
    assert moved_mask(value, np.arange(8.0)[::-1], mask, allowed, 0.25)[1]


@pytest.mark.parametrize("jit", [False, True])
def test_the_gradient_that_fit_leaves_is_the_dense_one(jit):
    prepared = RigL(0.8, frequency=10**6, end=10**6 + 1).prepare(dense_model())
    x = np.random.default_rng(0).normal(size=(4, 10)).astype("float32")
    y = np.random.default_rng(1).normal(size=(4, 30)).astype("float32")
    kernel, mask = prepared.layers[-1].layer.kernel, mask_of(prepared)
    before, connected = np.asarray(kernel), np.asarray(mask.mask)
    prepared.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=jit)
    prepared.fit(x, y, batch_size=4, verbose=0)
    expected = x.T @ (2 * (x @ (before * connected) - y) / y.size)  # Of every weight, masked ones too.
    np.testing.assert_allclose(np.asarray(mask.gradient), expected, atol=1e-6)
    moved = np.asarray(kernel) != before
    np.testing.assert_array_equal(moved, connected > 0)


class Watch(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.masks = []

    def on_train_batch_end(self, batch, logs=None):
        self.masks.append(np.asarray(mask_of(self.model).mask).copy())


def test_the_count_is_constant_while_connections_move():
    rigl = RigL(0.8, frequency=2, end=0.8, fraction=0.5)
    prepared = rigl.prepare(dense_model())
    watch = Watch()
    x = np.random.default_rng(0).normal(size=(6, 10)).astype("float32")
    zoo.train(prepared, x, steps=10, callbacks=[*rigl.callbacks(), watch], learning_rate=0.2)  # 20 steps
    masks = np.array(watch.masks)
    assert set(masks.sum(axis=(1, 2))) == {60.0}
    changes = [int(np.any(a != b)) for a, b in zip(masks[:-1], masks[1:], strict=True)]
    assert changes[1] == 1 and sum(changes) >= 6
    assert not any(changes[16:])  # At rest after 0.8 of 20 steps.
    assert not any(changes[0::2])  # Every second step only.
    final = np.asarray(rigl.finalize(prepared).layers[-1].kernel)
    assert np.count_nonzero(final == 0) >= 240 and not np.any(final[masks[-1] == 0])


def test_what_grows_starts_at_zero_and_what_stays_is_untouched():
    prepared = RigL(0.5).prepare(dense_model())
    mask, kernel = mask_of(prepared), prepared.layers[-1].layer.kernel
    before, old = np.asarray(kernel), np.asarray(mask.mask)
    mask.gradient.assign(np.random.default_rng(0).normal(size=(10, 30)))
    update_connections(prepared, 0.4)
    new, after = np.asarray(mask.mask), np.asarray(kernel)
    grown = (new == 1) & (old == 0)
    assert grown.sum() > 0 and np.all(after[grown] == 0)
    np.testing.assert_array_equal(after[~grown], before[~grown])


def test_gradients_of_a_layer_used_twice_add_up():
    shared = keras.layers.Dense(10, use_bias=False)
    inputs = keras.Input((10,))
    prepared = RigL(0.5).prepare(keras.Model(inputs, shared(shared(inputs))))
    x = np.random.default_rng(0).normal(size=(4, 10)).astype("float32")
    (layer,) = [layer for layer in prepared.layers if layer.weights]
    mask = layer.transforms["kernel"][0]
    effective = np.asarray(layer.effective_weights()["kernel"])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(prepared(x))
    tape.gradient(loss, prepared.trainable_variables)
    plain = tf.Variable(effective)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((x @ plain) @ plain)
    np.testing.assert_allclose(np.asarray(mask.gradient), tape.gradient(loss, plain), atol=1e-4)


def test_earlier_zeros_never_grow():
    sparse = MagnitudePruning(0.5, schedule="constant").apply(dense_model())
    zeros = np.asarray(sparse.layers[-1].kernel) == 0
    rigl = RigL(0.7, frequency=1, fraction=1.0, end=0.9)
    x = np.random.default_rng(0).normal(size=(6, 10)).astype("float32")
    final = rigl.apply(sparse, lambda m, callbacks: zoo.train(m, x, steps=5, callbacks=callbacks))
    assert not np.any(np.asarray(final.layers[-1].kernel)[zeros])


def test_first_connections_of_a_trained_model_are_its_largest():
    model = dense_model()
    final = RigL(0.5, initial="magnitude").apply(model)
    before, after = np.abs(np.asarray(model.layers[-1].kernel)), np.asarray(final.layers[-1].kernel)
    assert np.sum(after == 0) == 150 and before[after == 0].max() <= before[after != 0].min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "share in"),
        ({"distribution": "even"}, "distribution"),
        ({"initial": "all"}, "initial"),
        ({"fraction": 0.0}, "fraction"),
        ({"end": 1.5}, "end"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RigL(**arguments)
