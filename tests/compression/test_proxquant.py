import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import zoo
from tfkit.compression import BinaryConnect, Chain, MagnitudePruning, ProxQuant, QuantizationAware, WeightClustering
from tfkit.compression.fake_quantize import QuantizedGrid
from tfkit.compression.proxquant import planned_pull, prox_l1, prox_l2
from tfkit.compression.quantized_sets import fit_scale, nearest_point, quantities, refined_scale
from tfkit.export import convert
from tfkit.export.runner import Runner
from tfkit.internal import surgery

WEIGHTS = hnp.arrays(np.float32, 12, elements=st.floats(-3, 3, width=16))
REGULARIZER = {"l1": lambda away: np.abs(away), "l2": lambda away: 0.5 * away**2}


def points(bits, scale):
    limit = 2 ** (bits - 1) - 1
    return scale * (np.array([-1.0, 1.0]) if bits == 1 else np.arange(-limit, limit + 1))


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, st.sampled_from([1, 2, 3]), st.sampled_from([0.0, 0.05, 0.4, 2.0, 50.0]), st.sampled_from(["l1", "l2"]))
def test_prox_is_the_brute_force_minimum(w, bits, strength, regularizer):
    """prox(w) = argmin_x 0.5 (x - w)^2 + strength min_p R(x - p), searched on a fine grid of x."""
    scale = 0.75
    prox = {"l1": prox_l1, "l2": prox_l2}[regularizer]
    found = np.asarray(prox(w, nearest_point(w, scale, bits), strength), dtype=np.float64)

    def objective(x, w):
        nearest = REGULARIZER[regularizer](x[..., None] - points(bits, scale)).min(axis=-1)
        return 0.5 * (x - w) ** 2 + strength * nearest

    grid = np.linspace(-4, 4, 8001)
    best = objective(grid[None, :], w[:, None].astype(np.float64)).min(axis=1)
    # The grid's step is 1e-3: its best is at most strength * scale * 1e-3 from the true minimum.
    assert np.all(objective(found, w) <= best + 1e-5)


def test_prox_of_the_paper_by_hand():
    # The set {-1, 1} and strength 0.5; 1.2 and 0.8 come to rest at 1.
    w = np.array([2.0, 1.2, 0.8, 0.1, -0.1, -3.0], np.float32)
    np.testing.assert_allclose(prox_l1(w, nearest_point(w, 1.0, 1), 0.5), [1.5, 1.0, 1.0, 0.6, -0.6, -2.5], rtol=1e-6)
    np.testing.assert_allclose(prox_l2(w, nearest_point(w, 1.0, 1), 1.0), (w + np.sign(w)) / 2, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, st.sampled_from([1, 2, 3, 4]))
def test_limits_of_the_strength(w, bits):
    point = np.asarray(nearest_point(w, 0.6, bits))
    for prox in (prox_l1, prox_l2):
        np.testing.assert_array_equal(prox(w, point, 0.0), w)
        np.testing.assert_allclose(prox(w, point, 1e9), point, atol=1e-6)
    distances = np.abs(w[:, None] - points(bits, 0.6))
    np.testing.assert_allclose(np.abs(w - point), distances.min(axis=1), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_fitted_scale_is_the_best_of_a_fine_search(bits):
    w = np.random.default_rng(bits).normal(size=2000).astype("float32")

    def error(scale):
        return np.sum((w - np.asarray(nearest_point(w, np.float32(scale), bits))) ** 2)

    fitted = fit_scale(w, bits)
    best = min(error(s) for s in np.linspace(0.01, 2.0, 800))
    assert error(fitted) <= best * 1.02
    if bits == 1:
        assert fitted == pytest.approx(np.abs(w).mean(), rel=1e-5)
    # A fixed point of the alternation that training goes on with.
    assert float(refined_scale(w, np.float32(fitted), bits)) == pytest.approx(fitted, rel=1e-3)


def dense(units=6, inputs=5):
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(units)])


def trained(compressor, optimizer, epochs=2, model=None, **options):
    """Returns the prepared model after 4 steps an epoch on fixed batches."""
    prepared = compressor.prepare(model or dense())
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 6)).astype("float32")
    prepared.compile(optimizer, "mse", **options)
    prepared.fit(x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0, callbacks=compressor.callbacks())
    return prepared


def kernel(model):
    return np.asarray(surgery.source(model.layers[-1]).kernel)


@pytest.mark.parametrize("per_execution", [1, 4])
def test_homotopy_follows_algorithm_1(per_execution):
    """With gradients of zero only the prox moves a weight: by learning rate * lambda * t * scale at step t."""
    model = dense()
    model.layers[-1].kernel.assign(np.linspace(-0.9, 0.9, 30).reshape(5, 6))
    before = kernel(model)
    proxquant = ProxQuant(1, scale=1.0, strength=0.2, hard_epoch=2)
    prepared = proxquant.prepare(model)
    prepared.compile(
        keras.optimizers.SGD(0.05), loss=lambda y, p: 0.0 * keras.ops.sum(p), steps_per_execution=per_execution
    )
    x, y = np.ones((8, 5), "float32"), np.zeros((8, 6), "float32")
    prepared.fit(x, y, batch_size=2, epochs=1, verbose=0, callbacks=proxquant.callbacks())
    pulled = 0.05 * 0.2 * (1 + 2 + 3 + 4)
    expected = np.sign(before) * np.minimum(np.abs(before) + pulled, 1.0)
    np.testing.assert_allclose(kernel(prepared), expected, atol=1e-6)
    # A second fit that goes on at epoch 1 goes on with t = 5 … 8.
    prepared.fit(x, y, batch_size=2, initial_epoch=1, epochs=2, verbose=0, callbacks=proxquant.callbacks())
    expected = np.sign(before) * np.minimum(np.abs(before) + pulled + 0.05 * 0.2 * 26, 1.0)
    np.testing.assert_allclose(kernel(prepared), expected, atol=1e-6)
    assert prepared.layers[-1].layer.kernel.constraint is None


def test_strength_zero_is_plain_training():
    plain = dense()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 6)).astype("float32")
    plain.compile(keras.optimizers.RMSprop(0.01), "mse")
    plain.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    prepared = trained(ProxQuant(1, strength=0.0, hard_epoch=9), keras.optimizers.RMSprop(0.01))
    np.testing.assert_allclose(kernel(prepared), kernel(plain), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("regularizer", "bits"), [("l1", 1), ("l2", 2), ("l1", 4)])
def test_huge_strength_is_projected_gradient(bits, regularizer):
    prepared = trained(
        ProxQuant(bits, strength=1e9, regularizer=regularizer, hard_epoch=9), keras.optimizers.SGD(0.01), epochs=1
    )
    scale = float(quantities(prepared)[0].transform.scale)
    np.testing.assert_allclose(
        kernel(prepared), nearest_point(kernel(prepared), np.float32(scale), bits), rtol=1e-5, atol=1e-6
    )


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.05, 24)),
    "accumulating": lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=2),
    "scaled loss": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=4.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_default_strength_brings_weights_home_with_any_optimizer(optimizer):
    proxquant = ProxQuant(1, hard_epoch=6)
    prepared = proxquant.prepare(dense())
    prepared.compile(OPTIMIZERS[optimizer](), loss=lambda y, p: 0.0 * keras.ops.sum(p))
    x, y = np.ones((8, 5), "float32"), np.zeros((8, 6), "float32")
    history = prepared.fit(x, y, batch_size=2, epochs=6, verbose=0, callbacks=proxquant.callbacks()).history
    distances = history["distance_to_set"]
    assert distances[0] > 0.2 and distances[5] == pytest.approx(0, abs=1e-6)
    assert all(near <= far for far, near in itertools.pairwise(distances))


def test_planned_pull_adds_up():
    optimizer = keras.optimizers.SGD(0.1)
    assert planned_pull(optimizer, 0, 4) == pytest.approx(0.1 * (1 + 2 + 3 + 4))
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([9], [0.1, 0.01])  # Steps 0 … 9, then the rest.
    exact = 0.1 * sum(range(1, 11)) + 0.01 * sum(range(11, 21))
    assert planned_pull(keras.optimizers.SGD(schedule), 0, 20) == pytest.approx(exact)


def test_hard_quantization_trains_only_the_rest():
    proxquant = ProxQuant(1, strength=1e-3, hard_epoch=1)
    prepared = proxquant.prepare(dense())
    record = []

    class Record(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            layer = self.model.layers[-1]
            record.append((np.asarray(layer.effective_weights()["kernel"]), np.asarray(layer.layer.bias)))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 6)).astype("float32")
    prepared.compile(keras.optimizers.Adam(0.05), "mse")
    prepared.fit(x, y, batch_size=2, epochs=3, verbose=0, callbacks=[*proxquant.callbacks(), Record()])
    (first, _), (second, bias), (third, last_bias) = record
    assert len(np.unique(np.abs(first))) > 2
    np.testing.assert_array_equal(second, third)
    assert len(np.unique(second)) == 2 and np.all(bias != last_bias)
    np.testing.assert_array_equal(kernel(proxquant.finalize(prepared)), third)


@pytest.mark.parametrize(
    ("method", "bits", "scale"),
    [(ProxQuant, 1, "fit"), (ProxQuant, 3, 0.25), (BinaryConnect, 1, 1.0), (BinaryConnect, 2, "fit")],
)
def test_finalized_weights_are_exactly_in_the_set(method, bits, scale):
    final = method(bits, scale=scale).finalize(trained(method(bits, scale=scale), keras.optimizers.Adam(0.01)))
    layer = final.layers[-1]
    grid = layer.kernel_constraint
    assert isinstance(grid, QuantizedGrid) and grid.holds(kernel(final))
    allowed = points(bits, float(grid.scale[0])).astype(np.float32)
    assert np.isin(kernel(final), allowed).all()
    if scale != "fit":
        assert float(grid.scale[0]) == scale


def test_binary_connect_against_numpy():
    """Algorithm 1: gradient at sign(w), update and clipping of the latent weight."""
    model = dense(1, 2)
    model.layers[-1].kernel.assign([[0.3], [-0.95]])
    method = BinaryConnect(1, scale=1.0, hard_epoch=1.0)
    prepared = method.prepare(model)
    x, y = np.array([[1.0, 2.0]], "float32"), np.array([[0.5]], "float32")
    prepared.compile(keras.optimizers.SGD(0.1), "mse")
    prepared.fit(x, y, epochs=1, verbose=0, callbacks=method.callbacks())
    error = 1.0 * 1.0 - 2.0 * 1.0 - 0.5  # At the weights sign(w) = (1, -1), bias 0.
    expected = np.clip([0.3 - 0.1 * 2 * error * 1.0, -0.95 - 0.1 * 2 * error * 2.0], -1, 1)
    np.testing.assert_allclose(kernel(prepared).ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize("method", [ProxQuant, BinaryConnect])
def test_pruned_weights_stay_pruned(method):
    sparse = MagnitudePruning(0.5, schedule="constant").apply(dense())
    final = method(1).finalize(trained(method(1), keras.optimizers.Adam(0.05), model=sparse))
    np.testing.assert_array_equal(kernel(final) == 0, kernel(sparse) == 0)
    assert len(np.unique(np.abs(kernel(final)))) == 2
    assert not np.signbit(kernel(final)[kernel(final) == 0]).any()


def test_shared_values_stay_shared():
    clustered = WeightClustering(2).apply(dense())
    final = ProxQuant(4).finalize(trained(ProxQuant(4), keras.optimizers.Adam(0.01), model=clustered))
    pairs = {(a, b) for a, b in zip(kernel(clustered).ravel(), kernel(final).ravel(), strict=True)}
    assert len(pairs) == len(np.unique(kernel(clustered))) == 4
    assert final.layers[-1].kernel_constraint.holds(kernel(final))


def test_an_earlier_grid_does_not_hold_the_weights_fast():
    first = ProxQuant(4).apply(dense())
    second = ProxQuant(2).finalize(trained(ProxQuant(2), keras.optimizers.Adam(0.05), model=first))
    assert len(np.unique(kernel(second))) == 3


def test_constraints_of_the_user_are_kept():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(6, kernel_constraint="non_neg")(inputs))
    prepared = trained(ProxQuant(4, strength=1e-6, hard_epoch=9), keras.optimizers.SGD(0.1), model=model)
    assert kernel(prepared).min() >= 0 and np.any(kernel(prepared) == 0)


@pytest.mark.parametrize("name", ["convolutions", "nested"])
def test_every_layer_trains_and_finalizes(name):
    model, inputs = zoo.MODELS[name]()
    method = ProxQuant(2)
    prepared = method.prepare(model)
    zoo.train(prepared, inputs, callbacks=method.callbacks())
    final = method.finalize(prepared)
    for layer in surgery.leaf_layers(final):
        for weight in surgery.compressible_weights(layer).values():
            assert len(np.unique(np.abs(np.asarray(weight)))) <= 2


@pytest.mark.parametrize(
    ("stages", "bits"), [([ProxQuant(1), QuantizationAware()], 1), ([QuantizationAware(), ProxQuant(4)], 4)]
)
def test_int8_file_holds_the_very_integers(stages, bits, tmp_path):
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="conv")(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))
    chain = Chain(stages)
    prepared = chain.prepare(model)
    zoo.train(prepared, np.random.default_rng(0).normal(size=(6, 6, 6, 1)), callbacks=chain.callbacks())
    runner = Runner(convert(chain.finalize(prepared), tmp_path / "m.tflite", quantization="int8-qat"))
    tensors = runner.interpreter.get_tensor_details()
    (stored,) = [runner.interpreter.get_tensor(t["index"]) for t in tensors if tuple(t["shape"]) == (4, 3, 3, 1)]
    finest = 127 // max(2 ** (bits - 1) - 1, 1)
    assert stored.dtype == np.int8 and np.isin(stored, points(bits, finest)).all() and len(np.unique(stored)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": {"a": 9}}, "bits"),
        ({"scale": 0.0}, "above 0"),
        ({"scale": "mean"}, "scale"),
        ({"regularizer": "l3"}, "'l1'"),
        ({"strength": -1}, "strength"),
        ({"pull": -1}, "pull"),
        ({"hard_epoch": 1.5}, "hard_epoch"),
        ({"hard_epoch": -1}, "hard_epoch"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProxQuant(**arguments)


def test_the_callback_needs_a_prepared_model():
    model = dense()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"ProxQuant.prepare"):
        model.fit(np.ones((2, 5)), np.ones((2, 6)), verbose=0, callbacks=ProxQuant().callbacks())
