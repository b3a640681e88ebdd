"""LARS, LARC and LAMB against vectors worked out by hand and an independent NumPy run; schedules; micro-batches."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfkit import models
from tfkit.training import (
    LAMB,
    LARC,
    LARS,
    LinearScaling,
    MicroBatched,
    MomentumCorrectedSGD,
    PolynomialWarmup,
    paths_in_layers,
    zero_gamma,
)

OPTIMIZERS = (LARS, LARC, LAMB)
#: Written by benchmarks/peers/optimizers.py.
OPTAX = json.loads(Path(__file__).with_name("optax.json").read_text(encoding="utf-8"))


def step(optimizer, weight, *gradients, name="kernel"):
    variable = keras.Variable(np.array(weight, "float32"), name=name)
    for gradient in gradients:
        optimizer.apply_gradients([(keras.ops.array(np.array(gradient, "float32")), variable)])
    return np.asarray(variable)


def test_lars_by_hand():
    """|w| = 5, |g| = 2, eta 0.01, beta 0.1: lambda = 0.05 / 2.5 = 0.02; w - 3 * 0.02 * (g + 0.1 w)."""
    new = step(LARS(3.0, 0.9, 0.01, 0.1), [3, 4], [0, 2])
    np.testing.assert_allclose(new, [3 - 0.06 * 0.3, 4 - 0.06 * 2.4], rtol=1e-6)


def test_lars_with_nesterov_by_hand():
    """The first step is (1 + m) times that without."""
    new = step(LARS(3.0, 0.9, 0.01, 0.1, nesterov=True), [3, 4], [0, 2])
    np.testing.assert_allclose(new, [3 - 1.9 * 0.06 * 0.3, 4 - 1.9 * 0.06 * 2.4], rtol=1e-6)


@pytest.mark.parametrize(("rate", "moved"), [(0.01, 0.01), (3.0, 0.02)])
def test_larc_takes_the_smaller_rate(rate, moved):
    new = step(LARC(rate, 0.0, 0.01, 0.1), [3, 4], [0, 2])
    np.testing.assert_allclose(new, [3 - moved * 0.3, 4 - moved * 2.4], rtol=1e-6)


def test_lamb_by_hand():
    """After one step both corrected moments are g and g^2: r = sign(g); |r + 0.1 w| with w = (3, 4)."""
    new = step(LAMB(0.5, epsilon=0.0, weight_decay=0.1), [3, 4], [2, -2])
    update = np.array([1 + 0.3, -1 + 0.4])
    np.testing.assert_allclose(new, np.array([3, 4]) - 0.5 * 5 / np.linalg.norm(update) * update, rtol=1e-5)


def test_lamb_bounds_clip_the_norm_of_the_weights():
    new = step(LAMB(0.5, epsilon=0.0, bounds=(0.0, 2.0)), [3, 4], [2, -2])
    np.testing.assert_allclose(new, np.array([3, 4]) - 0.5 * 2 / np.sqrt(2) * np.array([1, -1]), rtol=1e-6)


def reference(method, w, gradients, rate, decay, momentum=0.9, eta=0.01, b1=0.9, b2=0.99, eps=1e-6):
    w, v, m, s = w.astype(float), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients.astype(float), start=1):
        size = np.linalg.norm(w)
        if method == "LAMB":
            m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g * g
            u = (m / (1 - b1**t)) / (np.sqrt(s / (1 - b2**t)) + eps) + decay * w
            w = w - rate * size / np.linalg.norm(u) * u
        else:
            local = eta * size / (np.linalg.norm(g) + decay * size)
            v = momentum * v + (rate * local if method == "LARS" else min(rate, local)) * (g + decay * w)
            w = w - v
    return w


@given(st.integers(0, 10_000), st.floats(0.05, 2.0), st.floats(0.0, 0.3))
@settings(max_examples=8, deadline=None)
def test_runs_against_numpy(seed, rate, decay):
    rng = np.random.default_rng(seed)
    w, gradients = rng.normal(size=(4, 3)), rng.normal(size=(4, 4, 3))
    for optimizer in (
        LARS(rate, 0.9, 0.01, decay),
        LARC(rate, 0.9, 0.01, decay),
        LAMB(rate, 0.9, 0.99, 1e-6, decay),
    ):
        expected = reference(type(optimizer).__name__, w, gradients, rate, decay)
        np.testing.assert_allclose(step(optimizer, w, *gradients), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", OPTAX["cases"], ids=lambda case: case["name"])
def test_steps_are_those_of_optax(case):
    kind = {"LARS": LARS, "LAMB": LAMB}[case["class"]]
    for count, expected in enumerate(case["weights"], start=1):
        found = step(kind(**case["settings"]), OPTAX["start"], *OPTAX["gradients"][:count])
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_weight_at_zero_leaves_it(kind):
    assert np.abs(step(kind(0.1), [0, 0], [1, 2])).max() > 0.05


def test_larc_takes_the_plain_step_at_zero_whatever_its_rate():
    np.testing.assert_allclose(step(LARC(3.0, 0.0), [0, 0], [1, 2]), [-3, -6])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_excluded_weights_get_neither_ratio_nor_decay(kind):
    plain = step(
        keras.optimizers.Adam(0.1, epsilon=1e-6) if kind is LAMB else keras.optimizers.SGD(0.1), [3, 4], [1, 2]
    )
    excluding = kind(0.1, weight_decay=0.5, exclude=("*bias",))
    np.testing.assert_allclose(step(excluding, [3, 4], [1, 2], name="bias"), plain, rtol=1e-5)
    free = kind(0.1, weight_decay=0.5, exclude=())
    assert np.abs(step(free, [3, 4], [1, 2], name="bias") - plain).max() > 1e-3


def test_biases_and_scales_are_excluded_by_default_where_the_rate_is_that_of_sgd_or_adam():
    assert LARC().exclude == LAMB().exclude == ("*bias", "*gamma", "*beta")
    # Under LARS a bias would take the plain step at a rate of 8 or more.
    moved = step(LARS(8.0), [3, 4], [100, 200], name="bias") - [3, 4]
    np.testing.assert_allclose(np.linalg.norm(moved), 8.0 * 0.001 * 5, rtol=1e-5)


def test_keras_exclusion_from_decay_is_heeded():
    optimizer = LARS(3.0, 0.9, 0.01, 0.1)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    np.testing.assert_allclose(step(optimizer, [3, 4], [0, 2]), [3, 4 - 3 * 0.01 * 5 / 2 * 2], rtol=1e-6)


def test_layers_are_excluded_by_type():
    model = models.get("convnet_bn")((8, 8, 1), seed=0)
    paths = paths_in_layers(model, keras.layers.BatchNormalization)
    assert paths and all(path.endswith(("gamma", "beta")) for path in paths)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_configuration_makes_a_round_trip(kind):
    optimizer = kind(LinearScaling(0.1, 512, 64, 5), weight_decay=0.01, exclude=("*/bias", "stem/*"), clipnorm=1.0)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is kind and again.get_config() == optimizer.get_config()
    assert again.exclude == ("*/bias", "stem/*") and again.weight_decay == 0.01


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_embeddings_are_trained_as_dense_layers(kind):
    inputs = keras.Input((2,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(5, 3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile(kind(0.1, weight_decay=0.1), "mse")
    before = model.get_weights()[0]
    model.fit(np.array([[0, 1]]), np.array([1.0]), verbose=0)
    after = model.get_weights()[0]
    assert (before != after).all(), "the decay reaches rows without a gradient too"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LARS(momentum=1.0), "momentum"),
        (lambda: LARS(exclude="bias"), "exclude"),
        (lambda: LAMB(beta_2=-0.1), "beta_2"),
        (lambda: LAMB(bounds=(2.0, 1.0)), "bounds"),
        (lambda: LinearScaling(0.1, 0), "batch_size"),
        (lambda: LinearScaling(0.1, 8, warmup="slow"), "warmup"),
        (lambda: PolynomialWarmup(1.0, 10, 10), "warmup_steps"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_three_warmups():
    rates = {
        kind: [float(LinearScaling(0.1, 800, 100, 4, kind)(step)) for step in range(6)]
        for kind in ("gradual", "constant", "none")
    }
    np.testing.assert_allclose(rates["gradual"], [0.1, 0.275, 0.45, 0.625, 0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(rates["constant"], [0.1, 0.1, 0.1, 0.1, 0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(rates["none"], [0.8] * 6, rtol=1e-6)


def test_linear_scaling_multiplies_a_schedule():
    decay = keras.optimizers.schedules.PiecewiseConstantDecay([10], [0.1, 0.01])
    schedule = LinearScaling(decay, 512, 64, 5)
    np.testing.assert_allclose([float(schedule(step)) for step in (0, 5, 11)], [0.1, 0.8, 0.08], rtol=1e-6)
    again = LinearScaling.from_config(schedule.get_config())
    assert float(again(11)) == float(schedule(11))


def test_momentum_correction_follows_a_changing_rate():
    """v = m v + g, w = w - rate v, worked out in NumPy while the rate changes tenfold."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 1.0])  # 0.1 at steps 0 and 1, then 1.0
    gradients = np.array([[1.0], [2.0], [3.0], [0.5]])
    w, v = 1.0, 0.0
    for rate, (g,) in zip([0.1, 0.1, 1.0, 1.0], gradients, strict=True):
        v = 0.9 * v + g
        w -= rate * v
    np.testing.assert_allclose(step(MomentumCorrectedSGD(schedule), [1.0], *gradients), [w], rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_correction_changes_nothing_at_a_constant_rate(nesterov):
    gradients = np.random.default_rng(0).normal(size=(5, 3))
    expected = step(keras.optimizers.SGD(0.1, 0.9, nesterov=nesterov), [1, 2, 3], *gradients)
    actual = step(MomentumCorrectedSGD(0.1, 0.9, nesterov=nesterov), [1, 2, 3], *gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_zero_gamma_makes_each_residual_block_the_identity():
    model = models.get("resnet8")((8, 8, 3), seed=0)
    names = zero_gamma(model)
    assert names == [f"stage{stage}_block1_conv2_bn" for stage in (1, 2, 3)]
    x = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    block = keras.Model(
        model.input, [model.get_layer("stem_relu").output, model.get_layer("stage1_block1_relu2").output]
    )
    np.testing.assert_array_equal(*block(x))


def test_zero_gamma_needs_residual_blocks():
    with pytest.raises(ValueError, match="residual blocks"):
        zero_gamma(models.get("lenet_300_100")((28, 28, 1)))


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    decay = keras.regularizers.L2(0.01)
    inputs = keras.Input((5,))
    x = keras.layers.Dense(8, activation="tanh", kernel_regularizer=decay)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


@pytest.mark.parametrize("micro", [7, 20, 100])
def test_micro_batches_take_the_step_of_the_large_batch(micro):
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(47, 5)), rng.integers(0, 3, 47), rng.random(47)
    results = []
    for wrap in (lambda model: model, lambda model: MicroBatched(model, micro)):
        model = wrap(small_model())
        model.compile(
            keras.optimizers.Adam(0.01, global_clipnorm=0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        history = model.fit(x, y, batch_size=20, epochs=2, sample_weight=weight, shuffle=False, verbose=0)
        results.append((model.get_weights(), history.history))
    for expected, actual in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    for name in results[0][1]:
        np.testing.assert_allclose(results[1][1][name], results[0][1][name], rtol=1e-5)


def test_micro_batches_refuse_a_sum_over_the_batch():
    with pytest.raises(ValueError, match="reduction"):
        MicroBatched(small_model(), 4).compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
