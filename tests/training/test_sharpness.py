"""Sharpness and loss landscapes on losses whose maximum over the box is known in closed form."""

import keras
import numpy as np
import pytest

from tfkit.training import filter_normalised, line, sharpness, surface


def quadratic(weights):
    """A model whose squared error at x = scaled unit vectors is mean_i (a_i (w_i - w*_i))^2."""
    inputs = keras.Input((len(weights),))
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    model.set_weights([np.array(weights, "float32")[:, None]])
    model.compile("sgd", "mse")
    return model


def data(scales, weights):
    x = np.diag(scales).astype("float32")
    return x, x @ np.array(weights, "float32")[:, None]


def test_full_space_in_closed_form():
    """At the minimum the maximum lies in a corner: mean_i (a_i eps (|w_i| + 1))^2, and f = 0 there."""
    scales, weights = [1.0, 2.0, 0.5], [1.0, -3.0, 0.0]
    expected = 100 * np.mean(np.square(np.array(scales) * 1e-2 * (np.abs(weights) + 1)))
    found = sharpness(quadratic(weights), data(scales, weights), 1e-2, iterations=30)
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_value_is_relative_to_one_plus_the_loss():
    """Away from the minimum in one dimension: f(w) = (w - 3)^2 at w = 1 is 4, and rises to (2 + 0.2)^2."""
    found = sharpness(quadratic([1.0]), data([1.0], [3.0]), 0.1)
    assert found == pytest.approx(100 * (2.2**2 - 4) / 5, rel=1e-4)


def test_a_steeper_loss_is_sharper_and_the_box_matters():
    weights = [1.0, -3.0, 0.5, 2.0]
    steep, flat = (sharpness(quadratic(weights), data([scale] * 4, weights)) for scale in (3.0, 1.0))
    assert steep == pytest.approx(9 * flat, rel=1e-3)
    wide = sharpness(quadratic(weights), data([1.0] * 4, weights), 2e-3)
    assert wide == pytest.approx(4 * flat, rel=1e-3)


def test_a_subspace_finds_no_more_than_the_full_space_and_repeats():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=30)
    arguments = (quadratic(weights), data(rng.random(30) + 0.5, weights), 1e-2)
    full = sharpness(*arguments, iterations=30)
    part = sharpness(*arguments, 5)
    assert part == sharpness(*arguments, 5) != sharpness(*arguments, 5, seed=1)
    assert 0 < part < full


def test_one_dimension_in_closed_form():
    """In one random direction the maximum is at an end of the interval."""
    weights = np.array([1.0, -3.0, 0.5])
    scales = np.array([1.0, 2.0, 3.0])
    direction = np.random.default_rng(4).normal(size=(3, 1)).astype(np.float32)[:, 0]
    direction /= np.linalg.norm(direction)
    reach = 1e-2 * (abs(direction @ weights) + 1)
    expected = 100 * np.mean(np.square(scales * reach * direction))
    assert sharpness(quadratic(weights), data(scales, weights), 1e-2, 1, seed=4) == pytest.approx(expected, rel=1e-3)


def test_the_model_is_left_alone():
    model = quadratic([1.0, 2.0])
    before = [weight.copy() for weight in model.get_weights()]
    sharpness(model, data([1.0, 1.0], [1.0, 2.0]), 0.1)
    line(model, quadratic([0.0, 0.0]), {"train": data([1.0, 1.0], [1.0, 2.0])}, [0.0, 0.5])
    surface(model, data([1.0, 1.0], [1.0, 2.0]), points=3)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_batches_give_the_loss_of_the_whole():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(11, 3)), rng.normal(size=(11, 1))
    model = quadratic([1.0, 2.0, 3.0])
    values = [sharpness(model, (x, y), 1e-2, batch_size=size) for size in (4, 11)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_line_in_closed_form():
    found = line(quadratic([0.0]), quadratic([2.0]), {"train": data([1.0], [0.0])}, [-1, 0, 0.5, 1])
    np.testing.assert_allclose(found.losses["train"], [4, 0, 1, 4], atol=1e-6)
    assert found.plot().axes


def test_directions_are_as_long_as_the_filters():
    model = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.Conv2D(3, 2), keras.layers.BatchNormalization()])
    kernel, bias = (np.asarray(weight) for weight in model.trainable_weights[:2])
    direction = filter_normalised(model)
    first = direction[: kernel.size].reshape(kernel.shape)
    np.testing.assert_allclose(
        np.linalg.norm(first.reshape(-1, 3), axis=0), np.linalg.norm(kernel.reshape(-1, 3), axis=0), rtol=1e-6
    )
    assert not direction[kernel.size :].any() and bias.size == 3


def test_surface_has_the_solution_in_the_middle():
    model = quadratic([1.0, 2.0])
    found = surface(model, data([1.0, 1.0], [1.0, 2.0]), 0.5, 5)
    assert found.losses.shape == (5, 5) and found.losses[2, 2] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(found.losses, found.losses[::-1, ::-1], rtol=1e-3, atol=1e-6)
    assert found.plot().axes


def test_bad_arguments_are_refused():
    model = quadratic([1.0])
    with pytest.raises(ValueError, match="epsilon"):
        sharpness(model, data([1.0], [1.0]), 0.0)
    with pytest.raises(ValueError, match="subspace"):
        sharpness(model, data([1.0], [1.0]), subspace=2)
    with pytest.raises(ValueError, match="same shapes"):
        line(model, quadratic([1.0, 2.0]), {"train": data([1.0], [1.0])})
    with pytest.raises(ValueError, match="loss"):
        sharpness(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), data([1.0], [1.0]))
