import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import zoo
from tfkit.compression import AdaptiveQuantization, MagnitudePruning, NoEffectWarning, WeightClustering
from tfkit.compression.adaptive_quantization import (
    AdaptiveCallback,
    AdaptivePrecision,
    entropy_bits,
    fewest_bits,
    fractional_bits,
    power_of_two_above,
    storage,
    tolerances,
)
from tfkit.compression.fake_quantize import QuantizedGrid
from tfkit.export import convert
from tfkit.export.runner import Runner
from tfkit.internal import surgery

VALUES = hnp.arrays(np.float32, 10, elements=st.floats(-1, 1, width=16))
TOLERANCES = hnp.arrays(np.float32, 10, elements=st.floats(0, 2, width=16))


@settings(deadline=None, max_examples=40)
@given(VALUES, TOLERANCES)
def test_rounding_takes_the_fewest_bits_of_all(values, tolerance):
    found = np.asarray(fewest_bits(values, tolerance, 8), np.float64)
    for w, tau, q in zip(values.astype(np.float64), tolerance.astype(np.float64), found, strict=True):
        if tau <= 0:
            assert q == w
        elif abs(w) <= tau:
            assert q == 0 and not np.signbit(q)
        else:
            grids = [np.rint(w * 2**n) / 2**n for n in range(9)]
            fits = [g for g in grids if abs(g - w) <= tau] or grids[-1:]
            assert q == fits[0]
            # The paper's count: ceil(-log2 tau) bits are enough.
            if tau >= 2**-8:
                assert fractional_bits(np.array([q]))[0] <= max(np.ceil(-np.log2(tau)), 0)


def test_share_by_hand():
    # All far from dropping: 3 / 3 each; tolerance = 1 / |g|.
    np.testing.assert_allclose(tolerances(np.array([1.0, 2.0, 4.0]), np.full(3, 10.0), 3.0), [1, 0.5, 0.25])
    # Dropping the first costs 0.5; it leaves 2.5 to two.
    np.testing.assert_allclose(tolerances(np.array([1.0, 2.0, 4.0]), np.array([0.5, 9, 9]), 3.0)[1:], [0.625, 0.3125])
    # A budget for all: nothing needs bits. None: nothing may move.
    assert np.all(tolerances(np.array([1.0, 2.0]), np.array([1.0, 1.0]), 3.0) >= 1)
    np.testing.assert_array_equal(tolerances(np.array([1.0, 2.0]), np.array([1.0, 1.0]), 0.0), 0)
    assert tolerances(np.array([0.0, 2.0]), np.array([1.0, 1.0]), 0.1)[0] == np.inf


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 0.95))
def test_tolerances_are_optimal(seed, share):
    """No feasible point has fewer bits than the solution, and the solution spends the whole budget."""
    rng = np.random.default_rng(seed)
    gradient, magnitude = rng.gamma(0.5, size=8) + 1e-3, rng.gamma(1.0, size=8) + 1e-3
    budget = share * float(gradient @ magnitude)
    solved = np.minimum(tolerances(gradient, magnitude, budget), magnitude)
    assert gradient @ solved == pytest.approx(budget)
    for _ in range(50):
        other = np.minimum(rng.gamma(0.5, size=8) * magnitude, magnitude)
        other *= min(1.0, budget / (gradient @ other))
        with np.errstate(divide="ignore"):
            assert np.log2(other).sum() <= np.log2(solved).sum() + 1e-9


def test_fractional_bits_by_hand():
    assert fractional_bits(np.array([0.0, 1.0, -1.0, 0.5, -0.75, 0.625, 3 / 64])).tolist() == [0, 0, 0, 1, 2, 3, 6]
    assert fractional_bits(np.array([1 / 3])) is None
    assert [power_of_two_above(np.array([v])) for v in (0.3, 0.5, 0.51, -3.0, 0.0)] == [0.5, 0.5, 1.0, 4.0, 1.0]


def test_storage_by_hand():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    kernel = np.array([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0], [-0.75, 0.0]]) * 0.25
    model.layers[0].kernel.assign(kernel)
    counted = storage(model)
    # Widths: five 0, and 1 (sign), 2 and 3.
    shares = np.array([5, 1, 1, 1]) / 8
    entropy = -8 * (shares * np.log2(shares)).sum()
    assert counted.parameters == 10 and counted.zeros == 5
    assert counted.value_bits == 1 + 2 + 3
    assert counted.width_bits == pytest.approx(entropy + 4 * 32)
    assert counted.scale_bits == 8 and counted.float_bits == 2 * 32
    assert counted.bits == pytest.approx(6 + entropy + 128 + 8 + 64)
    assert counted.ratio == pytest.approx(320 / counted.bits)
    assert counted.ratio_without_map == pytest.approx(320 / (6 + 8 + 64))


def test_storage_of_floats_is_32_bits_a_parameter():
    model, _ = zoo.mlp()
    model.layers[0].kernel.assign(np.random.default_rng(0).normal(size=(12, 16)))
    counted = storage(model)
    assert counted.bits == counted.float_bits == 32 * model.count_params() and counted.ratio == 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_entropy_against_its_definition(symbols):
    total = sum(-np.log2(symbols.count(s) / len(symbols)) for s in symbols)
    assert entropy_bits(np.array(symbols)) == pytest.approx(total, abs=1e-9)


def dense():
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(6)])


def kernel(model):
    return np.asarray(surgery.source(model.layers[-1]).kernel)


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 6)).astype("float32")


def fit(model, callbacks=(), epochs=6, rate=0.01):
    model.compile(keras.optimizers.Adam(rate), "mse")
    return model.fit(*data(), batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))


def test_tolerance_zero_changes_nothing():
    plain = dense()
    fit(plain, epochs=2)
    method = AdaptiveQuantization(end=0)
    prepared = method.prepare(dense())
    fit(prepared, method.callbacks(), epochs=2)
    np.testing.assert_array_equal(kernel(method.finalize(prepared)), kernel(plain))


def test_the_gradient_is_gathered():
    prepared = AdaptiveQuantization().prepare(dense())
    x, y = data()
    before = kernel(prepared).astype(np.float64)
    prepared.compile(keras.optimizers.SGD(0.0), "mse")
    prepared.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    gradients = [2 / 24 * x[i : i + 4].T @ (x[i : i + 4] @ before - y[i : i + 4]) for i in (0, 4)]
    expected = np.sqrt(np.mean(np.square(gradients), axis=0))
    transform = prepared.layers[-1].transforms["kernel"][0]
    np.testing.assert_allclose(transform.take_gradient(), expected, rtol=1e-4)
    assert not transform.take_gradient().any()


def test_a_round_gives_each_weight_the_tolerance_of_its_gradient():
    method = AdaptiveQuantization(max_bits=12)
    prepared = method.prepare(dense())
    transform = prepared.layers[-1].transforms["kernel"][0]
    gradient = np.random.default_rng(1).gamma(1.0, size=(5, 6)).astype("float32")
    transform.squares.assign(4 * gradient**2)
    transform.batches.assign(4.0)
    budget = 0.3 * float((gradient * np.abs(kernel(prepared))).sum())
    method.update(prepared, 0.3, [transform.take_gradient()])
    expected = tolerances(gradient.ravel().astype(np.float64), np.abs(kernel(prepared)).ravel(), budget)
    expected = np.minimum(expected, 2 * float(transform.scale))
    np.testing.assert_allclose(np.asarray(transform.tolerance).ravel(), expected, rtol=1e-5)
    final = kernel(method.finalize(prepared))
    assert np.all(np.abs(final - kernel(prepared)) <= np.asarray(transform.tolerance) + 1e-7)
    # The bound of the linear model.
    assert (gradient * np.abs(final - kernel(prepared))).sum() <= budget + 1e-6


def test_weights_without_bits_rest_and_come_back():
    method = AdaptiveQuantization()
    prepared = method.prepare(dense())
    before = kernel(prepared)
    transform = prepared.layers[-1].transforms["kernel"][0]
    dropped = np.abs(before) <= 1e-3
    dropped[:2] = True
    transform.tolerance.assign(np.where(dropped, 10.0, 1e-3))
    assert not np.asarray(prepared.layers[-1].effective_weights()["kernel"])[dropped].any()
    prepared.compile(keras.optimizers.SGD(0.1), "mse")
    prepared.fit(*data(), epochs=2, verbose=0)
    np.testing.assert_array_equal(kernel(prepared)[dropped], before[dropped])
    assert np.all(kernel(prepared)[~dropped] != before[~dropped])
    transform.tolerance.assign(np.zeros((5, 6)))
    np.testing.assert_array_equal(prepared.layers[-1].effective_weights()["kernel"], kernel(prepared))


@pytest.mark.parametrize("bound", [None, 1.0])
def test_trust_region_grows_within_the_bound_and_shrinks_beyond_it(bound):
    method = AdaptiveQuantization(bound, radius=0.2, growth=4.0, end=5)
    asked = []
    method.update = lambda model, radius, gradients: asked.append((radius, gradients))
    callback = AdaptiveCallback(method)
    callback.set_model(method.prepare(dense()))
    callback.set_params({"epochs": 8})
    callback.on_train_begin()
    for epoch, loss in enumerate([1.0, 0.9, 1.1, 0.9, 1.0, 0.9, 0.9]):
        callback.on_epoch_end(epoch, {"loss": loss})
    # First; kept; broken; kept and kept, by the root of the factor; then no more rounds.
    assert [radius for radius, _ in asked] == pytest.approx([0.2, 0.8, 0.2, 0.6, 0.8])
    assert asked[2][1] is asked[1][1] and asked[3][1] is not asked[2][1]  # Again with the gradients of the good one.


def test_no_round_before_the_bound_holds():
    method = AdaptiveQuantization(1e-9)
    prepared = method.prepare(dense())
    with pytest.warns(NoEffectWarning, match="loss_bound"):
        fit(prepared, method.callbacks(), epochs=2)
    assert not np.asarray(prepared.layers[-1].transforms["kernel"][0].tolerance).any()


def test_a_fit_drops_and_shortens_weights():
    method = AdaptiveQuantization(100.0, radius=0.2, growth=2.0)
    prepared = method.prepare(dense())
    history = fit(prepared, method.callbacks(), epochs=8).history
    assert history["zeros"][-1] > 0.3 and history["radius"][3] == pytest.approx(1 - 0.8 / 2.0**3)
    final = method.finalize(prepared)
    counted = storage(final)
    assert counted.zeros == np.count_nonzero(kernel(final) == 0) > 9
    assert counted.value_bits < 30 * 7 and counted.float_bits == 32 * 6


def test_weights_lie_on_a_grid_that_int8_files_store(tmp_path):
    method = AdaptiveQuantization(1e3)
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    prepared = method.prepare(model)
    zoo.train(prepared, np.random.default_rng(0).normal(size=(6, 6, 6, 1)), steps=4, callbacks=method.callbacks())
    final = method.finalize(prepared)
    for layer in (final.get_layer("conv"), final.layers[-1]):
        grid = layer.kernel_constraint
        assert isinstance(grid, QuantizedGrid) and grid.holds(np.asarray(layer.kernel)) and grid.bits <= 8
        # Dyadic values are exact, so the integers are.
        integers = np.asarray(layer.kernel) / grid.scale[0]
        np.testing.assert_array_equal(integers, np.rint(integers))
    runner = Runner(convert(final, tmp_path / "m.tflite"))
    tensors = runner.interpreter.get_tensor_details()
    (conv,) = [runner.interpreter.get_tensor(t["index"]) for t in tensors if tuple(t["shape"]) == (4, 3, 3, 1)]
    np.testing.assert_array_equal(np.transpose(conv, (1, 2, 3, 0)), np.asarray(final.get_layer("conv").kernel))


def test_structure_that_is_there_stays():
    sparse = MagnitudePruning(0.5, schedule="constant").apply(dense())
    method = AdaptiveQuantization(1e3)
    prepared = method.prepare(sparse)
    fit(prepared, method.callbacks(), epochs=3)
    final = kernel(method.finalize(prepared))
    assert not final[kernel(sparse) == 0].any() and not np.signbit(final[final == 0]).any()
    clustered = WeightClustering(2).apply(dense())
    prepared = method.prepare(clustered)
    fit(prepared, method.callbacks(), epochs=3)
    pairs = set(zip(kernel(clustered).ravel(), kernel(method.finalize(prepared)).ravel(), strict=True))
    assert len(pairs) == len(np.unique(kernel(clustered)))


def test_every_layer_trains_and_finalizes():
    model, inputs = zoo.nested()
    method = AdaptiveQuantization(1e3)
    prepared = method.prepare(model)
    zoo.train(prepared, inputs, steps=3, callbacks=method.callbacks())
    counted = storage(method.finalize(prepared))
    weights = sum(
        int(np.prod(w.shape))
        for layer in surgery.leaf_layers(model)
        for w in surgery.compressible_weights(layer).values()
    )
    assert counted.float_bits == 32 * (model.count_params() - weights)


def test_transform_of_zeros():
    transform = AdaptivePrecision()
    transform.build((3,))
    transform.adapt(np.zeros(3))
    np.testing.assert_array_equal(transform.transform(np.zeros(3, "float32")), 0)
    assert transform.constraint(np.zeros(3, "float32")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_bound": -0.1}, "loss_bound"),
        ({"growth": 0.5}, "growth"),
        ({"radius": 1.0}, "radius"),
        ({"max_bits": 0}, "max_bits"),
        ({"end": 1.2}, "end"),
        ({"end": -1}, "end"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveQuantization(**arguments)


def test_the_callback_needs_a_prepared_model():
    with pytest.raises(ValueError, match=r"AdaptiveQuantization.prepare"):
        fit(dense(), AdaptiveQuantization().callbacks())


def test_embeddings_whose_gradient_comes_as_slices():
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(12, 4)(inputs))
    method = AdaptiveQuantization(loss_bound=1e9)
    prepared = method.prepare(keras.Model(inputs, keras.layers.Dense(2)(x)))
    prepared.compile("sgd", "mse")
    tokens = np.random.default_rng(0).integers(0, 6, (16, 5))
    prepared.fit(tokens, np.ones((16, 2), "float32"), epochs=3, verbose=0, callbacks=method.callbacks())
    final = method.finalize(prepared)
    np.testing.assert_allclose(final(tokens), prepared(tokens), atol=1e-6)
    unseen = np.asarray(final.layers[1].embeddings)[6:]
    assert not unseen.any()  # No gradient ever came: nothing is lost without them.
