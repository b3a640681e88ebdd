"""Post-training quantization: grids, corrected means, limiting cases, and the file."""

import json
import math

import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression import MagnitudePruning, NoEffectWarning, PostTrainingQuantization
from tfkit.compression.clustering import is_clustered
from tfkit.compression.fake_quantize import FakeQuantize
from tfkit.compression.post_training import FixedGrid
from tfkit.compression.reparameterized import Reparameterized
from tfkit.export import convert, verify
from tfkit.internal import surgery

L = keras.layers


def trained(*layers, shape, seed=0):
    """Returns a model with drawn weights; its biases and statistics are not zero."""
    model = keras.Sequential([keras.Input(shape), *layers])
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            layer.kernel.assign(rng.normal(size=layer.kernel.shape) / np.sqrt(np.prod(layer.kernel.shape[:-1])))
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(size=layer.bias.shape))
        if isinstance(layer, L.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.2, 2, layer.gamma.shape))
            layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
    return model


def small(*, seed=0):
    layers = L.Conv2D(6, 3, use_bias=False), L.BatchNormalization(), L.ReLU(), L.Flatten(), L.Dense(3)
    return trained(*layers, shape=(6, 6, 2), seed=seed)


X = zoo._normal(60, 6, 6, 2)


@pytest.mark.parametrize("calibration", ["percentile", "kl"])
def test_eight_bits_change_little_and_the_file_agrees(calibration, tmp_path):
    model = small()
    compressor = PostTrainingQuantization(X, calibration=calibration, weight_scale="mse")
    final = compressor.apply(model)
    wanted = np.asarray(model(X))
    assert np.abs(final(X) - wanted).max() < (0.3 if calibration == "kl" else 0.03) * np.ptp(wanted)
    assert np.any(np.asarray(final(X)) != wanted)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    verify(final, path, X).raise_if_different()


@pytest.mark.parametrize(("bits", "weight_scale"), [(2, "mse"), (8, "max")])
def test_weights_lie_on_the_grid(bits, weight_scale):
    final = PostTrainingQuantization(X, bits=bits, weight_scale=weight_scale).apply(small())
    weighted = [layer for layer in final.layers if layer.weights]
    assert len(weighted) == 2
    for layer in weighted:
        kernel, grid = np.asarray(layer.kernel), layer.kernel_constraint
        assert grid.bits == bits and grid.holds(kernel)
        assert grid.per_channel == (bits == 8 or isinstance(layer, L.Conv2D))
        assert np.abs(np.round(kernel / grid.scale)).max() == 2 ** (bits - 1) - 1


def test_bits_by_layer_and_one_scale_for_a_kernel():
    final = PostTrainingQuantization(X, bits={"conv*": 8, "Dense": 3}, per_channel=False).apply(small())
    assert all(layer.kernel_constraint.scale.size == 1 for layer in final.layers if layer.weights)
    assert [layer.kernel_constraint.bits for layer in final.layers if layer.weights] == [8, 3]


def test_minmax_ranges_are_those_of_the_data():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, L.Dense(4, kernel_initializer="identity")(inputs))
    x = np.concatenate([np.full((1, 4), -2.0), np.full((1, 4), 3.0), np.zeros((9, 4))]).astype("float32")
    prepared = PostTrainingQuantization(x).prepare(model)
    for quantizer in prepared.layers:
        if isinstance(quantizer, FakeQuantize):
            assert (float(quantizer.moving_minimum), float(quantizer.moving_maximum)) == (-2, 3)


def test_ranges_are_taken_from_the_float_model():
    model = small()
    two, eight = (PostTrainingQuantization(X, bits=bits, equalize=False).prepare(model) for bits in (2, 8))
    ends = [
        [float(q.moving_maximum) for q in prepared.layers if isinstance(q, FakeQuantize)] for prepared in (two, eight)
    ]
    np.testing.assert_allclose(*ends, rtol=1e-6)


def test_bias_correction_restores_the_mean_of_a_linear_layer():
    model = trained(L.Dense(5, use_bias=False), shape=(6,))
    x = zoo._normal(200, 6) + 1
    means = {}
    for correct in (False, True):
        compressor = PostTrainingQuantization(x, bits=3, bias_correction=correct)
        prepared = compressor.prepare(model)
        layer = next(layer for layer in prepared.layers if isinstance(layer, Reparameterized))
        linear = keras.Model(prepared.inputs, layer.output)
        means[correct] = np.asarray(linear(x)).mean(axis=0)
    wanted = np.asarray(model(x)).mean(axis=0)
    np.testing.assert_allclose(means[True], wanted, atol=1e-5)
    assert np.abs(means[False] - wanted).max() > 0.01


def test_bias_correction_goes_through_the_layers_in_order():
    model = small()
    found = {}
    for correct in (False, True):
        compressor = PostTrainingQuantization(X, bits=3, equalize=False, bias_correction=correct)
        prepared = compressor.prepare(model)
        layers = [layer for layer in prepared.layers if isinstance(layer, Reparameterized)]
        outputs = keras.Model(prepared.inputs, [layer.output for layer in layers])(X)
        found[correct] = [np.asarray(x).mean(axis=tuple(range(len(x.shape) - 1))) for x in outputs]
    normalized = np.asarray(keras.Model(model.inputs, model.layers[1].output)(X))
    wanted = [normalized.mean(axis=(0, 1, 2)), np.asarray(model(X)).mean(axis=0)]
    for plain, corrected, mean in zip(found[False], found[True], wanted, strict=True):
        np.testing.assert_allclose(corrected, mean, atol=1e-4)
        assert np.abs(plain - mean).max() > 1e-3


def test_sixteen_bit_activations_and_eight_bit_weights_on_a_grid_change_nothing():
    model = trained(L.Dense(4), shape=(5,))
    rng = np.random.default_rng(0)
    kernel = rng.integers(-127, 128, (5, 4)).astype("float32")
    kernel[0] = 127
    model.layers[0].kernel.assign(kernel / 64)

    class Fine(PostTrainingQuantization):
        def quantizer(self, name, role):
            return FakeQuantize(16, self.momentum, name=name)

    x = zoo._normal(50, 5)
    final = Fine(x, equalize=False).apply(model)
    np.testing.assert_array_equal(final.layers[-2].kernel, kernel / 64)
    np.testing.assert_allclose(final(x), model(x), atol=1e-3)


def test_equalization_and_correction_help_at_few_bits():
    model = trained(L.Conv2D(8, 3), L.ReLU(), L.DepthwiseConv2D(3), L.ReLU(), L.Flatten(), L.Dense(4), shape=(8, 8, 2))
    scales = 10 ** np.random.default_rng(0).uniform(-1, 1, 8).astype("float32")
    first, second = model.layers[0], model.layers[2]
    first.kernel.assign(np.asarray(first.kernel) * scales)
    first.bias.assign(np.asarray(first.bias) * scales)
    second.kernel.assign(np.asarray(second.kernel) / scales[:, None])
    x = zoo._normal(60, 8, 8, 2)
    error = {}
    for on in (False, True):
        compressor = PostTrainingQuantization(x, equalize=on, bias_correction=on)
        error[on] = float(np.square(compressor.apply(model)(x) - np.asarray(model(x))).mean())
        assert len(compressor.equalized) == (2 if on else 0)
    assert error[True] < error[False]


def test_a_model_of_many_kinds(tmp_path):
    inputs = keras.Input((6, 6, 3))
    x = L.ReLU(6.0)(L.BatchNormalization()(L.SeparableConv2D(4, 3)(inputs)))
    x = L.Concatenate()([x, L.Conv2D(4, 3, activation="relu")(inputs)])
    model = keras.Model(inputs, L.Dense(3, activation="softmax")(L.GlobalAveragePooling2D()(x)))
    x = zoo._normal(20, 6, 6, 3)
    final = PostTrainingQuantization(x).apply(model)
    assert not any(isinstance(layer, (L.BatchNormalization, L.SeparableConv2D)) for layer in final.layers)
    np.testing.assert_allclose(final(x), model(x), atol=0.02)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat")
    for result in verify(final, path, x).results:
        assert result.max_error_steps <= 2.01


def test_several_inputs_and_excluded_layers():
    left, right = keras.Input((4,), name="left"), keras.Input((5,), name="right")
    first, second = L.Dense(3, name="first"), L.Dense(3, name="second")
    model = keras.Model({"left": left, "right": right}, first(left) + second(right))
    x = {"left": zoo._normal(20, 4), "right": zoo._normal(20, 5)}
    compressor = PostTrainingQuantization(x, exclude=["second"])
    final = compressor.apply(model)
    assert final.get_layer("first").kernel_constraint is not None
    assert final.get_layer("second").kernel_constraint is None
    np.testing.assert_array_equal(final.get_layer("second").kernel, second.kernel)
    np.testing.assert_allclose(final(x), model(x), atol=0.05)
    assert {row.layer: row.status for row in compressor.report()}["second"] == "float"


def test_zeros_and_shared_values_survive():
    rng = np.random.default_rng(0)
    sparse, shared = small(), small()
    for model, values in ((sparse, [0, 0, 0.3, -0.7, 0.11]), (shared, [-0.5, 0.25, 0.75])):
        for layer in model.layers:
            if hasattr(layer, "kernel"):
                kernel = rng.choice(values, layer.kernel.shape)
                layer.kernel.assign(kernel + 1e-3 * rng.normal(size=kernel.shape) * (kernel != 0) * (model is sparse))
    old = [np.asarray(layer.kernel) for layer in sparse.layers if hasattr(layer, "kernel")]
    new = [layer.kernel for layer in PostTrainingQuantization(X).apply(sparse).layers if hasattr(layer, "kernel")]
    for before, after in zip(old, new, strict=True):
        np.testing.assert_array_equal(np.asarray(after)[before == 0], 0)
    final = PostTrainingQuantization(X).apply(shared)
    assert is_clustered(np.asarray(final.layers[-2].kernel))
    convolution = next(layer for layer in final.layers if isinstance(layer, L.Conv2D))
    steps = np.round(np.asarray(convolution.kernel) / convolution.kernel_constraint.scale)
    assert len(np.unique(np.abs(steps))) == 3


def test_a_calibrated_model_can_be_trained_saved_and_is_left_alone(tmp_path):
    model = small()
    before = [weight.copy() for weight in model.get_weights()]
    compressor = PostTrainingQuantization(X, bits=4)
    prepared = compressor.prepare(model)
    prepared.save(tmp_path / "prepared.keras")
    again = keras.saving.load_model(tmp_path / "prepared.keras")
    np.testing.assert_array_equal(again(X), prepared(X))
    zoo.train(prepared, X[:12])
    assert np.abs(np.asarray(prepared(X)) - np.asarray(again(X))).max() > 0
    for layer in compressor.finalize(prepared).layers:
        if layer.weights:
            assert layer.kernel_constraint.holds(np.asarray(layer.kernel))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_random_choice_of_samples_repeats():
    model = trained(L.Dense(5), shape=(6,))
    data = zoo._normal(60, 6)
    compressors = [PostTrainingQuantization(data, samples=10, seed=seed) for seed in (0, 0, 1)]
    prepared = [compressor.prepare(model) for compressor in compressors]
    first, same, other = (np.concatenate([w.ravel() for w in model.get_weights()]) for model in prepared)
    np.testing.assert_array_equal(first, same)
    assert np.any(first != other)


def test_configuration_leaves_the_data_out():
    model, x = trained(L.Dense(5), L.ReLU(), L.Dense(3), shape=(4,)), zoo._normal(40, 4)
    compressor = PostTrainingQuantization(x, bits={"Dense": 4}, calibration="kl")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(compressor)))
    again = keras.saving.deserialize_keras_object(config)
    assert repr(again) == repr(compressor) and again.data is None and again.bits == {"Dense": 4}
    with pytest.raises(ValueError, match="set the attribute `data`"):
        again.prepare(model)
    again.data = x
    np.testing.assert_array_equal(again.prepare(model)(x), compressor.prepare(model)(x))


def test_bad_arguments_and_data_are_refused():
    for arguments in (
        {"bits": 1}, {"bits": {"Dense": 9}}, {"calibration": "best"}, {"percentile": 40}, {"weight_scale": "min"},
        {"samples": 0}, {"activation_bits": 9},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="Received"):
            PostTrainingQuantization(X, **arguments)
    model = small()
    for data in (np.zeros((0, 6, 6, 2)), np.full((3, 6, 6, 2), math.nan), np.zeros((3, 5, 6, 2)), []):
        with pytest.raises(ValueError, match="`data`"):
            PostTrainingQuantization(data).prepare(model)
    with pytest.raises(ValueError, match="finalize"):
        PostTrainingQuantization(X).prepare(MagnitudePruning(0.5).prepare(model))
    with pytest.warns(NoEffectWarning):
        PostTrainingQuantization(X, include=["nothing"]).prepare(trained(L.Dense(2), shape=(3,)))


def test_gradients_pass_straight_through_the_grid():
    import tensorflow as tf

    grid = FixedGrid(bits=3)
    grid.build((2, 2))
    weight = tf.Variable(np.array([[0.3, 0.0], [-1.0, 0.0]], "float32"))
    grid.adapt(np.asarray(weight))
    np.testing.assert_allclose(grid.scales, [1 / 3, 1 / 3])
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(grid.transform(weight) * [[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(tape.gradient(value, weight), [[1, 2], [3, 4]])
    np.testing.assert_allclose(grid.transform(np.array([[9.0, 0.2]], "float32")), [[1.0, 1 / 3]], atol=1e-6)
    assert not surgery.is_graph(grid)


def test_a_constant_input_has_a_range():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="mask")
    model = keras.Model([left, right], L.Dense(2)(L.Multiply()([L.Dense(4)(left), right])))
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    final = PostTrainingQuantization([x, np.ones_like(x)]).apply(model)
    expected = model([x, np.ones_like(x)])
    assert np.abs(final([x, np.ones_like(x)]) - expected).max() < 0.05 * np.abs(expected).max()
