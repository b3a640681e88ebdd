import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import zoo
from tfkit import models
from tfkit.compression import Chain, MagnitudePruning, NoEffectWarning
from tfkit.compression.channel_importance import taylor_scores
from tfkit.compression.structured_pruning import StructuredPruning
from tfkit.internal.channels import ChannelGraph, macs

L = keras.layers


def vgg(filters=(8, 12), units=10):
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for number, count in enumerate(filters):
        x = L.Conv2D(count, 3, padding="same", name=f"conv{number}")(x)
        x = L.ReLU()(L.BatchNormalization(name=f"bn{number}")(x))
    x = L.Dense(units, activation="relu", name="fc")(L.Flatten()(L.MaxPooling2D(2)(x)))
    return keras.Model(inputs, L.Dense(4, name="logits")(x))


def rows(pruning):
    return {row.layers[0]: row.after for row in pruning.report().groups}


def test_the_smallest_filters_leave_and_the_rest_is_sliced():
    model = vgg()
    kernel = np.asarray(model.get_layer("conv0").kernel)
    norms = np.abs(kernel).sum((0, 1, 2))
    left = np.sort(np.argsort(norms)[2:])  # Li et al.: sort by the sum of absolute weights.
    small = StructuredPruning({"conv0": 0.25}).prepare(model)
    np.testing.assert_array_equal(small.get_layer("conv0").kernel, kernel[..., left])
    np.testing.assert_array_equal(
        small.get_layer("conv1").kernel, np.asarray(model.get_layer("conv1").kernel)[:, :, left]
    )
    assert small.get_layer("conv0").filters == small.get_layer("bn0").gamma.shape[0] == 6
    assert small.get_layer("conv1").filters == 12


def test_flattened_channels_find_their_rows_of_the_dense_kernel():
    model = vgg(filters=(4,), units=3)
    model.get_layer("conv0").kernel.assign(np.arange(1, 5) * np.ones((3, 3, 3, 4)))
    small = StructuredPruning({"conv*": 0.5}).prepare(model)
    kernel = np.asarray(model.get_layer("fc").kernel).reshape(4, 4, 4, 3)  # rows, columns, channels, units
    np.testing.assert_array_equal(small.get_layer("fc").kernel, kernel[:, :, 2:].reshape(-1, 3))


@pytest.mark.parametrize("settings", [{"sparsity": 0.0}, {"macs": 1.0}, {"macs": 1.0, "scope": "global"}])
def test_nothing_asked_for_changes_nothing(settings):
    model, x = zoo.residual()
    pruning = StructuredPruning(**settings)
    with pytest.warns(NoEffectWarning, match="removes no channel"):
        same = pruning.prepare(model)
    assert zoo.largest_difference(model(x), same(x)) == 0
    assert pruning.report().macs_before == pruning.report().macs_after == macs(model)


@pytest.mark.parametrize("name", ["convolutions", "nested", "recurrent", "residual", "transformer"])
@pytest.mark.filterwarnings("ignore::tfkit.compression.NoEffectWarning")
def test_every_model_of_the_zoo_runs_at_90_percent(name):
    model, x = zoo.MODELS[name]()
    pruning = StructuredPruning(0.9)
    small = pruning.prepare(model)
    expected, got = keras.tree.flatten(model(x)), keras.tree.flatten(small(x))
    assert [t.shape for t in got] == [t.shape for t in expected]
    report = pruning.report()
    assert report.macs_after == macs(small) and report.parameters_after == small.count_params()
    assert all(row.after == max(1, row.before - round(0.9 * row.before)) for row in report.groups)
    if name == "recurrent":
        assert not report.groups and zoo.largest_difference(expected, got) == 0
    else:
        assert report.macs_after < report.macs_before
    if name == "transformer":
        assert small.get_layer(model.layers[1].name).num_heads == 1


def silenced():
    """A small residual network in which half of the channels is exactly zero."""
    rng = np.random.default_rng(0)
    inputs = keras.Input((6, 6, 3))
    tied, inner = rng.permutation(8)[:4], rng.permutation(6)[:3]

    def block(x, filters, silent, name):
        x = L.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
        made.append((f"{name}_bn", silent))
        return L.BatchNormalization(name=f"{name}_bn")(x)

    made = []
    x = L.ReLU()(block(inputs, 8, tied, "stem"))
    x = L.Add()([x, block(L.ReLU()(block(x, 6, inner, "conv1")), 8, tied, "conv2")])
    model = keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(x)))
    for name, silent in made:
        norm, conv = model.get_layer(name), model.get_layer(name[:-3])
        for weight in (norm.gamma, norm.beta, conv.kernel):
            value = rng.normal(size=weight.shape)
            value[..., silent] = 0
            weight.assign(value)
    return model


@pytest.mark.parametrize("importance", ["l1", "l2", "batch_norm", "taylor"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_channels_that_do_nothing_leave_first(importance, scope):
    """Removing the half of the channels that is silent changes nothing, whatever judges them."""
    model = silenced()
    x, y = zoo._normal(6, 6, 6, 3), np.arange(6) % 4
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pruning = StructuredPruning(0.5, importance=importance, scope=scope, data=(x, y), loss=loss)
    small = pruning.prepare(model)
    assert rows(pruning) == {"stem": 4, "conv1": 3}
    assert zoo.largest_difference(model(x), small(x)) < 1e-5


def test_taylor_is_the_derivative_by_a_gate():
    inputs = keras.Input((3,))
    hidden = L.Dense(4, name="hidden")(inputs)
    model = keras.Model(inputs, L.Dense(1, name="out")(hidden))
    x, y = zoo._normal(6, 3), zoo._normal(6, 1)
    graph = ChannelGraph(model)
    _, scores = taylor_scores(graph, (x, y), "mse", batch_size=3)
    (group,) = graph.groups()
    w, b, v, c = (np.asarray(weight, "float64") for weight in model.get_weights())
    expected = []
    for part in (slice(0, 3), slice(3, 6)):
        h = x[part] @ w + b
        residual = h @ v + c - y[part]
        expected.append(((2 * residual * h * v[:, 0]).mean(0)) ** 2)  # d mse / d gate
    np.testing.assert_allclose(scores[group.roots], np.mean(expected, 0), rtol=1e-4)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
def test_the_budget_is_met_closely(scope, target):
    model = vgg((24, 32), 40)
    pruning = StructuredPruning(macs=target, scope=scope, min_channels=2)
    small = pruning.prepare(model)
    assert target - 0.04 < macs(small) / macs(model) <= target
    assert macs(small) == pruning.report().macs_after
    assert min(rows(pruning).values()) >= 2


def test_a_budget_out_of_reach_says_what_is_in_reach():
    with pytest.raises(ValueError, match=r"`macs` must be at least 0\.\d+ for this model"):
        StructuredPruning(macs=0.001, min_channels=4).prepare(vgg())


def test_known_multiply_adds():
    assert macs(models.resnet8()) == 12_501_632  # MLPerf Tiny: 12.5 million


def test_numbers_of_channels_suit_the_kernels():
    pruning = StructuredPruning(0.55, round_to=4, min_channels=5)
    pruning.prepare(vgg())
    assert rows(pruning) == {"conv0": 8, "conv1": 8, "fc": 8}  # 4 -> 5 -> 8; 5 -> 8; 4 -> 5 -> 8


def test_include_exclude_and_mapping_choose_whose_filters_leave():
    pruning = StructuredPruning(0.5, exclude=["conv0"])
    pruning.prepare(vgg())
    assert rows(pruning) == {"conv1": 6, "fc": 5}
    assert "exclude" in pruning.report().left_alone["conv0"]

    tied = StructuredPruning({"stem": 0.5, "Dense": 0.9})
    tied.prepare(models.resnet8((8, 8, 3)))
    assert rows(tied)["stem"] == 8 and rows(tied)["stage1_block1_conv1"] == 16
    assert "logits: all stay, an output of the model" in str(tied.report())


def test_heads_alone():
    model, x = zoo.transformer()
    pruning = StructuredPruning(0.5, granularity=["heads"])
    small = pruning.prepare(model)
    (row,) = pruning.report().groups
    assert (row.kind, row.before, row.after) == ("heads", 2, 1)
    assert small(x).shape == model(x).shape


@pytest.mark.parametrize("settings", [{"sparsity": 0.75}, {"sparsity": 0.75, "scope": "global"}, {"macs": 0.25}])
def test_steps_lead_where_one_step_leads(settings):
    model, trained = vgg(), []

    def fit(prepared, callbacks):
        trained.append(prepared.count_params())
        prepared.set_weights([1.01 * weight for weight in prepared.get_weights()])

    slow, fast = StructuredPruning(**settings, steps=3), StructuredPruning(**settings)
    small = slow.apply(model, fit)
    once = fast.prepare(model)
    assert len(trained) == 3 and trained[0] > trained[1] > trained[2] == small.count_params()
    assert slow.report().macs_before == macs(model) and slow.report().macs_after == macs(small)
    if settings == {"sparsity": 0.75}:
        assert rows(slow) == rows(fast)
        assert [row.before for row in slow.report().groups] == [8, 12, 10]
    else:
        assert macs(small) / macs(model) == pytest.approx(macs(once) / macs(model), abs=0.05)


def test_zeros_of_earlier_pruning_stay():
    sparse = MagnitudePruning(0.6, schedule="constant").apply(vgg())

    def fit(prepared, callbacks):  # Any training: it moves every stored weight.
        for variable in prepared.trainable_variables:
            variable.assign_add(keras.ops.full_like(variable, 0.01))

    small = Chain([StructuredPruning(0.5)]).apply(sparse, fit)
    kernel = np.asarray(small.get_layer("fc").kernel)
    assert 0.4 < np.mean(kernel == 0) < 0.8
    assert all(type(layer).__module__.startswith("keras.") for layer in small.layers)


def test_random_importance_repeats_with_its_seed():
    model = vgg()
    kernels = [
        np.asarray(StructuredPruning(0.5, importance="random", seed=seed).prepare(model).get_layer("fc").kernel)
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()


def test_data_and_loss_come_back_from_the_configuration():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = (np.ones((2, 3), "float32"), np.array([1, 0]))
    pruning = StructuredPruning(importance="taylor", data=data, loss=loss)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(pruning))
    np.testing.assert_array_equal(again.data[0], data[0])
    assert again.data[1].dtype == data[1].dtype and again.loss.from_logits
    by_name = StructuredPruning.from_config(StructuredPruning(importance="taylor", data=data, loss="mse").get_config())
    assert by_name.loss == "mse"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "`sparsity`"),
        ({"macs": 0}, "`macs`"),
        ({"importance": "l3"}, "`importance`"),
        ({"importance": "taylor"}, "`data` and `loss`"),
        ({"granularity": "rows"}, "`granularity`"),
        ({"round_to": 0}, "`round_to`"),
        ({"sparsity": {"a": 0.5}, "scope": "global"}, "`sparsity`"),
    ],
)
def test_wrong_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StructuredPruning(**settings)
    with pytest.raises(RuntimeError, match="Call `prepare`"):
        StructuredPruning().report()


def test_data_that_are_not_finite_are_refused():
    x = np.full((4, 8, 8, 3), np.nan, "float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pruning = StructuredPruning(importance="taylor", data=(x, np.zeros(4, int)), loss=loss)
    with pytest.raises(ValueError, match="finite"):
        pruning.prepare(models.get("convnet_bn")((8, 8, 3), seed=0))


def test_a_description_gives_the_shapes_of_data():
    text = repr(StructuredPruning(importance="taylor", data=(np.ones((2, 3), "float32"), np.array([1, 0])), loss="mse"))
    assert "<float32(2, 3)>" in text and "array" not in text


def test_taylor_of_several_outputs_and_losses():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = L.Dense(8, activation="relu", kernel_regularizer=keras.regularizers.L2(10.0), name="hidden")(inputs)
    model = keras.Model(inputs, {"kind": L.Dense(3, name="kind")(hidden), "size": L.Dense(1, name="size")(hidden)})
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype("float32")
    y = {"kind": rng.integers(0, 3, 32), "size": rng.normal(size=(32, 1)).astype("float32")}
    losses = {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"}
    pruned = StructuredPruning(0.5, importance="taylor", data=(x, y), loss=losses).prepare(model)
    assert pruned.get_layer("hidden").units == 4
    assert not getattr(model, "compiled", False)
    # By hand: the loss is the sum of both, without the regularization, which says nothing about the data.
    hidden_kernel, bias = model.get_layer("hidden").kernel.value, model.get_layer("hidden").bias.value
    with tf.GradientTape() as tape:
        outputs = model(x)
        loss = losses["kind"](y["kind"], outputs["kind"]) + keras.losses.MeanSquaredError()(y["size"], outputs["size"])
    by_kernel, by_bias = tape.gradient(loss, [hidden_kernel, bias])
    scores = np.sum(by_kernel * hidden_kernel, axis=0) + by_bias * bias
    kept = np.sort(np.argsort(scores**2)[4:])
    np.testing.assert_array_equal(pruned.get_layer("hidden").bias, np.asarray(bias)[kept])
    np.testing.assert_array_equal(pruned.get_layer("hidden").kernel, np.asarray(hidden_kernel)[:, kept])


@pytest.mark.parametrize(
    "data", [np.ones((4, 6)), (np.ones((0, 6)), np.ones(0)), (np.ones((4, 6)), np.ones(3)), (3, 4)]
)
def test_examples_for_taylor_are_checked_at_once(data):
    with pytest.raises(ValueError, match="Argument `data` must be"):
        StructuredPruning(importance="taylor", data=data, loss="mse")
