import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit.compression import ShiftBasedAdaMax, ShiftBatchNormalization
from tfkit.compression.shift_based import ap2


def test_ap2_is_the_nearest_power_of_two_in_logarithm():
    x = np.array([0.0, 1.0, -1.0, 3.0, -0.7, 1.41, 1.42, 2.0**-100, 2.0**100, -5e-39], "float32")
    np.testing.assert_array_equal(ap2(x), [0, 1, -1, 4, -0.5, 1, 2, 2.0**-100, 2.0**100, 0])


def test_ap2_keeps_every_power_of_two_and_is_off_by_a_root_of_two_at_most():
    powers = np.float32(2.0) ** np.arange(-120, 121)
    np.testing.assert_array_equal(ap2(powers), powers)
    x = np.random.default_rng(0).lognormal(0, 5, 1000).astype("float32")
    ratio = np.asarray(ap2(x)) / x
    assert ratio.min() >= 2**-0.5 - 1e-4 and ratio.max() <= 2**0.5 + 1e-4 and ratio.min() < 0.72


def test_normalization_agrees_with_the_plain_one_where_all_are_powers_of_two():
    x = np.array([[-2.0, 1.0], [2.0, 5.0]] * 4, "float32")  # Deviations from the mean of 2, variances of 4.
    shift, plain = ShiftBatchNormalization(epsilon=1e-7), keras.layers.BatchNormalization(epsilon=1e-7)
    np.testing.assert_allclose(shift(x, training=True), plain(x, training=True), atol=1e-5)
    np.testing.assert_allclose(shift.moving_variance, plain.moving_variance, rtol=1e-6)
    np.testing.assert_allclose(shift.moving_mean, plain.moving_mean, rtol=1e-6)


def test_normalization_matches_a_numpy_reference():
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 3.0, (6, 5, 4)).astype("float32")
    layer = ShiftBatchNormalization(momentum=0.5)
    layer.build(x.shape)
    gamma, beta = rng.normal(size=4), rng.normal(size=4)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)

    def nearest(v):
        return np.sign(v) * 2.0 ** np.round(np.log2(np.abs(v)))

    centered = x - x.mean((0, 1))
    variance = (centered * nearest(centered)).mean((0, 1))
    expected = centered * nearest(1 / np.sqrt(variance + 1e-3)) * nearest(gamma) + beta
    np.testing.assert_allclose(layer(x, training=True), expected, atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 0.5 + 0.5 * variance, rtol=1e-5)


def test_frozen_normalization_is_a_plain_one_with_the_same_outputs():
    x = np.random.default_rng(0).normal(2.0, 3.0, (20, 3, 3, 4)).astype("float32")
    layer = ShiftBatchNormalization(momentum=0.1)
    layer(x, training=True)
    layer.gamma.assign([0.3, -1.7, 1.0, 0.0])
    plain = layer.freeze()
    assert type(plain) is keras.layers.BatchNormalization
    np.testing.assert_allclose(plain(x, training=False), layer(x, training=False), rtol=1e-4, atol=1e-5)


def test_normalization_replaces_a_plain_one_within_a_factor_of_two():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    plain = keras.layers.BatchNormalization(momentum=0.0)
    plain(x, training=True)
    ratio = np.asarray(ShiftBatchNormalization.replacing(plain)(x)) / np.asarray(plain(x))
    assert (ratio > 0.7).all() and (ratio < 1.42).all()


def test_masked_steps_do_not_count():
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    mask = np.array([[True, True, False, False], [True, True, True, False]])
    layer, reference = ShiftBatchNormalization(momentum=0.0), ShiftBatchNormalization(momentum=0.0)
    layer(x, training=True, mask=mask)
    reference(x[mask], training=True)
    np.testing.assert_allclose(layer.moving_mean, reference.moving_mean, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, reference.moving_variance, atol=1e-6)


def test_gradient_passes_through_the_shifts():
    layer = ShiftBatchNormalization(epsilon=1e-7)
    x = tf.constant([[1.0], [-1.0], [3.0], [-3.0]])
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(layer(x, training=True) * [[1.0], [2.0], [3.0], [-1.0]])
    gradients = tape.gradient(value, [layer.gamma.value, layer.beta.value])
    # The shifted squares 1, 1, 12, 12 have the mean 6.5: the outputs are the inputs times AP2(0.39) = 0.5.
    np.testing.assert_allclose(gradients[0], [0.5 * (1 - 2 + 9 + 3)], rtol=1e-5)
    np.testing.assert_allclose(gradients[1], [5.0])


def test_two_steps_of_shift_based_adamax_by_hand():
    weight = keras.Variable([1.0, -2.0, 0.5])
    optimizer = ShiftBasedAdaMax(learning_rate=0.5, beta_1=0.75, beta_2=0.5)
    optimizer.build([weight])
    optimizer.apply([np.array([4.0, -3.0, 0.0], "float32")])
    # m = g / 4 = (1, -0.75, 0), v = (4, 3, 0); AP2(1 / 0.25) = 4; AP2(1/4) = 1/4, AP2(1/3) = 1/4.
    np.testing.assert_allclose(weight, [1 - 0.5 * 4 * 1 / 4, -2 + 0.5 * 4 * 0.75 / 4, 0.5], rtol=1e-6)
    before = weight.numpy()
    optimizer.apply([np.array([1.0, 1.0, 0.0], "float32")])
    # m = (1, -0.3125, 0), v = (2, 1.5, 0); 1 - 0.75**2 = 0.4375, AP2(2.286) = 2; AP2(1/2) = AP2(1/1.5) = 1/2.
    np.testing.assert_allclose(weight, before - [0.5 * 2 * 1 / 2, -0.5 * 2 * 0.3125 / 2, 0.0], rtol=1e-6)


def test_shift_based_adamax_is_adamax_where_all_are_powers_of_two():
    # A constant gradient of a power of two, and a mean that has settled: every shift is exact.
    ours, theirs = keras.Variable([1.0]), keras.Variable([1.0])
    for variable, optimizer in (
        (ours, ShiftBasedAdaMax(0.01, beta_1=0.5, beta_2=0.5)),
        (theirs, keras.optimizers.Adamax(0.01, beta_1=0.5, beta_2=0.5, epsilon=0.0)),
    ):
        optimizer.build([variable])
        optimizer.apply([np.array([0.25], "float32")])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_shift_based_adamax_trains_and_is_saved(tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile(ShiftBasedAdaMax(2.0**-5), "mse")
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    history = model.fit(x, x.sum(1), epochs=30, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < 0.05 * history[0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert again.get_config() == model.optimizer.get_config()
    np.testing.assert_array_equal(again.variables[-1], model.optimizer.variables[-1])


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"epsilon": 0.0}])
def test_normalization_refuses(options):
    with pytest.raises(ValueError, match=f"Argument `{next(iter(options))}`"):
        ShiftBatchNormalization(**options)


def test_adamax_refuses_a_decay_of_one():
    with pytest.raises(ValueError, match="Argument `beta_2`"):
        ShiftBasedAdaMax(beta_2=1.0)
