"""Adversarial training and its variants, on problems small enough to know the answer."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit.robustness import defenses
from tfkit.robustness.attacks import norms
from tfkit.robustness.defenses.trades import kl_divergence

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def linear(seed=0, features=6, classes=3):
    inputs = keras.Input((features,))
    init = keras.initializers.GlorotUniform(seed=seed)
    return keras.Model(inputs, keras.layers.Dense(classes, kernel_initializer=init)(inputs))


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    return np.clip(0.5 + 0.2 * rng.normal(size=(60, 6)) + 0.3 * np.eye(3, 6)[y], 0, 1).astype("float32"), y


VARIANTS = {
    "madry": lambda model, **more: defenses.AdversarialTraining(model, 0.1, steps=3, seed=1, **more),
    "trades": lambda model, **more: defenses.TRADES(model, 0.1, steps=3, beta=2.0, seed=1, **more),
    "free": lambda model, **more: defenses.FreeAdversarialTraining(
        model, 0.1, batch_size=20, replays=2, steps=3, seed=1, **more
    ),
    "fast": lambda model, **more: defenses.FastAdversarialTraining(model, 0.1, seed=1, **more),
}


def test_linear_model_gets_its_closed_form_worst_point():
    # The binary logistic loss rises along -sign(w) for label 1, so the worst point of the box is known.
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    w = np.array([[1.0], [-2.0], [0.5], [3.0]])
    model.set_weights([w, np.zeros(1)])
    wrapped = defenses.AdversarialTraining(model, 0.1, steps=5, bounds=(-1, 1), seed=0)
    wrapped.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    x, y = np.zeros((3, 4), "float32"), np.array([[1.0], [0.0], [1.0]], "float32")
    found = wrapped.craft(tf.constant(x), tf.constant(y), None, 0.1).numpy()
    np.testing.assert_allclose(found, 0.1 * np.sign(w.T) * (1 - 2 * y), atol=1e-6)


def test_l2_worst_point_lies_along_the_weights():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    w = np.array([[1.0], [-2.0], [0.5], [3.0]])
    model.set_weights([w, np.zeros(1)])
    wrapped = defenses.AdversarialTraining(model, 0.3, norm="l2", steps=40, step_size=0.1, bounds=(-1, 1), seed=0)
    wrapped.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    found = wrapped.craft(tf.zeros((2, 4)), tf.ones((2, 1)), None, 0.3).numpy()
    np.testing.assert_allclose(found, np.repeat(-0.3 * w.T / np.linalg.norm(w), 2, 0), atol=1e-3)


def test_step_is_gradient_descent_at_the_worst_point():
    # One SGD step of a linear logistic model, worked out by hand.
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    w = np.array([[1.0], [-1.0]])
    model.set_weights([w, np.zeros(1)])
    wrapped = defenses.AdversarialTraining(model, 0.25, steps=4, bounds=(-1, 1), seed=0)
    wrapped.compile(keras.optimizers.SGD(0.5), keras.losses.BinaryCrossentropy(from_logits=True))
    x, y = np.array([[0.5, 0.0]], "float32"), np.array([[1.0]], "float32")
    wrapped.fit(x, y, epochs=1, verbose=0)
    worst = np.array([0.25, 0.25])
    slope = (1 / (1 + np.exp(-(worst @ w)[0])) - 1) * worst
    np.testing.assert_allclose(model.get_weights()[0][:, 0], w[:, 0] - 0.5 * slope, atol=1e-6)


def test_radius_zero_is_ordinary_training(points):
    plain, wrapped = linear(), defenses.AdversarialTraining(model := linear(), 0.0, steps=2)
    for trained in (plain, wrapped):
        trained.compile(keras.optimizers.SGD(0.1), LOSS)
        trained.fit(*points, batch_size=20, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_fit_logs_and_learns(name, points):
    wrapped = VARIANTS[name](linear())
    wrapped.compile(
        keras.optimizers.Adam(0.05), LOSS, metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
    )
    history = wrapped.fit(*points, batch_size=20, epochs=12, verbose=0, validation_data=points).history
    names = {"loss", "accuracy", "adversarial_accuracy", "sparse_top_k_categorical_accuracy"}
    assert {*names, *(f"val_{n}" for n in names)} <= set(history)
    assert history["loss"][-1] < history["loss"][0]
    assert history["val_accuracy"][-1] >= history["val_adversarial_accuracy"][-1]
    assert history["val_accuracy"][-1] > 0.6


@pytest.mark.parametrize("name", VARIANTS)
def test_seed_repeats_and_round_trip(name, points, tmp_path):
    results = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        wrapped = VARIANTS[name](linear())
        wrapped.compile(keras.optimizers.SGD(0.1), LOSS)
        wrapped.fit(*points, batch_size=20, epochs=2, verbose=0)
        results.append(wrapped.model.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    wrapped.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(points[0]), wrapped(points[0]))
    assert type(again) is type(wrapped)
    assert json.dumps(again.get_config()) == json.dumps(wrapped.get_config())


def test_sample_and_class_weights_count(points):
    # Examples of weight zero leave no trace.
    x, y = points
    weight = (y == 0).astype("float32")
    models = []
    for labels in (y, np.where(y == 0, y, 1)):
        wrapped = defenses.AdversarialTraining(linear(), 0.1, steps=2, random_start=False)
        wrapped.compile(keras.optimizers.SGD(0.1), LOSS)
        wrapped.fit(x, labels, sample_weight=weight, batch_size=60, epochs=1, shuffle=False, verbose=0)
        models.append(wrapped.model.get_weights())
    for one, other in zip(*models, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


def test_warmup_grows_to_epsilon(points):
    wrapped = defenses.AdversarialTraining(linear(), 0.4, steps=1, warmup_steps=4)
    wrapped.compile("sgd", LOSS)
    assert float(wrapped.current_epsilon()) == pytest.approx(0.1)
    wrapped.fit(*points, batch_size=20, epochs=1, verbose=0)  # Three steps.
    assert float(wrapped.current_epsilon()) == pytest.approx(0.4)


def test_divergence():
    p, q = np.array([[0.2, 0.8]]), np.array([[0.5, 0.5]])
    wanted = (p * np.log(p / q)).sum()
    assert float(kl_divergence(tf.math.log(p), tf.math.log(q) + 3)[0]) == pytest.approx(wanted)


def test_trades_without_weight_is_the_clean_loss(points):
    wrapped = defenses.TRADES(linear(), 0.1, beta=0.0, steps=1, seed=0)
    wrapped.compile("sgd", LOSS)
    x, y = map(tf.constant, points)
    value, clean, _ = wrapped.objective(x, x + 0.1, y, None, training=False)
    assert float(value) == pytest.approx(float(LOSS(y, clean)), abs=1e-6)


def test_free_training_keeps_its_perturbation(points):
    wrapped = defenses.FreeAdversarialTraining(linear(), 0.1, batch_size=20, replays=3)
    wrapped.compile(keras.optimizers.SGD(0.1), LOSS)
    wrapped.fit(*points, batch_size=20, epochs=1, verbose=0)
    assert int(wrapped.optimizer.iterations) == 9  # Three batches, three times each.
    delta = wrapped.delta.numpy()
    assert 0 < np.abs(delta).max() <= 0.1 + 1e-6
    with pytest.raises(Exception, match="exceeds batch_size"):
        wrapped.fit(*points, batch_size=30, epochs=1, verbose=0)


def test_catastrophic_overfitting_stops_and_restores(points):
    wrapped = defenses.FastAdversarialTraining(linear(), 0.1, seed=0)
    wrapped.compile(keras.optimizers.Adam(0.1), LOSS)
    watch = defenses.CatastrophicOverfitting(*points, drop=0.2)

    class Break(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                self.kept = wrapped.model.get_weights()
            if epoch == 3:
                wrapped.model.set_weights([-10 * w for w in self.kept])

    breaker = Break()
    with pytest.warns(UserWarning, match="catastrophic"):
        history = wrapped.fit(*points, epochs=8, batch_size=20, verbose=0, callbacks=[breaker, watch])
    assert len(history.history["loss"]) == 4
    assert watch.accuracies[-1] < max(watch.accuracies) - 0.2
    assert float(watch._accuracy()) == pytest.approx(max(watch.accuracies))


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_random_starts_fill_the_ball(norm):
    start = norms.random_start(tf.constant([4000, 2]), 0.5, norm, tf.constant([1, 2])).numpy()
    size = np.abs(start).max(axis=1) if norm == "linf" else np.linalg.norm(start, axis=1)
    assert size.max() <= 0.5 + 1e-6
    # Uniform in two dimensions: a quarter lies within half of the radius. Five deviations of a binomial share.
    assert np.mean(size < 0.25) == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 4000))


def test_projection():
    delta = tf.constant([[3.0, 4.0], [0.3, 0.4]])
    np.testing.assert_allclose(norms.project(delta, 1.0, "l2"), [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(norms.project(delta, 1.0, "linf"), [[1, 1], [0.3, 0.4]], rtol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"epsilon": -1}, {"epsilon": 0.1, "norm": "l7"}, {"epsilon": 0.1, "steps": 0}, {"epsilon": 0.1, "bounds": (1, 0)}],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="Argument"):
        defenses.AdversarialTraining(linear(), **arguments)


def test_variants_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="steps"):
        defenses.FastAdversarialTraining(linear(), 0.1, steps=2)
    with pytest.raises(ValueError, match="clean_weight"):
        defenses.TRADES(linear(), 0.1, clean_weight=0.5)
    with pytest.raises(ValueError, match="one input"):
        defenses.AdversarialTraining("model", 0.1)
