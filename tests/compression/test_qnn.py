import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import zoo
from tfkit.compression import Chain, MagnitudePruning, QuantizationAware, QuantizedNeuralNetwork
from tfkit.compression.fake_quantize import FakeQuantize
from tfkit.compression.low_precision import (
    ClipLatent,
    IntegerSign,
    LowPrecisionActivation,
    LowPrecisionWeight,
    best_unit,
    binarize,
    binarize_stochastically,
    rectified_limit,
)
from tfkit.export import convert, pack, verify
from tfkit.export.runner import Runner
from tfkit.internal import surgery

L = keras.layers
X = np.array([-3.0, -1.0, -0.4, -0.0, 0.0, 0.7, 1.0, 1.001, 9.0], "float32")


def gradient_of(function, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(function(x) * tf.range(1.0, x.shape[0] + 1.0))
    return np.asarray(tape.gradient(value, x))


# The functions.


def test_sign_and_its_gradient():
    np.testing.assert_array_equal(binarize(X), [-1, -1, -1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(gradient_of(binarize, X), [0, 2, 3, 4, 5, 6, 7, 0, 0])


def test_stochastic_sign_is_unbiased_and_repeats():
    x = np.array([-2.0, -1.0, -0.5, 0.0, 0.3, 1.0, 2.0], "float32")
    drawn = np.asarray(binarize_stochastically(np.tile(x, (40000, 1)), seed=3))
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    mean = np.clip(x, -1, 1)
    error = 4.5 * np.sqrt((1 - mean**2) / len(drawn))
    assert (np.abs(drawn.mean(0) - mean) <= error).all()
    np.testing.assert_array_equal(drawn, binarize_stochastically(np.tile(x, (40000, 1)), seed=3))
    np.testing.assert_array_equal(
        gradient_of(lambda v: binarize_stochastically(v, seed=0), X), [0, 2, 3, 4, 5, 6, 7, 0, 0]
    )


def test_best_unit_at_one_bit_is_the_mean_magnitude_of_what_is_left():
    view = np.array([[1.0, 0.0, 0.0], [-2.0, 3.0, 0.0], [4.5, -1.0, 0.0]])
    np.testing.assert_allclose(best_unit(view, 1), [2.5, 2.0, 1.0])


@pytest.mark.parametrize("bits", [2, 4])
def test_best_unit_has_the_least_squared_error(bits):
    view = np.random.default_rng(0).normal(size=(500, 3))
    limit = 2 ** (bits - 1) - 1

    def error(unit):
        rounded = np.clip(np.round(view / unit * limit), -limit, limit) * unit / limit
        return ((rounded - view) ** 2).sum(0)

    found = error(best_unit(view, bits))
    searched = np.min([error(np.full(3, u)) for u in np.linspace(0.3, 4, 1000)], axis=0)
    assert (found <= searched * 1.02).all() and (found < 0.8 * error(np.abs(view).max(0))).all()
    on_grid = np.array([[1.0], [-1.0], [0.0]]) * 0.3
    np.testing.assert_allclose(best_unit(on_grid, 2), [0.3])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_limit_of_rectified_activations_has_the_least_squared_error(bits):
    z = np.maximum(np.random.default_rng(0).normal(size=50000), 0)

    def error(limit):
        step = limit / (2**bits - 1)
        return np.mean((np.minimum(np.round(z / step) * step, limit) - z) ** 2)

    best = rectified_limit(bits)
    assert error(best) < error(best - 0.2) and error(best) < error(best + 0.2)


# The weights.


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("scale", ["channel", "tensor", "none"])
def test_weights_match_a_numpy_reference(bits, depthwise, scale):
    weight = np.random.default_rng(0).normal(size=(3, 3, 4, 2)).astype("float32")
    transform = LowPrecisionWeight(bits, depthwise, scale)
    transform.build(weight.shape)
    transform.adapt(weight)
    rounded = np.asarray(transform.transform(weight))
    limit = max(1, 2 ** (bits - 1) - 1)
    for c in range(4):
        for m in range(2):
            group = {True: weight[:, :, c, m], False: weight[..., m]}[depthwise] if scale == "channel" else weight
            unit = 1.0 if scale == "none" else best_unit(group.reshape(-1, 1), bits)[0]
            part = weight[:, :, c, m] / unit
            steps = np.where(part >= 0, 1, -1) if bits == 1 else np.clip(np.round(part * limit), -limit, limit)
            np.testing.assert_allclose(rounded[:, :, c, m], steps * unit / limit, atol=1e-6)
    assert transform.constraint(rounded).holds(rounded)


def test_gradient_of_weights_passes_and_binary_weights_are_exact():
    transform = LowPrecisionWeight(1, scale="none")
    transform.build((9, 1))
    weight = tf.constant(X[:, None])
    with tf.GradientTape() as tape:
        tape.watch(weight)
        rounded = transform.transform(weight)
        value = tf.reduce_sum(rounded * 3.0)
    np.testing.assert_array_equal(tape.gradient(value, weight), np.full((9, 1), 3))
    np.testing.assert_array_equal(np.unique(rounded), [-1, 1])


def test_latent_constraint_clips_by_channel():
    w = np.array([[[[3.0, -3.0], [0.125, -9.0]]]], "float32")
    np.testing.assert_array_equal(ClipLatent([1.0, 2.0])(w), [[[[1, -2], [0.125, -2]]]])
    depthwise = ClipLatent([1.0, 2.0, 0.5, 4.0], depthwise=True)
    np.testing.assert_array_equal(depthwise(w), [[[[1, -2], [0.125, -4]]]])
    again = keras.constraints.deserialize(keras.constraints.serialize(depthwise))
    np.testing.assert_array_equal(again(w), depthwise(w))


# The activations.


def test_more_bits_are_a_relu_with_even_steps():
    x = np.linspace(-1.003, 3.997, 501).astype("float32")
    layer = LowPrecisionActivation(2, limit=1.5, unit=2.0)
    np.testing.assert_allclose(layer(x), np.clip(np.round(x), 0, 3), atol=1e-5)
    np.testing.assert_array_equal(gradient_of(layer, np.array([-0.5, 0.7, 2.9, 3.6], "float32")), [0, 2, 3, 0])


def test_unit_is_a_moving_root_mean_square():
    layer = LowPrecisionActivation(1, momentum=0.5)
    for value in (1.0, 2.0, 4.0):
        layer(np.array([value, -value], "float32"), training=True)
    # Means of squares: 1, then (1 + 4) / 2, then (2.5 + 16) / 2.
    assert float(layer.mean_square) == pytest.approx(9.25)
    inside = np.array([3.0, -3.0, 3.1, 0.0], "float32")
    np.testing.assert_allclose(gradient_of(layer, inside), [1 / 9.25**0.5, 2 / 9.25**0.5, 0, 4 / 9.25**0.5], rtol=1e-6)


def test_chance_is_for_training_only():
    layer = LowPrecisionActivation(1, stochastic=True, unit=1.0, seed=5)
    x = np.full(1000, 0.2, "float32")
    assert (np.asarray(layer(x)) == 1).all()
    assert 0.5 < np.mean(np.asarray(layer(x, training=True)) == 1) < 0.7


def test_quantizers_that_saw_no_data_refuse_to_freeze():
    with pytest.raises(ValueError, match="Train the prepared model"):
        LowPrecisionActivation(1).freeze()
    frozen = LowPrecisionActivation(2, limit=3.0, unit=0.5).freeze()
    assert type(frozen) is FakeQuantize and (frozen.minimum, frozen.maximum) == (0.0, pytest.approx(1.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowPrecisionActivation(9),
        lambda: LowPrecisionActivation(2, stochastic=True),
        lambda: LowPrecisionActivation(2, unit=0.0),
        lambda: QuantizedNeuralNetwork(0),
        lambda: QuantizedNeuralNetwork(1, 9),
        lambda: QuantizedNeuralNetwork(2, 2, stochastic=True),
        lambda: QuantizedNeuralNetwork(last_layer_bits=0),
        lambda: QuantizedNeuralNetwork(scale="row"),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="Argument `"):
        make()


# The method.


def norm(name=None):
    # An offset, as few samples make means that are whole numbers of steps: a tie, which float rounding decides.
    return L.BatchNormalization(momentum=0.5, beta_initializer=keras.initializers.RandomNormal(0.0, 0.3), name=name)


def network(padding="valid", activation="relu"):
    """Convolution, depthwise and dense layers, with and without normalization, activations inside and beside."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((10, 10, 1))
    x = norm("bn1")(L.Conv2D(6, 3, padding=padding, use_bias=False, name="conv1")(inputs))
    x = L.MaxPooling2D(2, name="pool")(L.Activation(activation, name="act1")(x))
    x = L.Conv2D(8, 3, padding=padding, activation=activation, bias_initializer="normal", name="conv2")(x)
    x = L.ReLU()(norm()(L.DepthwiseConv2D(2, padding=padding, name="depthwise")(x)))
    x = L.ReLU()(norm()(L.Dense(64, name="fc")(L.Flatten()(x))))
    return keras.Model(inputs, L.Dense(5, name="logits")(x))


def small():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((10, 10, 1))
    x = L.Flatten()(L.Conv2D(4, 3, strides=3, activation="relu", name="conv")(inputs))
    return keras.Model(inputs, L.Dense(5, name="logits")(L.Dense(32, activation="relu", name="fc")(x)))


DATA = np.random.default_rng(0).normal(size=(60, 10, 10, 1)).astype("float32")


def quantized(model, x=DATA, **options):
    """Prepares, shows the quantizers some data without training, which compiles nothing, and finalizes."""
    method = QuantizedNeuralNetwork(**options)
    prepared = method.prepare(model)
    for _ in range(4):
        prepared(x, training=True)
    return prepared, method.finalize(prepared)


def outputs_of(model, layers):
    outputs = keras.Model(model.input, [layer.output for layer in layers])(DATA)
    return [np.asarray(values) for values in keras.tree.flatten(outputs)]


def tensor_types(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    return [(op["op_name"], op["inputs"], op["outputs"]) for op in interpreter._get_ops_details()], {
        t["index"]: t["dtype"] for t in interpreter.get_tensor_details()
    }


@pytest.mark.parametrize(
    ("padding", "options"),
    [
        ("same", {}),
        (
            "valid",
            {"stochastic": True, "shift_batch_norm": True, "weight_bits": 3, "last_layer_bits": 1, "scale": "tensor"},
        ),
        ("same", {"weight_bits": 2, "activation_bits": 2}),
        ("valid", {"weight_bits": 4, "activation_bits": 4, "first_layer_bits": 3, "last_layer_bits": None}),
    ],
)
def test_the_file_computes_what_the_finalized_model_does(padding, options, tmp_path):
    prepared, final = quantized(network(padding), **options)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat")
    report = verify(final, path, DATA)
    binary = options.get("activation_bits", 1) == 1
    for output in report.results:
        if binary:
            assert output.max_error_steps < 0.01
        elif output.kernels == "xnnpack":
            assert output.max_error_steps < 1.01
        # The reference kernels round twice, so that of few bits a hidden value may go the other way.
    # The prepared model has the same signs, and rounds the last bias less.
    step = report.results[0].step
    if binary:
        np.testing.assert_allclose(prepared(DATA), final(DATA), atol=1.01 * step)
    operations, types = tensor_types(path)
    assert operations[0][0] == "QUANTIZE" and operations[-1][0] == "DEQUANTIZE"
    assert all(types[i] == np.int8 for _, _, outputs in operations[:-1] for i in outputs)
    assert {name for name, *_ in operations[1:-1]} <= {
        "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "RESHAPE", *(() if binary else ("MINIMUM",)),
    }  # fmt: skip


def test_hidden_activations_are_signs_without_a_zero():
    prepared, final = quantized(network("same"))
    signs = [layer for layer in final.layers if isinstance(layer, IntegerSign)]
    assert len(signs) == 4
    before = keras.Model(final.input, [layer.input for layer in signs])(DATA)
    assert all(np.abs(values).min() >= 1.9 for values in before)
    after = outputs_of(final, signs)
    assert all(set(np.unique(values)) == {-1.0, 1.0} for values in after)
    # The training model has the very same ones; the first it takes behind the pooling, which changes nothing.
    after[0] = outputs_of(final, [final.get_layer("pool")])[0]
    twins = [layer for layer in prepared.layers if isinstance(layer, LowPrecisionActivation)]
    for ours, theirs in zip(after, outputs_of(prepared, twins), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_gradient_goes_to_the_largest_of_what_is_pooled():
    inputs = keras.Input((4, 1))
    x = L.MaxPooling1D(4)(L.ReLU()(L.BatchNormalization()(L.Conv1D(1, 1, use_bias=False, name="conv")(inputs))))
    prepared = QuantizedNeuralNetwork(first_layer_bits=8).prepare(keras.Model(inputs, L.Dense(1)(L.Flatten()(x))))
    prepared.get_layer("conv").layer.kernel.assign([[[1.0]]])
    x = tf.constant([0.2, 0.1, 0.7, 0.3])[None, :, None]
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(prepared(x, training=False))
    # All four signs are +1; after them, the pooling would send its gradient to the first.
    np.testing.assert_array_equal(np.asarray(tape.gradient(value, x))[0, :, 0] != 0, [False, False, True, False])


def test_normalizations_that_flip_or_vanish_become_thresholds_too():
    model = network()
    norm = model.get_layer("bn1")
    norm.gamma.assign([-1.0, 0.0, 0.0, 1e-30, -2.0, 1.0])
    norm.beta.assign([0.1, 0.2, -0.2, 0.3, -5.0, 0.0])
    prepared, final = quantized(model)
    # Compared behind the pooling, which comes before the sign in one and after it in the other.
    theirs = outputs_of(prepared, [prepared.get_layer("act1")])[0]
    ours = outputs_of(final, [final.get_layer("pool")])[0]
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.unique(ours[..., 1]), [1])
    np.testing.assert_array_equal(np.unique(ours[..., 2]), [-1])
    np.testing.assert_array_equal(np.unique(ours[..., 0]), [-1, 1])


def test_binary_weights_take_one_bit_in_the_packed_file(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    x = L.ReLU()(L.BatchNormalization()(L.Dense(128, name="first")(inputs)))
    x = L.ReLU()(L.BatchNormalization()(L.Dense(512, name="hidden")(x)))
    model = keras.Model(inputs, L.Dense(4)(x))
    _, final = quantized(model, x=np.random.default_rng(0).normal(size=(32, 64)).astype("float32"))
    magnitudes = np.abs(final.get_layer("hidden").kernel)
    assert np.ptp(magnitudes) < 1e-6 * magnitudes.max()
    packed = pack(convert(final, tmp_path / "m.tflite", quantization="int8-qat"), tmp_path / "m.tfk")
    row = next(row for row in packed.buffers if row.elements == 128 * 512)
    assert 0.95 < 8 * row.packed_bytes / row.elements < 1.02


@pytest.mark.parametrize("optimizer", [keras.optimizers.Adam(0.5), keras.optimizers.SGD(5.0)])
def test_latent_weights_are_clipped_in_plain_fit(optimizer):
    prepared = QuantizedNeuralNetwork(scale="tensor").prepare(small())
    prepared.compile(optimizer, "mse")
    prepared.fit(DATA, np.ones((60, 5)), batch_size=20, epochs=1, verbose=0)
    wrapped = prepared.get_layer("fc")
    unit = float(wrapped.transforms["kernel"][0].unit[0])
    latent = np.abs(wrapped.layer.kernel)
    assert latent.max() == pytest.approx(unit, rel=1e-6) and (latent < 0.9 * unit).any()


def test_bits_of_the_first_and_last_layers_and_of_those_before_a_sign():
    def bits(**options):
        method = QuantizedNeuralNetwork(**options)
        prepared = method.prepare(network())
        assert {row.status for row in method.report()} <= {"int8", "folded", "same grid"}
        return [prepared.get_layer(n).transforms["kernel"][0].bits for n in ("conv1", "conv2", "fc", "logits")]

    assert bits() == [7, 1, 1, 8]
    assert bits(weight_bits=2, activation_bits=4) == [8, 2, 2, 8]
    assert bits(weight_bits=2, first_layer_bits=None, last_layer_bits=4) == [2, 2, 2, 4]


def test_eight_bits_are_quantization_aware_training():
    prepared = [method.prepare(small()) for method in (QuantizedNeuralNetwork(8, 8), QuantizationAware())]
    ours, theirs = ([np.asarray(model(DATA, training=training)) for training in (True, False)] for model in prepared)
    np.testing.assert_array_equal(ours, theirs)
    assert np.ptp(ours[1]) > 0


def test_without_scale_weights_are_plus_and_minus_one():
    prepared = QuantizedNeuralNetwork(scale="none").prepare(small())
    weights = prepared.get_layer("fc").effective_weights()["kernel"]
    np.testing.assert_array_equal(np.unique(weights), [-1, 1])


def test_pruned_weights_stay_zero():
    model = small()
    pruned = MagnitudePruning(0.5).apply(model)
    zeros = np.asarray(pruned.get_layer("fc").kernel) == 0
    assert zeros.mean() > 0.4
    _, final = quantized(pruned)
    kernel = np.asarray(final.get_layer("fc").kernel)
    np.testing.assert_array_equal(kernel == 0, zeros)
    assert len(np.unique(kernel)) == 3
    stacked = Chain([MagnitudePruning(0.5, frequency=1), QuantizedNeuralNetwork()]).prepare(model)
    assert stacked(DATA).shape == (60, 5)


def test_residual_sums_and_separable_convolutions(tmp_path):
    model, x = zoo.residual()
    _, final = quantized(model, np.tile(x, (4, 1, 1, 1)))
    # Three convolutions with an activation alone behind them; the ReLU behind the sum stays.
    kinds = [type(layer).__name__ for layer in final.layers]
    assert kinds.count("IntegerSign") == 3 and kinds.count("ReLU") == 1
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat")
    # A sum off by one step may flip a sign behind it; the reference kernels round sums in their own way.
    fast = next(output for output in verify(final, path, x).results if output.kernels == "xnnpack")
    assert fast.mean_abs_error < fast.step


def test_the_last_activation_is_left_alone():
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, L.Dense(3, activation="relu", name="b")(L.Dense(8, activation="tanh", name="a")(inputs))
    )
    prepared = QuantizedNeuralNetwork().prepare(model)
    assert sum(isinstance(layer, LowPrecisionActivation) for layer in prepared.layers) == 1
    assert surgery.activation_name(prepared.get_layer("b").layer) == "relu"


def test_a_prepared_model_is_saved_with_its_constraints(tmp_path):
    prepared = QuantizedNeuralNetwork(stochastic=True, shift_batch_norm=True).prepare(network())
    prepared(DATA, training=True)
    prepared.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(again(DATA), prepared(DATA))
    assert isinstance(again.get_layer("fc").layer.kernel.constraint, ClipLatent)


def test_a_binary_network_learns_digits(tiny_digits, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((28, 28, 1))
    x = L.Flatten()(L.AveragePooling2D(2)(inputs))
    for units in (128, 64):
        x = L.ReLU()(L.BatchNormalization(momentum=0.8)(L.Dense(units, use_bias=False)(x)))
    model = keras.Model(inputs, L.Dense(10)(x))

    def fit(prepared, callbacks):
        prepared.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        prepared.fit(tiny_digits.x_train, tiny_digits.y_train, batch_size=32, epochs=5, verbose=0, callbacks=callbacks)

    final = QuantizedNeuralNetwork().apply(model, fit)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat")
    outputs = np.asarray(Runner(path)(tiny_digits.x_test))
    assert np.mean(outputs.argmax(-1) == tiny_digits.y_test) > 0.8


def test_activations_are_left_out_by_name_and_with_their_layer():
    inputs = keras.Input((6,))
    x = L.ReLU(name="r")(L.Dense(6, name="h")(inputs))
    model = keras.Model(inputs, L.Dense(3)(L.ReLU(name="s")(L.Dense(6)(x))))
    for left_out in (["r"], ["h"]):
        prepared = QuantizedNeuralNetwork(2, 2, exclude=left_out).prepare(model)
        assert [layer.name for layer in prepared.layers if isinstance(layer, LowPrecisionActivation)] == ["s"]


@pytest.mark.parametrize("kind", ["fork", "pooled", "twice"])
def test_activations_behind_what_is_on_a_grid_already_reach_the_file(kind, tmp_path):
    """The sum is read by others too, or pooled first, or made by a layer that is called twice."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    dense = L.Dense(6, activation="relu" if kind == "twice" else None)
    x = dense(inputs)
    if kind == "fork":
        x = L.Add()([x, L.ReLU()(x)])
    elif kind == "pooled":
        x = L.Flatten()(L.ReLU()(L.MaxPooling1D(2)(L.Reshape((6, 1))(x))))
    else:
        x = dense(x)
    x_data = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
    prepared, final = quantized(
        keras.Model(inputs, L.Dense(3)(x)), x_data, weight_bits=4, activation_bits=2, last_layer_bits=8
    )
    np.testing.assert_allclose(prepared(x_data, training=False), final(x_data), atol=0.05)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat")
    _, types = tensor_types(path)
    assert np.int8 in types.values()
    # A step of the 8-bit sum may fall on the other side of a wide step of 2 bits, for a few examples.
    ours, theirs = np.asarray(final(x_data)), Runner(path).run(x_data)
    same = np.abs(ours - next(iter(theirs.values()))).max(axis=1) < 0.05 * np.abs(ours).max()
    assert same.mean() > 0.8
