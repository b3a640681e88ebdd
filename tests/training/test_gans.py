"""GANs: objectives in closed form, one step against a hand-written one, evaluation on known distributions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import linalg

from tfkit.export import convert, verify
from tfkit.training.gans import (
    GAN,
    OBJECTIVES,
    classifier_fid,
    classifier_kid,
    duplicates,
    features,
    grid,
    networks,
    plots,
    precision_recall,
    ring,
    stacked_coverage,
    stacked_digits,
)
from tfkit.training.gans.objectives import gradient_penalty

REAL, FAKE = np.array([[2.0], [-1.0]]), np.array([[0.5], [-3.0]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


#: Losses of the discriminator and the generator at these scores, as the papers write them.
EXPECTED = {
    "minimax": (-np.log(sigmoid(REAL)).mean() - np.log(1 - sigmoid(FAKE)).mean(), np.log(1 - sigmoid(FAKE)).mean()),
    "non_saturating": (
        -np.log(sigmoid(REAL)).mean() - np.log(1 - sigmoid(FAKE)).mean(), -np.log(sigmoid(FAKE)).mean(),
    ),
    "lsgan": (((REAL - 1) ** 2).mean() / 2 + (FAKE**2).mean() / 2, ((FAKE - 1) ** 2).mean() / 2),
    "wgan": (FAKE.mean() - REAL.mean(), -FAKE.mean()),
    "wgan_gp": (FAKE.mean() - REAL.mean(), -FAKE.mean()),
    "hinge": (np.maximum(0, 1 - REAL).mean() + np.maximum(0, 1 + FAKE).mean(), -FAKE.mean()),
    "r1": (-np.log(sigmoid(REAL)).mean() - np.log(1 - sigmoid(FAKE)).mean(), -np.log(sigmoid(FAKE)).mean()),
    "relativistic": (
        -np.log(sigmoid(REAL - FAKE.mean())).mean() / 2 - np.log(1 - sigmoid(FAKE - REAL.mean())).mean() / 2,
        -np.log(sigmoid(FAKE - REAL.mean())).mean() / 2 - np.log(1 - sigmoid(REAL - FAKE.mean())).mean() / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_in_closed_form(name):
    found = (OBJECTIVES[name].discriminator(REAL, FAKE), OBJECTIVES[name].generator(REAL, FAKE))
    np.testing.assert_allclose(found, EXPECTED[name], rtol=1e-6)


def test_gradient_penalties_in_closed_form():
    """The score 3 x1 + 4 x2 has a gradient of length 5 everywhere."""
    points = tf.constant(np.random.default_rng(0).normal(size=(6, 2)))
    score = lambda at: tf.linalg.matvec(at, tf.constant([3.0, 4.0], tf.float64))[:, None]  # noqa: E731
    assert float(gradient_penalty(score, points, "wgan_gp")) == pytest.approx(16)
    assert float(gradient_penalty(score, points, "r1")) == pytest.approx(12.5)


def small(objective="non_saturating", **settings):
    spectral = objective == "hinge"
    made = (networks.mlp_generator(2, 3, 8, 1, seed=0), networks.mlp_discriminator(2, 8, 1, spectral=spectral, seed=1))
    gan = GAN(*made, objective, **settings)
    gan.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.2))
    return gan


def test_one_step_by_hand():
    """The discriminator moves against the old generator, then the generator against the new discriminator."""
    gan = small(seed=5)
    x = ring().sample(10, 1)
    generator, discriminator = (networks.mlp_generator(2, 3, 8, 1, seed=0), networks.mlp_discriminator(2, 8, 1, seed=1))
    noise = [tf.random.stateless_normal((10, 3), [5, draw]) for draw in (0, 1)]
    fake = generator(noise[0])
    with tf.GradientTape() as tape:
        loss = OBJECTIVES["non_saturating"].discriminator(discriminator(x), discriminator(fake))
    for weight, slope in zip(discriminator.weights, tape.gradient(loss, discriminator.weights), strict=True):
        weight.assign_sub(0.2 * slope)
    with tf.GradientTape() as tape:
        g_loss = OBJECTIVES["non_saturating"].generator(None, discriminator(generator(noise[1])))
    for weight, slope in zip(generator.weights, tape.gradient(g_loss, generator.weights), strict=True):
        weight.assign_sub(0.1 * slope)
    history = gan.fit(x, batch_size=10, verbose=0, shuffle=False).history
    np.testing.assert_allclose([history["d_loss"][0], history["g_loss"][0]], [loss, g_loss], rtol=1e-5)
    for network, expected in ((gan.generator, generator), (gan.discriminator, discriminator)):
        for one, two in zip(network.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_both_networks_and_repeats(objective):
    x = ring().sample(40, 1)
    results = []
    for _ in range(2):
        gan = small(objective)
        gan.discriminator_optimizer.learning_rate = 0.01
        before = gan.generator.get_weights() + gan.discriminator.get_weights()
        gan.fit(x, batch_size=20, verbose=0, shuffle=False)
        results.append(gan.generator.get_weights() + gan.discriminator.get_weights())
        assert any((old != new).any() for old, new in zip(before, results[-1], strict=True))
        assert int(gan.discriminator_optimizer.iterations) == 2 * OBJECTIVES[objective].discriminator_steps
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.isfinite(one).all()


def test_wgan_clips_its_discriminator():
    gan = small("wgan")
    gan.fit(ring().sample(20, 1), batch_size=20, verbose=0)
    assert max(np.abs(weight).max() for weight in gan.discriminator.get_weights()) <= 0.01


def test_spectral_normalisation_bounds_every_layer():
    gan = small("hinge")
    gan.fit(ring().sample(400, 1), batch_size=10, verbose=0)
    for layer in gan.discriminator.layers[1:]:
        kernel = np.asarray(layer.layer.kernel)
        # Before the step that came last, each had spectral norm 1, up to the power iteration.
        assert np.linalg.norm(kernel, 2) == pytest.approx(1, abs=0.35)


def test_the_average_follows_the_generator():
    gan = small(ema=0.75)
    start = gan.generator.get_weights()
    gan.fit(ring().sample(10, 1), batch_size=10, verbose=0)
    for old, new, mean in zip(start, gan.generator.get_weights(), gan.averaged.get_weights(), strict=True):
        np.testing.assert_allclose(mean, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)
    assert (gan.generate(4) != gan.generate(4, averaged=False)).any()


def test_conditional_images_saving_and_export(tmp_path):
    shape, classes = (8, 8, 1), 3
    gan = GAN(
        networks.dcgan_generator(shape, 4, 4, classes=classes, seed=0),
        networks.dcgan_discriminator(shape, 4, classes=classes, spectral=True, seed=0),
        "hinge", classes=classes, ema=0.5,
    )  # fmt: skip
    gan.compile()
    x, y = np.random.default_rng(0).random((12, *shape), np.float32), np.arange(12) % classes
    gan.fit(x, y, batch_size=6, verbose=0)
    images = gan.generate(6)
    assert images.shape == (6, *shape) and images.min() >= 0 and images.max() <= 1
    zeros, ones = gan.generate(6, np.zeros(6, int)), gan.generate(6, np.ones(6, int))
    assert (zeros != ones).any(), "the label matters"
    gan.save(tmp_path / "gan.keras")
    again = keras.saving.load_model(tmp_path / "gan.keras")
    np.testing.assert_array_equal(again.generate(6), images)
    assert again.get_config()["objective"] == "hinge" and again.discriminator_optimizer.iterations == 2
    assert plots.sample_grid(images).axes
    with pytest.raises(ValueError, match="labels"):
        gan.generate(3, np.zeros(2, int))


def test_generator_reaches_tflite(tmp_path):
    generator = networks.dcgan_generator((8, 8, 1), 4, 4, seed=0)
    path = convert(generator, tmp_path / "generator.tflite")
    verify(generator, path, np.random.default_rng(0).normal(size=(8, 4)).astype("float32")).raise_if_different()


def test_frechet_distance_against_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 4)), rng.normal(size=(200, 4)) @ rng.normal(size=(4, 4)) + 0.5
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(first + second - 2 * root)
    assert classifier_fid(x, y) == pytest.approx(expected, rel=1e-6)
    assert classifier_fid(x, x) == pytest.approx(0, abs=1e-8)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    same = [classifier_kid(*rng.normal(size=(2, 100, 3)), subsets=1) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(50, 3)) + 1
    kernel = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(50) for j in range(50)]
    expected = (
        np.mean([kernel(x[i], x[j]) for i, j in pairs if i != j])
        + np.mean([kernel(y[i], y[j]) for i, j in pairs if i != j])
        - 2 * np.mean([kernel(x[i], y[j]) for i, j in pairs])
    )
    assert classifier_kid(x, y, subsets=1) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 50])
    half, far = rng.normal(size=(400, 2)), rng.normal(size=(400, 2)) - 500
    assert precision_recall(real, real) == (1, 1)
    precision, recall = precision_recall(real, half)
    assert precision > 0.9 and 0.4 < recall < 0.55
    assert precision_recall(real, far) == (0, 0)


def test_duplicates():
    rng = np.random.default_rng(0)
    real, collapsed = rng.normal(size=(500, 2)), np.repeat(rng.normal(size=(10, 2)), 50, axis=0)
    assert duplicates(real, rng.normal(size=(500, 2))) < 0.05
    assert duplicates(real, collapsed) == 1


def test_coverage_counts_modes():
    mixture = ring(8, 2.0, 0.02)
    points = np.concatenate([mixture.centres[:3], mixture.centres[:1] + 0.04, [[0.0, 0.0]]])
    found = mixture.coverage(points)
    assert (found.modes, found.of, found.high_quality) == (3, 8, 0.8)
    shares = np.array([2, 1, 1]) / 4
    assert found.divergence == pytest.approx(np.sum(shares * np.log(shares * 8)))
    assert mixture.coverage(points, least=2).modes == 1
    assert grid().coverage(np.full((4, 2), 77.0)).divergence == np.inf
    assert len(grid(5).centres) == 25 and np.ptp(grid(5, 2.0).centres) == 8


def test_stacked_digits_have_a_thousand_modes(digits, trained_digits_model):
    images = stacked_digits(digits.x_train, 500)
    assert images.shape == (500, 28, 28, 3)
    found = stacked_coverage(trained_digits_model, images)
    assert found.of == 1000 and 300 < found.modes <= 400  # 1000 (1 - exp(-0.5)) are expected
    assert features(trained_digits_model, digits.x_test[:5]).shape == (5, 32)


def test_plots():
    assert plots.losses({"d_loss": [1, 2], "g_loss": [2, 1]}).axes
    assert plots.points(ring().sample(20), {"a": ring().sample(20)}).axes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small("best"), "objective"),
        (lambda: small(classes=3), "2 inputs"),
        (lambda: small(ema=1.0), "ema"),
        (lambda: small(discriminator_steps=0), "discriminator_steps"),
        (lambda: networks.dcgan_generator((30, 28, 1)), "divisible by 4"),
        (lambda: GAN(networks.mlp_generator(), keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])),
         "without a last activation"),
        (lambda: classifier_fid(np.zeros((3, 2)), np.full((3, 2), np.nan)), "finite"),
        (lambda: ring().coverage(np.zeros((3, 5))), "points"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
