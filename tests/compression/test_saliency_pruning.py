import keras
import numpy as np
import pytest

from tfkit.compression import MagnitudePruning
from tfkit.compression.saliency_pruning import SaliencyPruning, saliencies
from tfkit.internal import surgery

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 5)).astype("float32"), RNG.integers(0, 3, 24)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(units=4):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(units, activation="tanh"), keras.layers.Dense(3)])


def kernels(model):
    return [np.asarray(w) for layer in surgery.leaf_layers(model) for w in surgery.compressible_weights(layer).values()]


def loss_with(model, layer, index, factor):
    """The loss in float64, with one weight scaled."""
    weights = [np.asarray(w, dtype="float64") for w in model.get_weights()]
    weights[2 * layer][index] *= factor
    logits = np.tanh(X @ weights[0] + weights[1]) @ weights[2] + weights[3]
    logits -= logits.max(1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(24), Y])


def test_snip_is_the_derivative_by_the_connection():
    model = classifier()
    found = saliencies(model, (X, Y), LOSS, "snip", batch_size=8)
    for layer, (kernel, values) in enumerate(zip(kernels(model), found.values(), strict=True)):
        step = 1e-4
        for index in np.ndindex(kernel.shape):
            up, down = (loss_with(model, layer, index, 1 + sign * step) for sign in (1, -1))
            assert values[index] == pytest.approx(abs(up - down) / (2 * step), rel=1e-3, abs=1e-6)


def test_taylor_is_the_mean_square_over_batches():
    model = classifier()
    halves = [saliencies(model, (X[h], Y[h]), LOSS, "snip") for h in (slice(0, 12), slice(12, 24))]
    whole = saliencies(model, (X, Y), LOSS, "taylor", batch_size=12)
    for name, value in whole.items():
        np.testing.assert_allclose(value, (halves[0][name] ** 2 + halves[1][name] ** 2) / 2, rtol=1e-4, atol=1e-9)


def test_obd_is_half_the_mean_squared_gradient_of_examples():
    model = classifier()
    singles = saliencies(model, (X, Y), LOSS, "taylor", batch_size=1)  # Batches of one example.
    for name, value in saliencies(model, (X, Y), LOSS, "obd", batch_size=8).items():
        np.testing.assert_allclose(value, singles[name] / 2, rtol=1e-4, atol=1e-9)


def quadratic():
    """A linear model whose Hessian is diagonal: example i sees weight i only, and residuals are +1 and -1 in turn."""
    scales = np.array([0.5, 1.0, 2.0, 3.0], "float32")
    weights = np.array([1.5, -2.0, 1.4, 0.1], "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[-1].kernel.assign(weights[:, None])
    x = np.repeat(np.diag(scales), 2, axis=0)
    y = (x @ weights + np.tile([1.0, -1.0], 4))[:, None]
    return model, x, y.astype("float32"), scales**2 / 4, weights  # h_i = mean over examples of x_i^2, of loss 1/2 r^2


def half_mse(y, p):
    return keras.ops.mean(0.5 * (y - p) ** 2)


@pytest.mark.parametrize("criterion", ["obd", "hessian"])
def test_second_order_saliency_is_the_rise_of_a_quadratic_loss(criterion):
    model, x, y, h, w = quadratic()
    (found,) = saliencies(model, (x, y), half_mse, criterion, batch_size=8).values()
    np.testing.assert_allclose(found[:, 0], 0.5 * h * w**2, rtol=1e-5)
    before = np.mean(0.5 * (y - x @ w[:, None]) ** 2)
    for i in range(4):  # The model sits at the minimum, so the rise when a weight goes is the saliency exactly.
        without = np.where(np.arange(4) == i, 0, w)[:, None]
        assert np.mean(0.5 * (y - x @ without) ** 2) - before == pytest.approx(found[i, 0], rel=1e-4)
    pruned = SaliencyPruning(0.5, criterion, data=(x, y), loss=half_mse).apply(model)
    assert (kernels(pruned)[0][:, 0] != 0).tolist() == [False, True, True, False]  # Magnitude would keep the first two.


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_share_is_exact(scope, rounds):
    pruning = SaliencyPruning(0.75, "snip", data=(X, Y), loss=LOSS, scope=scope, rounds=rounds)
    zeros = [int(np.sum(kernel == 0)) for kernel in kernels(pruning.apply(classifier(8)))]
    assert sum(zeros) == 48
    if scope == "layer":
        assert zeros == [30, 18]


def test_earlier_zeros_stay_and_count():
    sparse = MagnitudePruning(0.5, schedule="constant").apply(classifier(8))
    final = SaliencyPruning(0.75, "taylor", data=(X, Y), loss=LOSS, scope="layer").apply(sparse)
    for old, new in zip(kernels(sparse), kernels(final), strict=True):
        assert not np.any(new[old == 0]) and np.mean(new == 0) == 0.75


def test_layers_without_a_match_stay_dense():
    model = classifier()
    last = model.layers[-1].name
    first, second = kernels(SaliencyPruning({last: 0.5}, data=(X, Y), loss=LOSS, scope="layer").apply(model))
    assert np.all(first != 0) and np.mean(second == 0) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": X}, "pair"),
        ({"data": (X, Y[:3])}, "as many targets"),
        ({"criterion": "magic"}, "criterion"),
        ({"rounds": 0}, "rounds"),
        ({"sparsity": {"a": 0.5}}, "one threshold"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SaliencyPruning(**{"data": (X, Y), "loss": LOSS, **arguments})


@pytest.mark.parametrize("criterion", ["snip", "taylor", "obd", "hessian"])
def test_data_that_are_not_finite_are_refused(criterion):
    with pytest.raises(ValueError, match="finite"):
        saliencies(classifier(), (np.full_like(X, np.nan), Y), LOSS, criterion)
