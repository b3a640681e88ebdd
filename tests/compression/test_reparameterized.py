import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression import Chain, MagnitudePruning, NoEffectWarning, Reparameterized, WeightClustering
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import surgery


@keras.saving.register_keras_serializable(package="tests")
class Half(WeightTransform):
    """w' = w / 2."""

    def transform(self, weight):
        return weight * 0.5


def kernels(model):
    return {
        f"{layer.name}/{name}": np.asarray(variable)
        for layer in surgery.leaf_layers(model)
        for name, variable in surgery.compressible_weights(layer).items()
    }


@pytest.mark.parametrize("name", zoo.MODELS)
def test_pruned_and_clustered_for_every_kind_of_layer(name, tmp_path):
    model, inputs = zoo.MODELS[name]()
    before = [w.copy() for w in model.get_weights()]
    identity = MagnitudePruning(0.0, schedule="constant").prepare(model)
    assert zoo.largest_difference(model(inputs), identity(inputs)) == 0

    pruned = MagnitudePruning(0.5, schedule="constant").prepare(model)
    stacked = WeightClustering(3).prepare(pruned)
    zoo.train(stacked, inputs)
    final = WeightClustering(3).finalize(stacked)
    assert zoo.largest_difference(stacked(inputs), final(inputs)) == 0
    assert not any(isinstance(layer, Reparameterized) for layer in surgery.leaf_layers(final))
    for values in kernels(final).values():
        assert np.count_nonzero(values == 0) == round(0.5 * values.size)
        assert len(np.unique(values)) <= 8
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)

    stacked.save(tmp_path / "stacked.keras")
    restored = keras.saving.load_model(tmp_path / "stacked.keras")
    assert zoo.largest_difference(stacked(inputs), restored(inputs)) == 0


def test_gradient_is_that_of_the_transform():
    layer = keras.layers.Dense(3, use_bias=False)
    layer.build((None, 2))
    layer.kernel.assign(np.arange(6.0).reshape(2, 3))
    wrapped = Reparameterized(layer, {"kernel": [Half()]})
    x = np.array([[1.0, 2.0]], "float32")
    np.testing.assert_allclose(wrapped(x), x @ np.arange(6.0).reshape(2, 3) / 2)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(wrapped(x))
    (gradient,) = tape.gradient(loss, wrapped.trainable_variables)
    np.testing.assert_allclose(gradient, [[0.5] * 3, [1.0] * 3])
    np.testing.assert_allclose(wrapped.unwrap()(x), wrapped(x))


def test_masks_reach_the_wrapped_layer():
    inputs = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(9, 4, mask_zero=True, name="embedding")(inputs)
    model = keras.Model(inputs, keras.layers.LSTM(3, name="lstm")(embedded))
    prepared = MagnitudePruning(0.0, schedule="constant").prepare(model)
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    assert zoo.largest_difference(model(tokens), prepared(tokens)) == 0
    # The mask makes padding irrelevant: the embedding of the padding token may change, and the output stays.
    table = prepared.get_layer("embedding").layer.embeddings
    table.assign(np.asarray(table) + 5.0 * (np.arange(9) == 0)[:, None])
    assert zoo.largest_difference(model(tokens), prepared(tokens)) == 0


def test_updated_statistics_reach_the_wrapped_layer():
    block = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    wrapped = Reparameterized(surgery.copy_layer(block.layers[0]), {"kernel": [Half()]})
    inner = keras.layers.TimeDistributed(keras.layers.BatchNormalization())
    inner.build((None, 4, 3))
    statistics = Reparameterized(inner, {})
    before = np.asarray(inner.layer.moving_mean)
    statistics(zoo._normal(8, 4, 3) + 3.0, training=True)
    assert np.all(np.asarray(inner.layer.moving_mean) > before)
    assert wrapped.non_trainable_variables == []


def test_dropout_inside_a_wrapped_layer_is_random_in_training_only():
    model, inputs = zoo.transformer()
    prepared = MagnitudePruning(0.2, schedule="constant").prepare(model)
    assert zoo.largest_difference(prepared(inputs), prepared(inputs)) == 0
    assert zoo.largest_difference(prepared(inputs, training=True), prepared(inputs, training=True)) > 0


def test_selection_and_the_warning_when_nothing_matches():
    model, inputs = zoo.mlp()
    first, second = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    prepared = MagnitudePruning(0.5, schedule="constant", exclude=[second]).prepare(model)
    assert [layer.name for layer in prepared.layers if isinstance(layer, Reparameterized)] == [first]
    with pytest.warns(NoEffectWarning, match="changed nothing"):
        MagnitudePruning(0.5, include=["nothing*"]).prepare(model)


def test_chain_keeps_zeros_and_clusters():
    model, inputs = zoo.mlp()

    def fit(prepared, callbacks):
        zoo.train(prepared, inputs, callbacks=callbacks)

    sparse = MagnitudePruning(0.6, schedule="constant").apply(model, fit)
    zeros = {name: values == 0 for name, values in kernels(sparse).items()}
    clustered = WeightClustering(3).apply(sparse, fit)
    for name, values in kernels(clustered).items():
        np.testing.assert_array_equal(values == 0, zeros[name])
    again = MagnitudePruning(0.0, schedule="constant").apply(clustered, fit)  # Trains, with clusters kept.
    for name, values in kernels(again).items():
        assert len(np.unique(values)) <= len(np.unique(kernels(clustered)[name]))
        np.testing.assert_array_equal(values == 0, zeros[name])
        assert not np.array_equal(values, kernels(clustered)[name])  # The shared values did train.


def test_chain_of_stages_and_joint_preparation():
    model, inputs = zoo.mlp()
    chain = Chain([MagnitudePruning(0.5, schedule="constant"), WeightClustering(4)])
    stages = []
    final = chain.apply(model, [lambda m, c: stages.append("prune"), lambda m, c: stages.append("cluster")])
    assert stages == ["prune", "cluster"]
    joint = chain.prepare(model)
    assert zoo.largest_difference(final(inputs), chain.finalize(joint)(inputs)) == 0
    with pytest.raises(ValueError, match="one for each of the 2 stages"):
        chain.apply(model, [None])
    with pytest.raises(TypeError, match="Compressor objects"):
        Chain([model])


def test_unknown_weight_names_are_refused():
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    with pytest.raises(ValueError, match=r"must name weights.*\['kernel'\].*'krnel'"):
        Reparameterized(layer, {"krnel": [Half()]})


def test_frozen_layers_stay_frozen():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, trainable=False), keras.layers.Dense(2)])
    clustering = WeightClustering(3)
    prepared = clustering.prepare(model)
    start = np.asarray(clustering.finalize(prepared).layers[1].kernel)
    zoo.train(prepared, zoo._normal(6, 8))
    np.testing.assert_array_equal(clustering.finalize(prepared).layers[1].kernel, start)


def test_activity_regularization_goes_on():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activity_regularizer="l2")])
    prepared = MagnitudePruning(0.0, schedule="constant").prepare(model)
    x = zoo._normal(5, 4)
    model(x), prepared(x)
    np.testing.assert_allclose(np.sum(model.losses), np.sum(prepared.losses), rtol=1e-6)
    assert float(np.sum(model.losses)) > 0


def test_weights_that_are_not_finite_are_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.layers[0].kernel.assign(np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match="finite weights.*kernel"):
        WeightClustering().prepare(model)
