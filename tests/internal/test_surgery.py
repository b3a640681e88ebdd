import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression import MagnitudePruning
from tfkit.internal import folding, surgery


@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("inline", [False, True])
def test_rebuilding_changes_nothing(name, inline):
    model, inputs = zoo.MODELS[name]()
    zoo.train(model, inputs)
    copy = surgery.rebuild(model, inline=inline)
    assert zoo.largest_difference(model(inputs), copy(inputs)) == 0
    assert copy.count_params() == model.count_params()
    shared = {id(v) for v in model.variables} & {id(v) for v in copy.variables}
    assert not shared


def test_inlining_leaves_no_nested_model_and_keeps_sharing():
    model, _ = zoo.nested()
    flat = surgery.rebuild(model, inline=True)
    assert not any(isinstance(layer, keras.Model) for layer in flat.layers)
    assert flat.count_params() == model.count_params()  # The tower is called twice, and copied once.


def test_inlined_names_do_not_clash():
    inputs = keras.Input((4,))
    towers = [
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="same")], name=f"tower{i}") for i in range(2)
    ]
    model = keras.Model(inputs, towers[0](inputs) + towers[1](inputs))
    x = np.ones((2, 4), "float32")
    assert zoo.largest_difference(model(x), surgery.rebuild(model, inline=True)(x)) == 0


def test_a_dropped_layer_is_gone():
    model, inputs = zoo.mlp()
    shorter = surgery.rebuild(
        model,
        call=lambda old, new, *a, **k: a[0] if isinstance(old, keras.layers.Dropout) else new(*a, **k),
    )
    assert not any(isinstance(layer, keras.layers.Dropout) for layer in shorter.layers)
    assert zoo.largest_difference(model(inputs), shorter(inputs)) == 0


def test_subclassed_models_get_a_remedy():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Mine()
    model(np.ones((1, 3)))
    with pytest.raises(TypeError, match=r"subclassed.*keras\.Model\(inputs, model\.call\(inputs\)\)"):
        surgery.rebuild(model)
    # The remedy works.
    inputs = keras.Input((3,))
    surgery.rebuild(keras.Model(inputs, model.call(inputs)))


def test_unbuilt_and_foreign_models_are_refused():
    with pytest.raises(ValueError, match="must be built"):
        surgery.rebuild(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(TypeError, match="Keras 3 model"):
        surgery.rebuild("model.keras")


def test_compressible_weights_are_named_by_path():
    model, _ = zoo.recurrent()
    names = [name for layer in surgery.leaf_layers(model) for name in surgery.compressible_weights(layer)]
    assert "embeddings" in names
    assert sum(name.endswith("recurrent_kernel") for name in names) == 3  # LSTM and both directions of the GRU.
    model, _ = zoo.transformer()
    names = [name for layer in surgery.leaf_layers(model) for name in surgery.compressible_weights(layer)]
    assert {"_query_dense/kernel", "_key_dense/kernel", "_value_dense/kernel", "_output_dense/kernel"} <= set(names)


def test_sole_consumers():
    inputs = keras.Input((4,))
    a, b, c = (keras.layers.Dense(4, name=n) for n in "abc")
    x = a(inputs)
    model = keras.Model(inputs, [b(x), c(b(x))])
    # `a` is read by two calls of `b`; `b` is called twice; the output of `c` leaves the model.
    assert surgery.sole_consumers(model) == {}
    model = keras.Model(inputs, c(a(inputs)))
    assert surgery.sole_consumers(model) == {id(a): c}


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Conv2D(4, 3),
        lambda: keras.layers.Conv2D(4, 3, use_bias=False),
        lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
        lambda: keras.layers.Conv2DTranspose(4, 3),
        lambda: keras.layers.Dense(4),
    ],
)
@pytest.mark.parametrize("scale", [True, False])
def test_folding_keeps_the_function(make, scale):
    rng = np.random.default_rng(0)
    inputs = keras.Input((6, 6, 3))
    norm = keras.layers.BatchNormalization(scale=scale)
    model = keras.Model(inputs, keras.layers.ReLU()(norm(make()(inputs))))
    # gamma negative and positive, variances far from 1
    norm.set_weights([rng.uniform(0.2, 3, w.shape) * rng.choice([-1, 1], w.shape) for w in norm.get_weights()[:-1]]
                     + [rng.uniform(0.1, 5, norm.get_weights()[-1].shape)])  # fmt: skip
    folded = folding.fold_batch_normalization(model)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in folded.layers)
    x = rng.normal(size=(5, 6, 6, 3)).astype("float32")
    np.testing.assert_allclose(model(x), folded(x), atol=2e-5)


def test_folding_leaves_what_it_must():
    inputs = keras.Input((6, 6, 3))
    after_relu = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, activation="relu")(inputs))
    linear = keras.layers.Conv2D(4, 3)(inputs)
    read_twice = keras.layers.BatchNormalization()(linear)
    model = keras.Model(inputs, [after_relu, read_twice, linear])
    folded = folding.fold_batch_normalization(model)
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in folded.layers) == 2


def test_an_adapted_normalization_keeps_its_statistics():
    rng = np.random.default_rng(0)
    norm = keras.layers.Normalization()
    norm.adapt(7 + 3 * rng.normal(size=(100, 5)))
    model = keras.Sequential([keras.Input((5,)), norm, keras.layers.Dense(3)])
    x = (7 + 3 * rng.normal(size=(4, 5))).astype("float32")
    assert zoo.largest_difference(model(x), surgery.rebuild(model)(x)) == 0


def test_lambdas_and_keyword_calls_are_copied():
    inputs = keras.Input((4,))
    x = keras.layers.Lambda(lambda t: t * 3)(inputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization()(inputs=keras.layers.Dense(2)(inputs=x)))
    data = np.ones((2, 4), "float32")
    np.testing.assert_allclose(folding.fold_batch_normalization(model)(data), model(data), atol=1e-5)


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """A layer of one's own whose inner layers have automatic names, which differ in every copy."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(4)
        self.rest = [keras.layers.Dense(4), keras.layers.Dense(4)]

    def build(self, shape):
        for layer in (self.first, *self.rest):
            layer.build((None, 4))

    def call(self, x):
        return self.rest[1](self.rest[0](self.first(x)))


def test_layers_of_ones_own_are_compressed_by_attribute():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Block(name="block")(inputs))
    assert list(surgery.compressible_weights(model.get_layer("block"))) == ["first/kernel", "1/kernel", "2/kernel"]
    final = MagnitudePruning(0.5, schedule="constant").apply(model)
    for kernel in surgery.compressible_weights(final.get_layer("block")).values():
        assert np.count_nonzero(np.asarray(kernel)) == 8


def test_a_train_step_that_is_lost_is_said():
    class Mine(keras.Model):
        def train_step(self, data):
            return super().train_step(data)

    inputs = keras.Input((4,))
    with pytest.warns(UserWarning, match="train_step"):
        surgery.rebuild(Mine(inputs, keras.layers.Dense(2)(inputs)))


def test_folding_leaves_shared_layers_alone():
    rng = np.random.default_rng(0)
    inputs = keras.Input((6, 6, 4))
    norm = keras.layers.BatchNormalization()
    x = norm(keras.layers.Conv2D(4, 3, padding="same")(inputs))
    twice = keras.Model(inputs, norm(keras.layers.ReLU()(x)))
    conv = keras.layers.Conv2D(4, 3, padding="same")
    inner_inputs = keras.Input((6, 6, 4))
    inner_norm = keras.layers.BatchNormalization()
    inner = keras.Model(inner_inputs, inner_norm(conv(inner_inputs)))
    outside = keras.Model(inputs, keras.layers.ReLU()(conv(inner(inputs))))
    data = rng.normal(size=(3, 6, 6, 4)).astype("float32")
    for model, layer in ((twice, norm), (outside, inner_norm)):
        layer.moving_mean.assign(rng.normal(size=4))
        layer.moving_variance.assign(rng.uniform(0.2, 3, 4))
        np.testing.assert_allclose(folding.fold_batch_normalization(model)(data), model(data), atol=1e-4)


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_activations_in_memory_are_copied_as_they_are():
    def own(x):
        return 2 * x

    inputs = keras.Input((3,))
    x = keras.layers.Dense(3, activation=lambda x: x + 1)(inputs)
    x = keras.layers.Dense(3, activation=keras.layers.LeakyReLU(0.3))(keras.layers.Dense(3, activation=own)(x))
    model = keras.Model(inputs, x)
    data = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_array_equal(surgery.rebuild(model)(data), model(data))


def test_layers_that_cannot_be_made_anew_are_named_with_a_remedy():
    class Closed(keras.layers.Layer):
        def __init__(self, factor):
            super().__init__(name="closed")
            self.factor = factor

        def call(self, x):
            return self.factor * x

        def get_config(self):
            return super().get_config()

    inputs = keras.Input((3,))
    with pytest.raises(TypeError, match=r"made anew.*layer 'closed' of type Closed.*get_config.*register"):
        surgery.rebuild(keras.Model(inputs, Closed(2.0)(inputs)))
