import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import zoo
from tfkit.compression import (
    Chain,
    MagnitudePruning,
    NoEffectWarning,
    PostTrainingQuantization,
    QuantizationAware,
    WeightClustering,
)
from tfkit.compression.fake_quantize import FakeQuantize, FakeQuantizeWeight, QuantizedGrid, nudged_range, weight_scale
from tfkit.export import convert, verify
from tfkit.export.runner import Runner
from tfkit.internal import surgery

L = keras.layers


def integers_of(path):
    """Returns the int8 weight tensors of a file by name."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    found = {}
    for detail in interpreter.get_tensor_details():
        if (
            detail["dtype"] == np.int8
            and len(detail["shape"]) in (2, 4)
            and detail["quantization_parameters"]["scales"].size
        ):
            try:
                found[detail["name"]] = interpreter.get_tensor(detail["index"])
            except ValueError:
                continue  # An activation: it has no data yet.
    return found


def quantized(model, inputs, steps=4, **options):
    compressor = QuantizationAware(**options)
    prepared = compressor.prepare(model)
    zoo.train(prepared, inputs, steps=steps, callbacks=compressor.callbacks(), learning_rate=1e-3)
    return compressor, prepared, compressor.finalize(prepared)


# The weights.


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_land_on_the_grid(depthwise, per_channel):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 3, 4, 2)).astype("float32") * np.array([1, 10])
    rounded = np.asarray(FakeQuantizeWeight(8, depthwise, per_channel).transform(weight))
    # Independent reference: loop over output channels.
    for c in range(4):
        for m in range(2):
            channel = {(True, True): weight[:, :, c, m], (False, True): weight[..., m]}.get(
                (depthwise, per_channel), weight
            )
            scale = np.abs(channel).max() / 127
            expected = np.round(weight[:, :, c, m] / scale) * scale
            np.testing.assert_allclose(rounded[:, :, c, m], expected, atol=1e-5)


def test_gradient_passes_straight_through_and_zero_channels_are_safe():
    weight = tf.Variable(np.array([[0.3, 0.0], [-1.0, 0.0]], "float32"))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(FakeQuantizeWeight().transform(weight) * [[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(tape.gradient(value, weight), [[1, 2], [3, 4]])
    assert np.isfinite(value)
    np.testing.assert_array_equal(weight_scale(np.zeros((3, 2))), [1 / 127, 1 / 127])


def test_the_grid_constraint_projects_and_survives_saving():
    grid = QuantizedGrid([0.1, 0.2])
    kernel = np.array([[0.14, 0.31], [-99.0, 0.0]], "float32")
    np.testing.assert_allclose(grid(kernel), [[0.1, 0.4], [-12.7, 0.0]], atol=1e-6)
    again = keras.constraints.deserialize(keras.constraints.serialize(grid))
    np.testing.assert_array_equal(again.scale, grid.scale)
    np.testing.assert_allclose(grid.scaled(np.array([-2.0, 3.0])).scale, [0.2, 0.6])


# The activations.


def test_first_batches_are_averaged_evenly():
    layer = FakeQuantize(momentum=0.9)
    for low, high in [(-1.0, 2.0), (-3.0, 4.0)]:
        layer(np.array([low, high], "float32"), training=True)
    assert float(layer.moving_minimum) == pytest.approx(-2) and float(layer.moving_maximum) == pytest.approx(3)


def test_moving_average_after_the_first_batches():
    layer = FakeQuantize(momentum=0.5)
    for high in (1.0, 2.0, 4.0):
        layer(np.array([0.0, high], "float32"), training=True)
    assert float(layer.moving_maximum) == pytest.approx(((1 + 2) / 2 + 4) / 2)


def test_untrained_quantizers_pass_through_and_refuse_to_freeze():
    layer = FakeQuantize()
    x = np.array([0.123, 7.0], "float32")
    np.testing.assert_array_equal(layer(x), x)
    with pytest.raises(ValueError, match="Train the prepared model"):
        layer.freeze()


def test_ranges_hold_zero_exactly():
    for low, high in [(-1.0, 1.0), (0.3, 2.0), (-5.0, -1.0), (0.0, 0.0), (-0.7, 3.1)]:
        low, high = (float(v) for v in nudged_range(low, high))
        scale = (high - low) / 255
        assert low <= 0 <= high and scale > 0
        assert -low / scale == pytest.approx(round(-low / scale), abs=1e-3)


def test_activations_match_a_numpy_reference():
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000).astype("float32") * 3
    layer = FakeQuantize(minimum=-2.0, maximum=4.0)
    scale, zero = 6 / 255, round(2 / (6 / 255))
    expected = (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


# The graph.


def test_residual_network_is_int8_throughout_and_matches_its_file(tmp_path):
    model, inputs = zoo.residual()
    before = model.get_weights()
    compressor, prepared, final = quantized(model, inputs)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    status = {row.layer: row.status for row in compressor.report()}
    assert "float" not in status.values()
    assert not any(isinstance(layer, (L.BatchNormalization, L.SeparableConv2D)) for layer in final.layers)
    # Folding moves rounding noise, so the two agree to a step of the output.
    step = (final.layers[-1].maximum - final.layers[-1].minimum) / 255
    assert zoo.largest_difference(prepared(inputs), final(inputs)) <= 1.01 * step

    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    for result in verify(final, path, zoo._normal(50, 10, 10, 3)).results:
        # Where branches meet, two inputs may each be a step apart, and a reference kernel rounds twice.
        assert result.max_error_steps <= 2.01 and result.mean_abs_error < 0.5 * result.step
        assert result.nonfinite_count == 0
    # Nothing in the file computes in float.
    runner = Runner(path)
    assert {str(np.dtype(d["dtype"])) for d in [*runner.inputs.values(), *runner.outputs.values()]} == {"int8"}


def test_a_network_without_branches_matches_to_one_step(trained_digits_model, tiny_digits, tmp_path):
    compressor = QuantizationAware()
    prepared = compressor.prepare(trained_digits_model)
    prepared.compile(keras.optimizers.Adam(1e-4), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    prepared.fit(tiny_digits.x_train, tiny_digits.y_train, batch_size=50, verbose=0, callbacks=compressor.callbacks())
    final = compressor.finalize(prepared)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    for result in verify(final, path, tiny_digits.x_test).results:
        assert result.max_error_steps <= 1.01 and result.argmax_agreement >= 0.99


def test_average_pooling_rounds_on_the_grid_of_its_input(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = L.AveragePooling2D(2)(L.Conv2D(4, 3, activation="relu")(inputs))
    model = keras.Model(inputs, L.Dense(5)(L.Flatten()(x)))
    _, _, final = quantized(model, zoo._normal(60, 8, 8, 3))
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    for result in verify(final, path, zoo._normal(60, 8, 8, 3)).results:
        # The mean of four integers is a tie one time in four, which kernel and fake quantization break differently.
        assert result.max_error_steps <= 4.01 and result.mean_abs_error < result.step


def test_trained_result_survives_saving(tmp_path):
    model, inputs = zoo.residual()
    _, prepared, final = quantized(model, inputs)
    for candidate in (prepared, final):
        candidate.save(tmp_path / "model.keras")
        assert zoo.largest_difference(candidate(inputs), keras.saving.load_model(tmp_path / "model.keras")(inputs)) == 0


def test_concatenated_tensors_share_a_grid():
    model, inputs = zoo.residual()
    prepared = QuantizationAware().prepare(model)
    (join,) = [layer for layer in prepared.layers if isinstance(layer, L.Concatenate)]
    producers = [tensor._keras_history.operation for tensor in join.input]
    assert not any(isinstance(layer, FakeQuantize) for layer in producers)
    assert isinstance(surgery.sole_consumers(prepared)[id(join)], FakeQuantize)


def test_float_layers_are_named_with_a_reason(tmp_path):
    model, inputs = zoo.transformer()
    compressor, prepared, final = quantized(model, inputs)
    rows = {row.kind: row for row in compressor.report()}
    assert rows["MultiHeadAttention"].status == rows["LayerNormalization"].status == "float"
    assert all(row.note for row in compressor.report() if row.status == "float")
    gelu = [row for row in compressor.report() if "gelu" in row.note]
    assert gelu and gelu[0].status == "float"
    assert [row.status for row in compressor.report() if "Dense" in row.kind] == ["int8"] * 3
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat")
    for result in verify(final, path, zoo._normal(30, 7, 8)).results:
        assert result.max_error_steps <= 2


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "tanh"])
def test_activations_with_prescribed_grids(activation, tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(5, activation=activation)])
    _, _, final = quantized(model, zoo._normal(30, 6))
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    (output,) = Runner(path).outputs.values()
    assert output["quantization"] == pytest.approx((1 / 128, 0) if activation == "tanh" else (1 / 256, -128))
    for result in verify(final, path, zoo._normal(50, 6)).results:
        assert result.max_error_steps <= 1.01


def test_one_dimensional_convolution(tmp_path):
    model = keras.Sequential(
        [keras.Input((12, 4)), L.Conv1D(6, 3, activation="relu"), L.GlobalMaxPooling1D(), L.Dense(3)]
    )
    _, _, final = quantized(model, zoo._normal(6, 12, 4))
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    for result in verify(final, path, zoo._normal(50, 12, 4)).results:
        assert result.max_error_steps <= 1.01


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.EinsumDense("abcd,de->abce", output_shape=(None, None, 4), bias_axes="e"),
        lambda: L.Conv2DTranspose(4, 3, strides=2),
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2),
    ],
)
def test_other_weighted_layers(layer, tmp_path):
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, layer()(inputs))
    _, _, final = quantized(model, zoo._normal(30, 6, 6, 3))
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    for result in verify(final, path, zoo._normal(50, 6, 6, 3)).results:
        assert result.max_error_steps <= 1.01


def test_excluded_layers_stay_float():
    model, inputs = zoo.mlp()
    first, second = [layer.name for layer in model.layers if layer.weights]
    compressor, _, final = quantized(model, inputs, exclude=[second])
    assert {row.layer: row.status for row in compressor.report() if row.kind == "Dense"} == {
        first: "int8",
        second: "float",
    }
    assert final.get_layer(second).kernel_constraint is None
    with pytest.warns(NoEffectWarning):
        QuantizationAware(include=["nothing"]).prepare(model)


def test_layers_without_weights_are_left_out_too():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, name="one")(inputs)
    left, right = L.Conv2D(4, 1, name="two")(x), L.Conv2D(4, 1, name="three")(x)
    x = L.AveragePooling2D(2, name="pool")(L.Concatenate(name="join")([L.Add(name="add")([left, right]), x]))
    model = keras.Model(inputs, L.Dense(3, name="dense")(L.Flatten()(x)))
    examples = zoo._normal(20, 8, 8, 3)
    for options in ({"exclude": ["add", "pool", "join"]}, {"include": ["one", "dense"]}):
        compressor, prepared, final = quantized(model, examples, **options)
        rows = {row.layer: row for row in compressor.report()}
        assert all((rows[name].status, rows[name].note) == ("float", "left out") for name in ("add", "pool", "join"))
        assert rows["one"].status == rows["dense"].status == "int8"
        np.testing.assert_allclose(prepared(examples), final(examples), atol=1e-5)


def test_nested_models_are_opened():
    model, inputs = zoo.nested()
    compressor, prepared, final = quantized(model, inputs)
    assert sum(row.kind == "Dense" and row.status == "int8" for row in compressor.report()) == 3
    assert not any(isinstance(layer, keras.Model) for layer in final.layers)
    np.testing.assert_allclose(prepared(inputs)["score"], final(inputs)["score"], atol=1e-5)


# Together with what came before.


def test_zeros_and_clusters_survive_into_the_file(tmp_path):
    inputs = keras.Input((8, 8, 1))
    x = L.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = L.BatchNormalization()(L.Conv2D(8, 3, name="normalized")(x))
    model = keras.Model(inputs, L.Dense(6, name="dense")(L.Flatten()(x)))
    data = zoo._normal(12, 8, 8, 1)

    def fit(prepared, callbacks):
        zoo.train(prepared, data, callbacks=callbacks)

    chain = Chain([MagnitudePruning(0.6, schedule="constant"), WeightClustering(3), QuantizationAware()])
    final = chain.apply(model, fit)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat", io="int8")
    weights = [w for w in integers_of(path).values() if w.shape[0] > 1]  # Not the activations of a batch of 1.
    assert len(weights) == 3
    for integers in weights:
        assert np.mean(integers == 0) == pytest.approx(0.6, abs=0.02)
        # Normalization may turn a channel's sign; otherwise the integers are those of the shared values.
        assert len(np.unique(np.abs(integers))) <= 8
    for result in verify(final, path, data).results:
        assert result.max_error_steps <= 1.01


def test_joint_preparation_of_pruning_and_quantization():
    model, inputs = zoo.mlp()
    chain = Chain([MagnitudePruning(0.5, schedule="constant"), QuantizationAware()])
    prepared = chain.prepare(model)
    zoo.train(prepared, inputs, callbacks=chain.callbacks())
    final = chain.finalize(prepared)
    for layer in surgery.leaf_layers(final):
        if isinstance(layer, L.Dense):
            kernel = np.asarray(layer.kernel)
            assert np.mean(kernel == 0) >= 0.5
            steps = kernel / layer.kernel_constraint.scale
            np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


# Fewer than 8 bits.


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_narrow_activations_match_a_numpy_reference(bits):
    low, high = nudged_range(-0.7, 1.9, bits)
    x = np.linspace(-3, 5, 401).astype("float32")
    step = float(high - low) / (2**bits - 1)
    expected = np.clip(np.floor((x - float(low)) / step + 0.5), 0, 2**bits - 1) * step + float(low)
    got = np.asarray(FakeQuantize(bits, minimum=-0.7, maximum=1.9)(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert len(np.unique(np.round(got / step))) == 2**bits


def test_narrow_activations_pass_gradients_inside_their_range_only():
    x = tf.constant([-2.0, 0.1, 0.9, 1.4, 1.8, 30.0, 300.0])  # The range is [0, 1.5]; its 8-bit grid reaches 127.5.
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = FakeQuantize(2, minimum=0.0, maximum=1.5)(x)
    np.testing.assert_array_equal(tape.gradient(y, x), [0, 1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_narrow_weights_and_activations_reach_the_file(bits, tmp_path):
    """The integers of the file are a multiple of the k-bit ones, and it computes what the finalized model does."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, use_bias=False)(inputs)))
    x = L.Add()([x, L.Conv2D(8, 3, padding="same", activation="relu")(x)])
    model = keras.Model(inputs, L.Dense(10)(L.Flatten()(L.MaxPooling2D(2)(x))))
    examples = zoo._normal(64, 8, 8, 3)
    _, _, final = quantized(model, examples, bits=bits, activation_bits=bits)
    path = convert(final, tmp_path / "model.tflite", quantization="int8-qat")
    limit = 2 ** (bits - 1) - 1
    kernels = [integers for integers in integers_of(path).values() if len(integers) > 1]
    assert len(kernels) == 3
    for integers in kernels:
        assert np.abs(integers).max() == limit * (127 // limit)
        assert set(np.unique(integers)) <= set(np.arange(-limit, limit + 1) * (127 // limit))
    report = verify(final, path, examples)
    # What XNNPACK rounds in one go, the reference kernels round twice.
    fast = next(result for result in report.results if result.kernels == "xnnpack")
    assert fast.max_error_steps < 0.01


def test_inputs_and_outputs_keep_eight_bits():
    inputs = keras.Input((6,))
    x = L.Dense(5, activation="relu")(inputs)
    model = keras.Model(inputs, L.Softmax()(L.Dense(3)(L.Dense(4)(x))))
    prepared = QuantizationAware(bits=4, activation_bits=3).prepare(model)
    widths = [layer.bits for layer in prepared.layers if isinstance(layer, FakeQuantize)]
    assert widths == [8, 3, 3, 8, 8]  # Input, two hidden, logits, probabilities.


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1}, {"bits": 16}, {"bits": 4.5}, {"bits": {"a": 4}}, {"momentum": 1.0}, {"activation_bits": 0},
        {"activation_bits": 2.5},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        QuantizationAware(**arguments)


def test_a_normalization_folded_to_zero_can_be_trained_on():
    inputs = keras.Input((6, 6, 3))
    norm = L.BatchNormalization(gamma_initializer="zeros")
    model = keras.Model(inputs, norm(L.Conv2D(4, 3)(inputs)))
    data = zoo._normal(6, 6, 6, 3)
    compressor = QuantizationAware()
    prepared = compressor.prepare(model)
    prepared(data, training=True)
    final = compressor.finalize(prepared)
    zoo.train(final, data)
    assert all(np.isfinite(w).all() for w in final.get_weights())


def test_a_grid_that_later_steps_leave_is_dropped():
    model, inputs = zoo.mlp()
    _, _, final = quantized(model, inputs)
    clustered = WeightClustering(3).apply(final, lambda m, c: zoo.train(m, inputs, callbacks=c))
    for layer in clustered.layers:
        if isinstance(layer, L.Dense):
            grid = layer.kernel_constraint
            assert grid is None or grid.holds(np.asarray(layer.kernel))
    assert QuantizedGrid([0.5]).holds(np.array([[1.0, -0.5]], "float32"))
    assert not QuantizedGrid([0.5]).holds(np.array([[1.0, -0.6]], "float32"))


def test_integer_inputs_are_not_rounded():
    model = keras.Sequential([keras.Input((4,), dtype="int32"), L.Dense(3)])
    compressor = QuantizationAware()
    prepared = compressor.prepare(model)
    x = np.array([[1000, -3, 7, 2], [5, 400, 0, 1]])
    prepared(x, training=True)
    wanted = np.asarray(model(x))
    np.testing.assert_allclose(compressor.finalize(prepared)(x), wanted, atol=0.02 * np.abs(wanted).max())


def test_every_layer_is_in_the_report():
    inputs = keras.Input((6,))
    x = L.ELU(name="elu")(L.Rescaling(2.0, name="rescaling")(L.Dense(4, name="dense")(inputs)))
    compressor = QuantizationAware()
    compressor.prepare(keras.Model(inputs, x))
    assert {row.layer: row.status for row in compressor.report()} == {
        "dense": "int8",
        "rescaling": "float",
        "elu": "float",
    }


def test_the_parts_of_a_separable_convolution_go_by_its_name():
    model = keras.Sequential([keras.Input((6, 6, 2)), L.SeparableConv2D(4, 3, name="sep"), L.Conv2D(2, 1, name="c")])
    method = QuantizationAware(include=("sep",))
    method.prepare(model)
    status = {row.layer: row.status for row in method.report()}
    assert status["sep_depthwise"] == status["sep_pointwise"] == "int8" and status["c"] == "float"
    narrow = PostTrainingQuantization(np.ones((4, 6, 6, 2), "float32"), bits={"sep": 4, "c": 6})
    final = narrow.apply(model)
    assert {row.layer: row.note for row in narrow.report()}["sep_pointwise"].endswith("4 bits")
    for name in ("sep_depthwise", "sep_pointwise"):
        layer = final.get_layer(name)
        assert getattr(layer, surgery.constraint_name(layer, "kernel")).bits == 4
    with pytest.raises(ValueError, match="'spe', which matches no layer"):
        PostTrainingQuantization(np.ones((4, 6, 6, 2), "float32"), bits={"spe": 4}).prepare(model)


def own(x):
    return x * keras.ops.sigmoid(x)


@pytest.mark.parametrize("make", [QuantizationAware, lambda: PostTrainingQuantization(np.ones((4, 6), "float32"))])
def test_activations_that_are_layers_or_functions_of_the_user(make, tmp_path):
    inputs = keras.Input((6,))
    x = L.Dense(5, activation=L.LeakyReLU(0.2), name="leaky")(inputs)
    x = L.Dense(5, activation=own, name="own")(x)
    method = make()
    prepared = method.prepare(keras.Model(inputs, L.Dense(2)(x)))
    prepared(np.ones((4, 6), "float32"), training=True)
    final = method.finalize(prepared)
    path = convert(final, tmp_path / "m.tflite", quantization="int8-qat")
    assert verify(final, path, np.full((1, 6), 0.5, "float32")).ok(max_steps=4)
    notes = [row.note for row in method.report() if row.layer.startswith(("leaky_activation", "own_activation"))]
    assert len(notes) == 2 and "LeakyReLU" in notes[0] and all("no integer" in note for note in notes)
