import warnings

import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression import Chain, LowRank, MagnitudePruning, NoEffectWarning
from tfkit.compression.low_rank_factors import HeadFactors, MatrixFactors, TuckerFactors, allocate, output_error
from tfkit.export import convert
from tfkit.export.runner import Runner

L = keras.layers


def rng(seed=0):
    return np.random.default_rng(seed)


# The mathematics.


def test_error_is_the_tail_of_the_singular_values():
    # Eckart & Young: ||W - W_r||^2 is the sum of the squares left out.
    matrix = rng().normal(size=(12, 7))
    singular = np.linalg.svd(matrix, compute_uv=False)
    solver = MatrixFactors(matrix)
    for rank in range(1, 8):
        a, b = solver.factors(rank)
        tail = float(np.sum(singular[rank:] ** 2))
        assert np.sum((matrix - a @ b) ** 2) == pytest.approx(tail, abs=1e-10)
        assert solver.options().loss[rank - 1] == pytest.approx(tail / np.sum(singular**2), abs=1e-12)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1))


def correlated_inputs(samples=400, size=12):
    # Few directions carry nearly all of the variance, and not those that the weights favour.
    basis = rng(1).normal(size=(3, size))
    return rng(2).normal(size=(samples, 3)) @ basis + 0.05 * rng(3).normal(size=(samples, size))


def test_with_data_the_outputs_error_is_the_least():
    x, matrix = correlated_inputs(), rng().normal(size=(12, 9))
    gram = x.T @ x
    plain = np.matmul(*MatrixFactors(matrix).factors(3))
    aware = np.matmul(*MatrixFactors(matrix, gram, 1e-9).factors(3))

    def error(approximation):
        return float(np.sum((x @ matrix - x @ approximation) ** 2))

    # The optimum, another way: project the outputs on their leading right singular vectors.
    _, singular, vt = np.linalg.svd(x @ matrix, full_matrices=False)
    best = float(np.sum(singular[3:] ** 2))
    assert error(aware) == pytest.approx(best, rel=1e-5)
    np.testing.assert_allclose(aware, matrix @ vt[:3].T @ vt[:3], atol=1e-4)
    assert error(aware) < 0.05 * error(plain)
    assert output_error(matrix, aware, gram) == pytest.approx(np.sqrt(best / np.sum(singular**2)), rel=1e-5)


def test_a_diagonal_gram_matrix_is_the_full_one():
    matrix, counts = rng().normal(size=(6, 4)), np.array([5.0, 0, 1, 30, 2, 9])
    full = np.matmul(*MatrixFactors(matrix, np.diag(counts), 0.1).factors(2))
    np.testing.assert_allclose(np.matmul(*MatrixFactors(matrix, counts, 0.1).factors(2)), full, atol=1e-10)
    assert output_error(matrix, full, counts) == pytest.approx(output_error(matrix, full, np.diag(counts)))


def test_dead_inputs_do_not_break_the_factorisation():
    gram = np.diag([1.0, 0.0, 0.0, 2.0])
    assert np.isfinite(np.matmul(*MatrixFactors(rng().normal(size=(4, 3)), gram, 1e-3).factors(2))).all()
    assert MatrixFactors(rng().normal(size=(4, 3)), np.zeros((4, 4)), 1e-3).root is None


@pytest.mark.parametrize("aware", [False, True])
def test_tucker_of_a_kernel_of_its_rank_is_exact(aware):
    kernel = np.einsum(
        "ca,hwab,bf->hwcf", rng(0).normal(size=(6, 2)), rng(1).normal(size=(3, 3, 2, 4)), rng(2).normal(size=(4, 8))
    )
    patches = rng(3).normal(size=(200, 54))
    solver = TuckerFactors(kernel, patches.T @ patches if aware else None, 1e-3)
    np.testing.assert_allclose(TuckerFactors.product(*solver.factors(2, 4)), kernel, atol=1e-9)
    options = solver.options()
    assert options.loss[np.all(options.ranks == [2, 4], axis=1)] == pytest.approx(0, abs=1e-12)
    assert options.loss[np.all(options.ranks == [1, 4], axis=1)] > 0.01


def test_tucker_error_is_within_its_bound():
    kernel = rng().normal(size=(3, 3, 5, 6))
    solver = TuckerFactors(kernel)
    options = solver.options()
    for ranks, bound in zip(options.ranks, options.loss, strict=True):
        error = np.sum((kernel - TuckerFactors.product(*solver.factors(*ranks))) ** 2) / np.sum(kernel**2)
        assert error <= bound + 1e-12


def test_heads_are_the_best_products_of_their_size():
    a, b = rng(0).normal(size=(2, 7, 4)), rng(1).normal(size=(2, 6, 4))
    x, y = rng(2).normal(size=(300, 7)) * np.arange(1, 8), rng(3).normal(size=(300, 6))
    solver = HeadFactors(a, b, x.T @ x, y.T @ y, 1e-9)
    left, right = solver.factors(2)
    lost = whole = 0.0
    for h in range(2):
        # Whitened by the square roots of both Gram matrices, which are not the Cholesky factors used inside.
        product = _root(x.T @ x) @ a[h] @ b[h].T @ _root(y.T @ y)
        singular = np.linalg.svd(product, compute_uv=False)
        error = np.linalg.norm(x @ (a[h] @ b[h].T - left[h] @ right[h].T) @ y.T) ** 2
        assert error == pytest.approx(np.sum(singular[2:] ** 2), rel=1e-5)
        lost, whole = lost + error, whole + np.sum(singular**2)
    assert solver.losses()[1] == pytest.approx(lost / whole, rel=1e-5)
    assert solver.losses()[3] == pytest.approx(0, abs=1e-12)


def _root(gram):
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(values) @ vectors.T


def test_allocation_is_a_threshold_on_gain_per_cost():
    # Two matrices whose ranks cost 10 and 1: gains per cost are .05 .03 .01 .01 and .06 .02 .015 .005.
    gains = [np.array([0.5, 0.3, 0.1, 0.1]), np.array([0.06, 0.02, 0.015, 0.005])]
    costs = [10.0 * np.arange(5), np.arange(5.0)]
    losses = [np.concatenate([gain[::-1].cumsum()[::-1], [0]]) for gain in gains]
    assert allocate(costs, losses, 23.0) == [2, 3]
    assert allocate(costs, losses, 22.0) == [2, 2]
    assert allocate(costs, losses, 100.0) == [4, 4]
    assert allocate(costs, losses, 0.0) == [0, 0]
    with pytest.raises(ValueError, match="more than the budget"):
        allocate([np.array([5.0])], [np.array([0.0])], 4.0)


# The layers.


@pytest.mark.parametrize(
    ("name", "aware"), [*((name, True) for name in zoo.MODELS), ("convolutions", False), ("transformer", False)]
)
@pytest.mark.filterwarnings("ignore::tfkit.compression.NoEffectWarning")
def test_full_rank_changes_nothing(name, aware):
    model, x = zoo.MODELS[name]()
    before = [np.copy(w) for w in model.get_weights()]
    compressor = LowRank(1000, only_if_smaller=False, data=x if aware else None)
    full = compressor.prepare(model)
    assert zoo.largest_difference(model(x), full(x)) < 1e-5
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for row in compressor.report():
        assert bool(row.method) != bool(row.note)
        assert row.relative_error < 1e-5


CONVOLUTIONS = {
    "strides": L.Conv2D(6, 3, strides=2, activation="relu"),
    "uneven": L.Conv2D(6, (5, 2), strides=(1, 2), padding="same", use_bias=False),
    "dilated": L.Conv2D(6, 3, dilation_rate=(2, 1), padding="same", activation="tanh"),
    "pointwise": L.Conv2D(6, 1, strides=2),
    "causal": L.Conv1D(6, 3, padding="causal", dilation_rate=2, activation="relu"),
    "sequence": L.Conv1D(6, 4, strides=2, padding="same"),
}


@pytest.mark.parametrize("method", ["spatial", "channel", "tucker2"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_keep_strides_padding_dilation_bias_and_activation(name, method):
    layer = CONVOLUTIONS[name].__class__.from_config(CONVOLUTIONS[name].get_config())
    shape = (9, 10, 4) if isinstance(layer, L.Conv2D) else (11, 4)
    model = keras.Sequential([keras.Input(shape), layer])
    if layer.use_bias:
        layer.bias.assign(rng(1).normal(size=6))
    x = rng().normal(size=(3, *shape)).astype("float32")
    compressor = LowRank(1000, only_if_smaller=False, method=method, data=x, ridge=1e-6)
    full = compressor.prepare(model)
    assert zoo.largest_difference(model(x), full(x)) < 1e-5
    (row,) = compressor.report()
    assert (row.parameters_before, row.parameters_after) == (model.count_params(), full.count_params())
    # Multiply-adds, counted another way: layer by layer from the shapes of the finished model.
    counted = sum(np.prod(part.kernel.shape) * np.prod(part.output.shape[1:-1]) for part in full.layers if part.weights)
    assert row.multiply_adds_after == counted
    assert full.layers[-1].name == layer.name


def test_a_kernel_of_rank_one_is_reproduced_by_rank_one():
    model = keras.Sequential([keras.Input((8, 8, 1)), L.Conv2D(1, 5, padding="same")])
    model.layers[0].kernel.assign(np.einsum("i,j->ij", rng(0).normal(size=5), rng(1).normal(size=5))[..., None, None])
    x = rng().normal(size=(2, 8, 8, 1)).astype("float32")
    compressor = LowRank(1, method="spatial")
    small = compressor.prepare(model)
    assert zoo.largest_difference(model(x), small(x)) < 1e-5
    assert [tuple(layer.kernel.shape) for layer in small.layers[1:]] == [(5, 1, 1, 1), (1, 5, 1, 1)]
    assert (compressor.report()[0].parameters_before, compressor.report()[0].parameters_after) == (26, 11)


@pytest.mark.parametrize("layer", ["dense", "conv", "einsum", "embedding"])
def test_reported_error_is_that_of_the_outputs_on_the_data(layer):
    x = correlated_inputs(64, 10).astype("float32")
    if layer == "dense":
        inputs, make = keras.Input((10,)), L.Dense(8, use_bias=False)
    elif layer == "conv":
        x = x.reshape(-1, 4, 4, 10)
        inputs, make = keras.Input((4, 4, 10)), L.Conv2D(8, 3, use_bias=False, padding="same")
    elif layer == "einsum":
        x = x.reshape(-1, 4, 2, 5)
        inputs, make = keras.Input((4, 2, 5)), L.EinsumDense("abcd,cdef->abef", (None, 2, 4))
    else:
        x = rng().poisson(2.0, (40, 6)).clip(0, 19)
        inputs, make = keras.Input((6,), dtype="int32"), L.Embedding(20, 8)
    model = keras.Model(inputs, make(inputs))
    errors = []
    for data in (x, None):
        compressor = LowRank(3, data=data, only_if_smaller=False, method="spatial", samples=10_000)
        small = compressor.prepare(model)
        outputs = np.asarray(model(x))
        errors.append(np.linalg.norm(outputs - small(x)) / np.linalg.norm(outputs))
        if data is not None:
            assert compressor.report()[0].relative_error == pytest.approx(errors[0], rel=1e-3)
    assert errors[0] < errors[1]


def attention(gate=False, bias=True):
    query, value = keras.Input((5, 8), name="query"), keras.Input((7, 6), name="value")
    layer = L.MultiHeadAttention(2, 4, value_dim=3, use_bias=bias, use_gate=gate)
    model = keras.Model([query, value], layer(query, value))
    model.set_weights([rng(i).normal(size=w.shape) * 0.3 for i, w in enumerate(model.get_weights())])
    return model, [rng(8).normal(size=(4, 5, 8)).astype("float32"), rng(9).normal(size=(4, 7, 6)).astype("float32")]


@pytest.mark.filterwarnings("ignore:LowRank ends the zeros")
@pytest.mark.parametrize(("gate", "bias"), [(False, True), (False, False), (True, True)])
def test_attention_whose_heads_are_of_low_rank_loses_nothing(gate, bias):
    model, x = attention(gate, bias)
    layer = model.layers[-1]
    for dense in (layer.query_dense, layer.key_dense):
        dense.kernel.assign(np.asarray(dense.kernel) * [1, 1, 0, 0])
        if bias:
            dense.bias.assign(np.asarray(dense.bias) * [1, 1, 0, 0])
    compressor = LowRank((2, 3))
    small = compressor.prepare(model)
    assert (small.layers[-1].key_dim, small.layers[-1].value_dim) == (2, 3)
    assert zoo.largest_difference(model(x), small(x)) < 1e-5
    (row,) = compressor.report()
    assert (row.parameters_before, row.parameters_after) == (model.count_params(), small.count_params())
    assert LowRank((1, 3)).prepare(model)(x) is not None
    assert zoo.largest_difference(model(x), LowRank((1, 3)).prepare(model)(x)) > 1e-3


def test_attention_with_data_keeps_the_scores_better():
    model, x = attention()
    x[0] = x[0] * np.array([10, 10, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], "float32")
    plain, aware = (LowRank((2, 3), data=data).prepare(model) for data in (None, x))
    exact = np.asarray(model(x))
    assert np.linalg.norm(exact - aware(x)) < 0.8 * np.linalg.norm(exact - plain(x))


def test_masks_pass_through():
    inputs = keras.Input((None,), dtype="int32")
    outputs = L.LSTM(4)(L.Dense(6)(L.Embedding(30, 12, mask_zero=True)(inputs)))
    model = keras.Model(inputs, outputs)
    x = np.array([[3, 4, 5, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    full = LowRank(12, only_if_smaller=False).prepare(model)
    assert zoo.largest_difference(model(x), full(x)) < 1e-6
    assert zoo.largest_difference(full(x[:1]), full(x[:1, :3])) < 1e-6


# Choosing ranks.


def network():
    inputs = keras.Input((10, 10, 4))
    x = L.Conv2D(12, 3, activation="relu", name="conv")(inputs)
    x = L.MaxPooling2D(2)(x)
    x = L.Dense(20, activation="relu", name="fc")(L.Flatten()(x))
    return keras.Model(inputs, L.Dense(5, name="logits")(x))


@pytest.mark.parametrize("cost", ["parameters", "multiply_adds"])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_budget_is_met_and_used(cost, budget):
    compressor = LowRank(budget=budget, cost=cost)
    model = network()
    small = compressor.prepare(model)
    before = sum(getattr(row, f"{cost}_before") for row in compressor.report())
    after = sum(getattr(row, f"{cost}_after") for row in compressor.report())
    assert (budget - 0.1) * before < after <= budget * before  # A rank of the convolution is 10 %.
    if cost == "parameters":
        assert (before, after) == (model.count_params(), small.count_params())


def test_budget_keeps_the_largest_product_of_energies():
    model = keras.Sequential([keras.Input((20,)), L.Dense(16, name="a"), L.Dense(12, name="b")])
    model.layers[0].kernel.assign(np.asarray(model.layers[0].kernel) * 0.9 ** np.arange(16))
    spectra = [np.linalg.svd(np.asarray(layer.kernel), compute_uv=False) ** 2 for layer in model.layers]
    kept = [np.cumsum(s) / s.sum() for s in spectra]
    costs = []
    for layer, share in zip(model.layers, kept, strict=True):
        costs.append(cost := [rank * sum(layer.kernel.shape) for rank in range(1, len(share) + 1)])
        # A layer may stay as it is.
        cost[-1] = min(cost[-1], layer.kernel.shape[0] * layer.kernel.shape[1])
        share[-1] = 1.0
    budget = 0.5 * model.count_params() - 28  # Biases stay.
    pairs = [(i, j) for i in range(len(kept[0])) for j in range(len(kept[1])) if costs[0][i] + costs[1][j] <= budget]
    best = max(kept[0][i] * kept[1][j] for i, j in pairs)
    compressor = LowRank(budget=0.5)
    compressor.prepare(model)
    rows = zip(kept, compressor.report(), strict=True)
    ours = np.prod([share[row.ranks[0] - 1] if row.ranks else 1.0 for share, row in rows])
    assert 0.98 * best <= ours <= best + 1e-9


def test_energy_is_kept_at_the_least_cost():
    model = network()
    compressor = LowRank(energy=0.9, exclude=["conv"])
    compressor.prepare(model)
    for row in compressor.report()[1:]:
        singular = np.linalg.svd(np.asarray(model.get_layer(row.layer).kernel), compute_uv=False)
        wanted = 1 + int(np.argmax(np.cumsum(singular**2) >= 0.9 * np.sum(singular**2)))
        if row.ranks:
            assert row.ranks == (wanted,) and row.relative_error**2 <= 0.1
        else:
            assert (
                wanted * sum(model.get_layer(row.layer).kernel.shape) >= model.get_layer(row.layer).kernel.shape[0] * 5
            )
    assert compressor.report()[0].note == "not selected"


def test_what_would_not_save_is_left_alone():
    compressor = LowRank({"fc": 19, "Conv2D": 2}, method="channel")
    small = compressor.prepare(network())
    rows = {row.layer: row for row in compressor.report()}
    assert "smaller" in rows["fc"].note and rows["logits"].note == "no pattern matches it"
    assert rows["conv"].method == "channel" and rows["conv"].ranks == (2,)
    assert [layer.name for layer in small.layers if layer.weights] == ["conv_reduce", "conv", "fc", "logits"]


def test_splitting_twice_gives_unique_names():
    once = LowRank({"fc": 8}).prepare(network())
    twice = LowRank({"fc*": 3}).prepare(once)
    assert [layer.name for layer in twice.layers if "fc" in layer.name] == [
        "fc_reduce_reduce", "fc_reduce", "fc_reduce_2", "fc",
    ]  # fmt: skip


def test_the_result_is_of_plain_layers_that_train():
    x = rng().normal(size=(12, 10, 10, 4)).astype("float32")
    compressor = LowRank(budget=0.5, data=x)
    prepared = compressor.prepare(network())
    start = prepared.get_weights()
    assert all(layer.trainable for layer in prepared.layers)
    prepared.compile("sgd", "mse", run_eagerly=True)
    prepared.fit(x, np.ones((12, 5)), verbose=0)
    for before, after, final in zip(
        start, prepared.get_weights(), compressor.finalize(prepared).get_weights(), strict=True
    ):
        assert np.any(before != after) and np.array_equal(after, final)
    assert {type(layer).__module__.split(".")[0] for layer in prepared.layers} == {"keras"}


def test_attention_to_tflite(tmp_path):
    model, x = attention()
    small = LowRank(2).prepare(model)
    runner = Runner(convert(small, tmp_path / "model.tflite"))
    assert zoo.largest_difference(small(x), runner(dict(zip(("query", "value"), x, strict=True)))) < 1e-5


def test_lost_structure_and_prepared_layers():
    pruned = MagnitudePruning(0.5, schedule="constant").apply(network())
    with pytest.warns(UserWarning, match="ends the zeros"):
        LowRank(2).prepare(pruned)
    prepared = MagnitudePruning({"fc": 0.5}, schedule="constant").prepare(network())
    with pytest.raises(ValueError, match="must be finalized.*'fc'"):
        LowRank(2).prepare(prepared)
    compressor = LowRank(2, exclude=["fc"])
    both = compressor.finalize(compressor.prepare(prepared))
    assert getattr(both.get_layer("fc"), "is_reparameterized", False)
    final = Chain([LowRank(2), MagnitudePruning(0.5, schedule="constant")]).apply(network())
    assert np.mean(np.asarray(final.get_layer("fc_reduce").kernel) == 0) == pytest.approx(0.5, abs=0.02)


def test_a_budget_out_of_reach_and_bad_data_are_refused():
    with pytest.raises(ValueError, match="within reach.*keeps 0"):
        LowRank(budget=0.01).prepare(network())
    with pytest.raises(ValueError, match="`data`"):
        LowRank(2, data=np.full((3, 10, 10, 4), np.nan)).prepare(network())
    with pytest.raises(ValueError, match="`rank`.*'nothing', which matches no layer"):
        LowRank({"nothing": 2}).prepare(network())
    with pytest.warns(NoEffectWarning):
        LowRank({"GRU": 2}).prepare(network())
    with pytest.raises(ValueError, match="one rank"):
        LowRank((2, 2)).prepare(network())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "at least 1"),
        ({"rank": {"fc": (1, 2, 3)}}, "a pair"),
        ({"energy": 0.0}, "more than 0"),
        ({"energy": 1.5}, r"\[0, 1\]"),
        ({"budget": 1.0}, r"\[0, 1\)"),
        ({"rank": 2, "method": "cp"}, "one of"),
        ({"rank": 2, "cost": "bytes"}, "one of"),
        ({"rank": 2, "ridge": 0}, "more than 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**arguments)


def test_the_call_is_shown_without_the_data():
    assert repr(LowRank(2, data=np.zeros((3, 4)))) == "LowRank(rank=2, data=<ndarray of shape (3, 4), dtype float64>)"


def test_data_come_back_from_the_configuration():
    data = rng().normal(size=(5, 4)).astype("float32")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(LowRank(2, data=data)))
    np.testing.assert_array_equal(again.data, data)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(LowRank(2))).data is None


def test_data_by_name_of_input_is_not_taken_for_patterns():
    keras.utils.set_random_seed(0)
    left, right = keras.Input((16,), name="left"), keras.Input((16,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    model = keras.Model({"left": left, "right": right}, keras.layers.Dense(32)(joined))
    data = {name: np.random.default_rng(0).normal(size=(40, 16)).astype("float32") for name in ("left", "right")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        LowRank(4, data=data).prepare(model)
