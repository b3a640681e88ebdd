import warnings

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import zoo
from tfkit.compression import MagnitudePruning
from tfkit.compression.base import NoEffectWarning
from tfkit.compression.pruning import global_masks, is_sparse, magnitude_mask, polynomial
from tfkit.internal import surgery


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=8), elements=st.floats(-4, 4, width=32)),
    st.floats(0, 0.99),
)
def test_mask_has_the_exact_count_and_drops_the_smallest(value, sparsity):
    mask = magnitude_mask(value, sparsity)
    assert np.count_nonzero(mask == 0) == min(round(sparsity * value.size), value.size - 1)
    dropped, kept = np.abs(value[mask == 0]), np.abs(value[mask == 1])
    if dropped.size and kept.size:
        assert dropped.max() <= kept.min()


def test_global_threshold_is_one_threshold():
    small, large = np.full((10,), 0.1) + np.arange(10) / 1e3, np.full((10,), 1.0)
    masks = global_masks([small, large], 0.5)
    assert masks[0].sum() == 0 and masks[1].sum() == 10


def test_schedule_is_the_papers_cubic():
    # Zhu & Gupta, equation 1, from 0.5 to 0.9: s(t) = 0.9 - 0.4 (1 - t)^3.
    assert polynomial(0.0, 0.5, 0.9) == pytest.approx(0.5)
    assert polynomial(0.25, 0.5, 0.9) == pytest.approx(0.9 - 0.4 * 0.421875)
    assert polynomial(1.0, 0.5, 0.9) == polynomial(1.7, 0.5, 0.9) == pytest.approx(0.9)


class Record(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.sparsity = []

    def on_train_batch_end(self, batch, logs=None):
        mask = self.model.layers[-1].transforms["kernel"][0].mask
        self.sparsity.append(1 - float(np.mean(np.asarray(mask))))


def dense_model(units=100):
    return keras.Sequential([keras.Input((10,)), keras.layers.Dense(units)])


@pytest.mark.parametrize("unit", ["steps", "fractions"])
def test_masks_follow_the_schedule(unit):
    begin, end = (4, 16) if unit == "steps" else (0.2, 0.8)
    pruning = MagnitudePruning(0.9, begin=begin, end=end, frequency=4)
    prepared = pruning.prepare(dense_model())
    record = Record()
    zoo.train(prepared, np.ones((6, 10), "float32"), steps=10, callbacks=[*pruning.callbacks(), record])  # 20 steps
    expected = [0.0] * 8 + [0.9 - 0.9 * (1 - 4 / 12) ** 3] * 4 + [0.9 - 0.9 * (1 - 8 / 12) ** 3] * 4 + [0.9] * 4
    np.testing.assert_allclose(record.sparsity, expected, atol=1e-3)


def test_pruned_weights_stay_and_the_rest_trains():
    pruning = MagnitudePruning(0.7, schedule="constant")
    prepared = pruning.prepare(dense_model())
    start = np.asarray(pruning.finalize(prepared).layers[-1].kernel)
    zoo.train(prepared, np.random.default_rng(0).normal(size=(6, 10)), steps=3, callbacks=pruning.callbacks())
    end = np.asarray(pruning.finalize(prepared).layers[-1].kernel)
    np.testing.assert_array_equal(end == 0, start == 0)
    assert not np.signbit(end[end == 0]).any()  # -0.0 would cost bits.
    assert np.count_nonzero(end == 0) == 700
    assert np.all(end[start != 0] != start[start != 0])


def test_a_short_fit_still_ends_at_the_target():
    pruning = MagnitudePruning(0.8, begin=0, end=1000)
    prepared = pruning.prepare(dense_model())
    zoo.train(prepared, np.ones((6, 10), "float32"), callbacks=pruning.callbacks())
    assert np.mean(np.asarray(pruning.finalize(prepared).layers[-1].kernel) == 0) == pytest.approx(0.8)


def test_per_layer_targets_by_name_and_class():
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, name="conv")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(5, name="out")(keras.layers.Dense(10, name="fc")(x)))
    targets = {"out": 0.2, "Conv*": 0.5, "Dense": 0.9}
    final = MagnitudePruning(targets, schedule="constant").apply(model)
    zeros = {layer.name: float(np.mean(np.asarray(layer.kernel) == 0)) for layer in final.layers if layer.weights}
    assert zeros == pytest.approx({"conv": 0.5, "fc": 0.9, "out": 0.2}, abs=0.02)


def test_a_layer_without_a_match_is_left_alone():
    model, _ = zoo.mlp()
    names = [layer.name for layer in model.layers if layer.weights]
    final = MagnitudePruning({names[0]: 0.5}, schedule="constant").apply(model)
    assert not np.any(np.asarray(final.get_layer(names[1]).kernel) == 0)


def test_global_scope_prunes_the_layer_of_small_weights():
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10), keras.layers.Dense(10)])
    model.layers[0].kernel.assign(np.asarray(model.layers[0].kernel) * 1e-3)
    final = MagnitudePruning(0.5, schedule="constant", scope="global").apply(model)
    zeros = [np.mean(np.asarray(layer.kernel) == 0) for layer in surgery.leaf_layers(final)]
    assert zeros == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "share in"),
        ({"sparsity": 90}, "For 90 % write 0.9"),
        ({"sparsity": {"a": -0.1}}, "share in"),
        ({"schedule": "linear"}, "'constant' or 'polynomial'"),
        ({"scope": "model"}, "'layer' or 'global'"),
        ({"sparsity": {"a": 0.1}, "scope": "global"}, "one threshold"),
        ({"begin": 0.5, "end": 0.2}, "must not be before"),
        ({"begin": 1.5}, r"float in \[0, 1\]"),
        ({"frequency": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MagnitudePruning(**arguments)


def test_the_callback_needs_a_prepared_model():
    model = dense_model()
    with pytest.raises(ValueError, match="prepare"):
        zoo.train(model, np.ones((6, 10), "float32"), callbacks=MagnitudePruning(0.5).callbacks())


def test_the_last_weight_stays():
    assert magnitude_mask(np.array([0.1, -3.0, 0.2]), 0.999).tolist() == [0, 1, 0]


@pytest.mark.parametrize("fit", [None, "restores"])
def test_finalizing_short_of_the_target_prunes_and_says_so(fit):
    pruning = MagnitudePruning(0.8)

    def restoring(model, callbacks):
        early = [np.copy(w) for w in model.get_weights()]  # As EarlyStopping(restore_best_weights=True) does.
        zoo.train(model, np.ones((6, 10), "float32"), callbacks=callbacks)
        model.set_weights(early)

    with pytest.warns(UserWarning, match="pruned now"):
        final = pruning.apply(dense_model(), restoring if fit else None)
    assert np.mean(np.asarray(final.layers[-1].kernel) == 0) == pytest.approx(0.8)


def test_several_steps_an_execution_do_not_miss_the_schedule():
    pruning = MagnitudePruning(0.9, begin=0.0, end=0.5, frequency=3)
    prepared = pruning.prepare(dense_model())
    record = Record()
    prepared.compile("sgd", "mse", steps_per_execution=4)
    x, y = np.ones((64, 10), "float32"), np.zeros((64, 100), "float32")
    prepared.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[*pruning.callbacks(), record])
    assert 0 < record.sparsity[1] < record.sparsity[2] < 0.9
    assert record.sparsity[4:] == pytest.approx([0.9] * len(record.sparsity[4:]))


def test_fractions_are_of_this_fit():
    pruning = MagnitudePruning(0.9, begin=0.0, end=0.5, frequency=1)
    prepared = pruning.prepare(dense_model())
    prepared.compile("sgd", "mse")
    x, y = np.ones((8, 10), "float32"), np.zeros((8, 100), "float32")
    prepared.fit(x, y, batch_size=4, epochs=5, verbose=0)
    record = Record()
    prepared.fit(x, y, batch_size=4, epochs=5, verbose=0, callbacks=[*pruning.callbacks(), record])
    assert 0 == record.sparsity[0] < record.sparsity[1] < 0.9 and record.sparsity[5:] == pytest.approx([0.9] * 5)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"exclude": ("logit",)}, "logit"),
        ({"include": ("dense*", "cnov*")}, "cnov*"),
    ],
)
def test_a_pattern_that_matches_nothing_is_said(arguments, pattern):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense_one"), keras.layers.Dense(2)])
    with pytest.warns(NoEffectWarning, match="matches no layer") as caught:
        MagnitudePruning(**{"sparsity": 0.5, **arguments}).prepare(model)
    said = [str(warning.message) for warning in caught if warning.category is NoEffectWarning]
    assert len(said) == 1 and repr(pattern) in said[0]


def test_a_pattern_of_a_mapping_that_matches_nothing_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense_one"), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"`sparsity`.*'hiden', which matches no layer.*dense_one"):
        MagnitudePruning({"Dense": 0.5, "hiden": 0.9}).prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", NoEffectWarning
        )  # A kind of layer that this model happens to lack is no mistake.
        MagnitudePruning({"*Conv*": 0.3, "Embedding": 0.2, "dense_one": 0.5}).prepare(model)


def test_a_zero_by_accident_is_no_pruning():
    value = np.ones(1000)
    assert not is_sparse(value) and not is_sparse(np.zeros(4))
    value[:9] = 0
    assert not is_sparse(value)
    value[9] = 0
    assert is_sparse(value)
    assert is_sparse(np.array([1.0, 0.0, 2.0]))
