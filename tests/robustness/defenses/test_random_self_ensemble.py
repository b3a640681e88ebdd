"""Random self-ensemble: where the noise goes, what the ensemble means, and that its file draws alike."""

import keras
import numpy as np
import pytest

from tfkit.export import convert
from tfkit.export.runner import Runner
from tfkit.robustness.defenses import RandomNoise, RandomSelfEnsemble


def network(seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(3, 3, activation="relu", name="one")(inputs)
    x = keras.layers.Conv2D(4, 3, activation="relu", name="two")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(keras.layers.Flatten()(x)))


@pytest.fixture
def x():
    return np.random.default_rng(0).uniform(size=(4, 6, 6, 1)).astype("float32")


def test_noise_comes_before_each_convolution():
    ensemble = RandomSelfEnsemble(network(), init_noise=0.3, inner_noise=0.2)
    kinds = [type(layer).__name__ for layer in ensemble.model.layers]
    assert kinds == ["InputLayer", "RandomNoise", "Conv2D", "RandomNoise", "Conv2D", "Flatten", "Dense"]
    noise = [layer.stddev for layer in ensemble.model.layers if isinstance(layer, RandomNoise)]
    assert noise == [0.3, 0.2]


def test_without_noise_it_is_the_network(x):
    model = network()
    ensemble = RandomSelfEnsemble(model, init_noise=0, inner_noise=0, samples=3)
    np.testing.assert_allclose(ensemble(x), keras.ops.log_softmax(model(x)), atol=1e-5)
    np.testing.assert_allclose(ensemble(x, training=True), model(x), atol=1e-6)


def test_noise_has_its_deviation_in_use_and_in_training():
    layer = RandomNoise(0.5, seed=3)
    zeros = np.zeros((200, 100), "float32")
    for training in (False, True):
        drawn = np.asarray(layer(zeros, training=training) if training is None else layer(zeros))
        assert drawn.std() == pytest.approx(0.5, rel=0.02)
        assert abs(drawn.mean()) < 0.02


def test_ensemble_is_the_mean_of_probabilities_of_independent_draws():
    # One input, one weight: p = sigmoid(2 w noise) has mean 1/2, and the mean of n draws 1/n of the variance.
    inputs = keras.Input((1, 1, 1))
    layer = keras.layers.Conv2D(2, 1, use_bias=False)
    model = keras.Model(inputs, keras.layers.Flatten()(layer(inputs)))
    layer.set_weights([np.array([1.0, -1.0]).reshape(1, 1, 1, 2)])
    x = np.zeros((4000, 1, 1, 1), "float32")
    spread = {
        n: np.exp(np.asarray(RandomSelfEnsemble(model, init_noise=1.0, samples=n, seed=1)(x))[:, 0]) for n in (1, 8)
    }
    assert spread[1].mean() == pytest.approx(0.5, abs=0.03)
    assert spread[8].var() * 8 == pytest.approx(spread[1].var(), rel=0.15)


def test_model_is_left_alone_and_trains(x, tmp_path):
    model = network()
    before = [weight.copy() for weight in model.get_weights()]
    ensemble = RandomSelfEnsemble(model, samples=4, seed=2)
    ensemble.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    y = np.arange(4) % 3
    first = ensemble.fit(x, y, epochs=40, verbose=0).history["loss"]
    assert np.mean(first[-5:]) < 0.9 * np.mean(first[:5])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    ensemble.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert [layer.stddev for layer in again.model.layers if isinstance(layer, RandomNoise)] == [0.2, 0.1]
    assert again.samples == 4
    for old, new in zip(ensemble.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_file_draws_from_the_same_distribution(x, tmp_path):
    ensemble = RandomSelfEnsemble(network(), init_noise=0.5, inner_noise=0.3, samples=5)
    path = convert(ensemble.deployed(), tmp_path / "model.tflite", batch_size=4)
    runner = Runner(path)
    of_file = np.exp([np.asarray(runner(x)) for _ in range(400)])
    of_model = np.exp(np.asarray(ensemble.predict(np.tile(x, (400, 1, 1, 1)), batch_size=400, verbose=0)))
    of_model = of_model.reshape(400, 4, 3)
    assert of_file.std(axis=0).min() > 0, "the file draws no noise"
    # Means within five standard errors of their difference, deviations within five of theirs.
    error = np.sqrt((of_file.var(axis=0) + of_model.var(axis=0)) / 400)
    assert (np.abs(of_file.mean(axis=0) - of_model.mean(axis=0)) < 5 * error).all()
    np.testing.assert_allclose(of_file.std(axis=0), of_model.std(axis=0), rtol=5 / np.sqrt(2 * 400) * np.sqrt(2))


def test_refuses_a_network_without_layers_for_noise():
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="convolutions"):
        RandomSelfEnsemble(keras.Model(inputs, keras.layers.ReLU()(inputs)))
