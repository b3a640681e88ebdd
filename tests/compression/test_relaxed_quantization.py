import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import zoo
from tfkit.compression import RelaxedQuantization
from tfkit.compression.fake_quantize import FakeQuantize, QuantizedGrid
from tfkit.compression.relaxed_quantization import (
    RelaxedQuantizeActivation,
    RelaxedQuantizeWeight,
    first_grid,
    grid_probabilities,
    relaxed_round,
)
from tfkit.compression.reparameterized import Reparameterized
from tfkit.export import convert, verify

L = keras.layers


def uniform(shape, neighbours=1, seed=0):
    draws = 1 if neighbours == 1 else 2 * neighbours
    return np.random.default_rng(seed).random((draws, *shape)).astype("float32")


def logistic(t):
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(t, dtype=np.float64)))


def reference(x, scale, noise, low, high, numbers, temperature):
    """The paper's equations with Gumbel variables and differences of the cumulative distribution, in float64.

    Args:
        numbers: the uniform numbers, shape (points, *x.shape), or (1, *x.shape) for the difference of two Gumbels.

    Returns:
        (relaxed draw, probabilities of the local grid, draw of the categorical distribution).
    """
    x = np.asarray(x, dtype=np.float64)
    neighbours = max(1, len(numbers) // 2)
    below = np.clip(np.floor(x / scale), low, high - 1)
    points = below + np.arange(1 - neighbours, neighbours + 1).reshape(-1, *[1] * x.ndim)
    mass = logistic((scale * (points + 0.5) - x) / noise) - logistic((scale * (points - 0.5) - x) / noise)
    mass = np.where((points >= low) & (points <= high), mass, 0.0)
    probabilities = mass / mass.sum(axis=0)
    numbers = np.clip(numbers.astype(np.float64), 2.0**-24, 1 - 2.0**-24)
    gumbel = -np.log(-np.log(numbers))
    if len(numbers) == 1:
        gumbel = np.concatenate([np.zeros_like(numbers), np.log(numbers / (1 - numbers))])
    with np.errstate(divide="ignore"):
        scores = (np.log(probabilities) + gumbel) / temperature
    weights = np.exp(scores - scores.max(axis=0))
    weights /= weights.sum(axis=0)
    drawn = np.take_along_axis(points, scores.argmax(axis=0)[None], axis=0)[0]
    return scale * (weights * points).sum(axis=0), probabilities, scale * drawn


# The distribution.


def test_probabilities_are_the_mass_of_the_cells():
    x = np.linspace(-1.7, 1.7, 41).astype("float32")
    scale, noise, low, high = 0.25, 0.1, -4, 3
    # Wide enough to hold the whole grid: equation 5, summed over all of it.
    below, local = grid_probabilities(x, scale, noise, low, high, neighbours=8)
    grid = np.arange(low, high + 1)
    cells = logistic((scale * (grid + 0.5) - x[:, None]) / noise) - logistic(
        (scale * (grid - 0.5) - x[:, None]) / noise
    )
    whole = cells / cells.sum(axis=1, keepdims=True)
    for row, (middle, column) in enumerate(zip(np.asarray(below), np.asarray(local).T, strict=True)):
        found = dict(zip(middle + np.arange(-7, 9), column, strict=True))
        np.testing.assert_allclose([found[g] for g in grid], whole[row], atol=2e-5)
        assert sum(p for g, p in found.items() if not low <= g <= high) == 0
    # Narrow: the same, of the point below and the one above.
    _, local = grid_probabilities(x, scale, noise, low, high, neighbours=1)
    np.testing.assert_allclose(local, reference(x, scale, noise, low, high, uniform(x.shape), 1.0)[1], atol=2e-5)


@pytest.mark.parametrize("noise", [0.15, 0.3, 0.6])
def test_bias_of_rounding_is_that_of_the_closed_form(noise):
    """E[round(x + e)] = x + sum_n (-1)**n phi(2 pi n) sin(2 pi n x) / (pi n), phi(t) = pi s t / sinh(pi s t)."""
    x = np.linspace(-1.0, 1.0, 33).astype("float32")
    below, probabilities = grid_probabilities(x, 1.0, noise, -40, 40, neighbours=20)
    mean = np.asarray(below) + (np.arange(-19, 21)[:, None] * np.asarray(probabilities)).sum(axis=0)
    n = np.arange(1, 12)[:, None]
    argument = 2 * np.pi**2 * noise * n
    series = (-1.0) ** n * argument / np.sinh(argument) * np.sin(2 * np.pi * n * x) / (np.pi * n)
    np.testing.assert_allclose(mean, x + series.sum(axis=0), atol=2e-5)
    if noise >= 0.6:  # Stochastic rounding is unbiased once the noise is as wide as a step.
        np.testing.assert_allclose(mean, x, atol=1e-3)


@pytest.mark.parametrize("neighbours", [1, 2])
def test_hard_draws_come_as_often_as_they_should_and_lie_on_the_grid(neighbours):
    x = np.repeat(np.array([[-0.31, 0.02, 0.13, 0.88]], "float32"), 20_000, axis=0)
    scale = np.float32(0.3)
    drawn = np.asarray(relaxed_round(x, scale, 0.12, -1, 2, uniform(x.shape, neighbours), hard=True))
    integers = np.round(drawn / scale)
    np.testing.assert_array_equal(drawn, (integers * scale).astype("float32"))
    assert set(np.unique(integers)) == {-1, 0, 1, 2}
    below, probabilities = (np.asarray(v) for v in grid_probabilities(x[0], scale, 0.12, -1, 2, neighbours))
    for column in range(4):
        for position, k in enumerate(range(1 - neighbours, neighbours + 1)):
            share = np.mean(integers[:, column] == below[column] + k)
            assert abs(share - probabilities[position, column]) < 4 * 0.5 / np.sqrt(20_000)


def test_no_noise_is_rounding_and_no_temperature_is_a_grid_point():
    x = np.random.default_rng(0).normal(size=500).astype("float32")
    x = x[np.abs(np.abs(x / 0.3) % 1 - 0.5) > 0.03]  # The least noise that is computed is a thousandth of a step.
    rounded = np.clip(np.round(x / 0.3), -3, 3) * np.float32(0.3)
    for noise in (1e-30, 1e-4):
        np.testing.assert_allclose(relaxed_round(x, 0.3, noise, -3, 3, uniform(x.shape)), rounded, atol=2e-4)
    hard = relaxed_round(x, 0.3, 0.1, -3, 3, uniform(x.shape), hard=True)
    cold = np.asarray(relaxed_round(x, 0.3, 0.1, -3, 3, uniform(x.shape), temperature=1e-3))
    assert np.mean(np.abs(cold - hard) < 1e-4) > 0.99
    assert np.abs(np.asarray(hard) - rounded).max() > 0.2  # There was noise to speak of.


# Draws and gradients.


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("neighbours", [1, 2])
def test_draws_and_gradients_agree_with_the_equations(temperature, neighbours):
    rng = np.random.default_rng(3)
    x = rng.normal(size=60).astype("float32") * 0.6
    x = x[np.abs(np.abs(x / 0.25) % 1 - 0.5) < 0.49]  # The local grid moves on at each of its points.
    numbers = uniform(x.shape, neighbours)
    upstream = rng.normal(size=x.shape)
    settings = {"x": x.astype(np.float64), "scale": 0.25, "noise": 0.09}

    def expected(**changed):
        relaxed, _, hard = reference(*{**settings, **changed}.values(), -2, 3, numbers=numbers, temperature=temperature)
        return relaxed, hard

    variables = {name: tf.Variable(np.asarray(value, "float32")) for name, value in settings.items()}
    for hard in (False, True):
        with tf.GradientTape() as tape:
            y = relaxed_round(*map(tf.convert_to_tensor, variables.values()), -2, 3, numbers, temperature, hard)
            total = tf.reduce_sum(y * upstream.astype("float32"))
        np.testing.assert_allclose(y, expected()[hard], atol=5e-4)  # The grid's step is 0.25.
        gradients = dict(zip(variables, tape.gradient(total, list(variables.values())), strict=True))
        step = 1e-5
        slope = (expected(x=settings["x"] + step)[0] - expected(x=settings["x"] - step)[0]) / (2 * step)
        np.testing.assert_allclose(gradients["x"], upstream * slope, atol=2e-3)
        for name in ("scale", "noise"):
            ends = [expected(**{name: settings[name] + sign * step})[0] for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            if name == "scale" and hard:  # What the relaxed draw gives, but for the integer itself.
                slope = slope + (expected()[1] - expected()[0]) / settings["scale"]
            np.testing.assert_allclose(gradients[name], (upstream * slope).sum(), rtol=2e-3, atol=2e-3)


def test_gradients_are_finite_everywhere():
    x = tf.Variable(np.array([0.0, 0.5, -1.5, 1.5, 2.0, -2.0, 1e4, -1e4, 1e30, 0.5000001], "float32"))
    numbers = uniform(x.shape)
    numbers[:, :2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    for noise in (1e-35, 1e-3, 0.3, 1e3):
        for temperature in (0.01, 0.5, 1.0, 5.0):
            variables = [x, tf.Variable(1.0), tf.Variable(noise)]
            with tf.GradientTape() as tape:
                y = relaxed_round(*map(tf.convert_to_tensor, variables), -1, 1, numbers, temperature)
            assert np.isfinite(y).all() and np.abs(y).max() <= 1 + 1e-6
            for gradient in tape.gradient(y, variables):
                assert np.isfinite(gradient).all(), (noise, temperature)


# The weights.


def weight_transform(value, **options):
    transform = RelaxedQuantizeWeight(**options)
    transform.build(value.shape)
    transform.adapt(value)
    return transform


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_round_at_inference_and_draw_in_training(bits):
    value = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype("float32")
    value[0, 0, 0, :3] = 0.0
    transform = weight_transform(value, bits=bits, straight_through=True, keep_zeros=True)
    grid = transform.constraint(value)
    assert isinstance(grid, QuantizedGrid) and grid.scale.size == 1
    scale, limit = grid.scale[0], 2 ** (bits - 1) - 1
    rounded = np.asarray(transform.transform(value))
    np.testing.assert_allclose(rounded, np.clip(np.round(value / scale), -limit, limit) * scale, rtol=1e-6)
    np.testing.assert_array_equal(rounded, transform.transform(value))
    assert grid.holds(rounded)
    # The step starts where the squared error is least.
    for factor in (0.7, 1.4):
        other = np.clip(np.round(value / scale / factor), -limit, limit) * scale * factor
        assert np.square(rounded - value).mean() < np.square(other - value).mean()
    first, second = (np.asarray(transform(value, training=True)) for _ in range(2))
    assert (first != second).mean() > 0.05
    assert grid.holds(first) and (first[value == 0] == 0).all()


def test_a_weight_of_zeros_is_safe():
    transform = weight_transform(np.zeros((3, 2), "float32"), bits=2)
    np.testing.assert_array_equal(transform.transform(np.zeros((3, 2))), 0)
    assert np.isfinite(transform(np.zeros((3, 2)), training=True)).all()


def test_8_bits_change_next_to_nothing():
    value = np.random.default_rng(0).normal(size=(30, 20)).astype("float32")
    transform = weight_transform(value, bits=8)
    scale = float(np.exp(transform.grid[0]))
    inside = np.abs(value) < 127 * scale
    assert np.abs(transform.transform(value) - value)[inside].max() <= 0.5001 * scale < 0.02
    assert np.abs(transform(value, training=True) - value).max() < 2.1 * scale


# The activations.


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_the_first_batch_sets_the_grid(bits, signed):
    x = np.random.default_rng(0).normal(size=(400, 5)).astype("float32")
    x = x if signed else np.maximum(x, 0)
    layer = RelaxedQuantizeActivation(bits, straight_through=True)
    np.testing.assert_array_equal(layer(x), x)
    with pytest.raises(ValueError, match="has seen no data"):
        layer.freeze()
    drawn = np.asarray(layer(x, training=True))
    scale, zero = float(np.exp(layer.grid[0])), int(layer.zero_point)
    np.testing.assert_allclose(np.exp(layer.grid[1]), 0.1 * scale, rtol=1e-5)
    assert zero == (round(-x.min() / (x.max() - x.min()) * (2**bits - 1)) if signed else 0)
    integers = drawn / scale
    np.testing.assert_allclose(integers, np.round(integers), atol=2e-5)
    assert integers.min() >= -zero - 1e-4 and integers.max() <= 2**bits - 1 - zero + 1e-4
    layer(5 * x, training=True)
    assert float(np.exp(layer.grid[0])) == scale  # From now on it is the optimizer's.

    frozen = layer.freeze()
    assert type(frozen) is FakeQuantize
    np.testing.assert_array_equal(layer(x), frozen(x))
    np.testing.assert_array_equal(layer(x, training=True, update=False), frozen(x))
    expected = np.clip(np.round(x / scale), -zero, 2**bits - 1 - zero) * scale
    assert np.mean(np.abs(frozen(x) - expected) > 1e-4) < 1e-3  # Ties, and what is within rounding of one.


def test_the_first_step_is_about_the_best():
    x = np.random.default_rng(0).exponential(size=4000).astype("float32")
    scale, zero = first_grid(x, 3)

    def error(step):
        return np.square(np.clip(np.round(x / step), 0, 3) * step - x).mean()

    assert zero == 0
    assert error(float(scale)) <= 1.05 * min(error(step) for step in np.linspace(0.1, 3, 100))
    scale, zero = first_grid(np.zeros(4, "float32"), 15)
    assert np.isfinite(scale) and scale > 0 and zero == 0


# The whole.


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((10, 10, 1))
    x = L.MaxPooling2D(2, name="pool")(L.Conv2D(6, 3, activation="relu", name="conv")(inputs))
    x = L.Dense(12, activation="relu", name="hidden")(L.Flatten()(x))
    return keras.Model(inputs, L.Dense(3, name="logits")(x)), zoo._normal(60, 10, 10, 1)


def trained(model, x, steps=3, **options):
    """Trains without `fit`, which spends seconds on its graph; tests/conformance uses `fit`."""
    compressor = RelaxedQuantization(**options)
    prepared = compressor.prepare(model)
    targets = np.random.default_rng(1).normal(size=prepared(x).shape).astype("float32")
    optimizer = keras.optimizers.Adam(3e-3)
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(prepared(x, training=True) - targets))
        variables = prepared.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
    return prepared, compressor.finalize(prepared)


@pytest.mark.parametrize(("bits", "options"), [(2, {"straight_through": True}), (4, {"temperature": 0.5}), (8, {})])
def test_the_file_computes_what_the_model_does(bits, options, tmp_path):
    model, x = network()
    prepared, final = trained(model, x, bits=bits, activation_bits=bits, **options)
    # Draws come after the pooling in training, and rounding before it at the end, as integer kernels have it.
    assert [layer.name for layer in prepared.layers[2:5]] == ["conv", "pool", "conv_quantize"]
    assert [type(layer) for layer in final.layers[2:5]] == [L.Conv2D, FakeQuantize, L.MaxPooling2D]
    outputs = np.asarray(prepared(x))
    np.testing.assert_array_equal(outputs, prepared(x))
    limit = 2 ** (bits - 1) - 1
    for name in ("conv", "hidden", "logits"):
        layer = final.get_layer(name)
        assert layer.kernel_constraint.holds(np.asarray(layer.kernel))
        assert len(np.unique(layer.kernel)) <= 2 * limit + 1
        start = weight_transform(np.asarray(model.get_layer(name).kernel), bits=bits)
        assert (
            np.asarray(prepared.get_layer(name).transforms["kernel"][0].grid) != start.grid
        ).all()  # It has learned.
    report = verify(final, convert(final, tmp_path / "model.tflite", quantization="int8-qat"), x)
    # `finalize` puts the biases on their grids too, which may move a near-tie by a whole step of a coarse grid.
    assert np.mean(np.abs(outputs - final(x))) < (1e-6 if bits == 8 else 0.25 * report.results[0].step)
    for result in report.results:
        assert result.max_error_steps < 1.01 or (bits < 8 and result.kernels == "reference")


def test_seeds_repeat_and_every_tensor_has_its_own():
    model, x = network()

    def outputs(seed):
        prepared = RelaxedQuantization(bits=4, activation_bits=4, seed=seed).prepare(model)
        return [np.asarray(prepared(x, training=True)) for _ in range(2)], prepared

    (first, second), prepared = outputs(1)
    (again, _), _ = outputs(1)
    (other, _), _ = outputs(2)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any() and (first != other).any()
    seeds = [layer.seed for layer in prepared.layers if isinstance(layer, RelaxedQuantizeActivation)]
    seeds += [layer.transforms["kernel"][0].seed for layer in prepared.layers if isinstance(layer, Reparameterized)]
    assert len(seeds) == len(set(seeds)) == 5


def test_zeros_of_pruning_stay_zeros():
    model, x = network()
    for name in ("conv", "hidden"):
        layer = model.get_layer(name)
        layer.kernel.assign(np.where(np.abs(layer.kernel) < np.median(np.abs(layer.kernel)), 0, layer.kernel))
    prepared = RelaxedQuantization(bits=4, activation_bits=4).prepare(model)
    for name in ("conv", "hidden"):
        was = np.asarray(model.get_layer(name).kernel)
        mask, relaxed = prepared.get_layer(name).transforms["kernel"]
        drawn = np.asarray(relaxed(mask.transform(was), training=True))
        assert (drawn[was == 0] == 0).all() and np.mean(drawn == 0) < 0.7


def test_a_prepared_model_survives_saving(tmp_path):
    model, x = network()
    prepared = RelaxedQuantization(bits=3, activation_bits=3).prepare(model)
    prepared(x, training=True)
    prepared.save(tmp_path / "prepared.keras")
    again = keras.saving.load_model(tmp_path / "prepared.keras")
    np.testing.assert_array_equal(again(x), prepared(x))
    assert np.isfinite(again(x, training=True)).all()


def test_averages_after_a_quantizer_lie_on_its_grid():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 2))
    x = L.BatchNormalization()(L.Conv2D(4, 3, use_bias=False)(inputs))
    x = L.AveragePooling2D(2)(L.ReLU(name="re_lu")(x))
    model, x = keras.Model(inputs, L.Dense(3)(L.Flatten(name="flatten")(x))), zoo._normal(30, 8, 8, 2)
    compressor = RelaxedQuantization(bits=6, activation_bits=5, straight_through=True)
    prepared = compressor.prepare(model)
    drawn, _ = keras.Model(prepared.inputs, [prepared.get_layer("flatten").output, prepared.output])(x, training=True)
    step = np.exp(prepared.get_layer("re_lu_quantize").grid[0])
    np.testing.assert_allclose(drawn / step, np.round(drawn / step), atol=1e-4)
    assert np.any(drawn > 0)
    assert zoo.largest_difference(prepared(x), compressor.finalize(prepared)(x)) < 1e-4


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"activation_bits": 9}, {"temperature": 0.0}, {"noise": np.inf}, {"neighbours": 0}, {"seed": -1}],
)
def test_arguments_are_checked(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        RelaxedQuantization(**options)
