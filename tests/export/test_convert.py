"""Conversion: what goes in, what the file holds, and what is refused."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit.compression.base import NoEffectWarning
from tfkit.export import ConversionError, Runner, convert, tracing, verify
from tfkit.export.convert import collect_samples, explain
from tfkit.internal.files import write_atomically

L = keras.layers


def _weights_by_type(run: Runner) -> dict[str, int]:
    """Elements of constant tensors of at least two axes, by type."""
    counts: dict[str, int] = {}
    for d in run.interpreter.get_tensor_details():
        name = np.dtype(d["dtype"]).name
        counts[name] = counts.get(name, 0) + int(np.prod(d["shape"]))
    return counts


@pytest.mark.parametrize("quantization", ["float32", "float16", "dynamic", "int8"])
def test_quantizations_keep_the_function(tmp_path, quantization):
    rng = np.random.default_rng(1)
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(8, 3, activation="relu"), L.Flatten(), L.Dense(10)])
    x = rng.normal(size=(32, 8, 8, 3)).astype(np.float32)
    calibration = x if quantization == "int8" else None
    path = convert(model, tmp_path / "m.tflite", quantization=quantization, calibration=calibration)
    report = verify(model, path, x)
    kind = {"float32": "float32", "float16": "float16"}.get(quantization, "int8")
    assert kind in _weights_by_type(Runner(path))
    relative = report.max_abs_error / report.results[0].reference_max
    assert relative < {"float32": 1e-6, "float16": 2e-3, "dynamic": 0.05, "int8": 0.05}[quantization]
    assert (report.results[0].step is not None) == (quantization == "int8")


def test_sizes_fall_with_the_width_of_the_weights(tmp_path):
    model = keras.Sequential([keras.Input((64,)), L.Dense(256), L.Dense(64)])
    x = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    sizes = {}
    for quantization in ("float32", "float16", "dynamic", "int8"):
        calibration = x if quantization == "int8" else None
        path = convert(model, tmp_path / f"{quantization}.tflite", quantization=quantization, calibration=calibration)
        sizes[quantization] = path.stat().st_size
    assert sizes["float16"] < 0.55 * sizes["float32"]
    assert sizes["dynamic"] < 0.3 * sizes["float32"]
    assert sizes["int8"] < 0.3 * sizes["float32"]


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_integer_ends(small, io):
    run = Runner(small.files[f"{io}_io"])
    assert np.dtype(run.inputs["features"]["dtype"]).name == io
    assert np.dtype(run.outputs["scores"]["dtype"]).name == io
    np.testing.assert_array_equal(run(small.x).argmax(1), Runner(small.files["int8"])(small.x).argmax(1))


def test_names_and_order_of_several_inputs_and_outputs(tmp_path):
    rng = np.random.default_rng(0)
    late, early = keras.Input((4,), name="zeta"), keras.Input((3,), name="alpha")
    outputs = [L.Dense(2, name="z_out")(late), L.Dense(5, name="a_out")(L.Concatenate()([late, early]))]
    model = keras.Model([late, early], outputs)
    data = [rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)]
    path = convert(model, tmp_path / "m.tflite", quantization="int8", calibration=data)
    run = Runner(path)
    assert list(run.inputs) == ["zeta", "alpha"]
    assert list(run.outputs) == ["z_out", "a_out"]
    by_list, by_name = run(data), run({"alpha": data[1], "zeta": data[0]})
    np.testing.assert_array_equal(by_list["a_out"], by_name["a_out"])
    assert verify(model, path, data).ok(max_steps=3)


def test_dictionaries_in_and_out(tmp_path):
    a, b = keras.Input((2,), name="p"), keras.Input((3,), name="q")
    model = keras.Model({"p": a, "q": b}, {"sum": L.Dense(2)(a), "other": L.Dense(4)(b)})
    x = {"p": np.ones((3, 2), np.float32), "q": np.ones((3, 3), np.float32)}
    path = convert(model, tmp_path / "m.tflite")
    assert set(Runner(path).inputs) == {"p", "q"}
    assert set(Runner(path).outputs) == {"sum", "other"}
    assert verify(model, path, x).ok(atol=1e-6)


def test_outputs_that_equal_each_other_or_the_input(tmp_path):
    inputs = keras.Input((3,), name="x")
    doubled = L.Rescaling(2.0)(inputs)
    model = keras.Model(inputs, {"same": inputs, "one": doubled, "two": doubled})
    x = np.float32([[1, 2, 3]])
    got = Runner(convert(model, tmp_path / "m.tflite")).run(x)
    np.testing.assert_array_equal(got["same"], x)
    np.testing.assert_array_equal(got["one"], 2 * x)
    np.testing.assert_array_equal(got["two"], 2 * x)


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [("in", "in_"), ("self", "self_"), ("_x", "input_x"), ("\u03b1", "input_"), ("1st", "1st"), ("a-b", "a_b")],
)
def test_names_that_no_argument_may_have_do_not_mix_outputs_up(name, cleaned, tmp_path):
    inputs = keras.Input((3,), name=name)
    first = L.Dense(3, activation="relu")(inputs)
    model = keras.Model(inputs, {"x": first, "i": inputs, "y": L.Dense(3)(first)})
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    path = convert(model, tmp_path / "m.tflite")
    run = Runner(path)
    assert list(run.inputs) == [cleaned] and list(run.outputs) == ["x", "i", "y"]
    np.testing.assert_array_equal(run.run(x)["i"], x)
    assert verify(model, path, x).ok(atol=1e-6)


def test_double_precision_is_written_in_single(tmp_path):
    inputs = keras.Input((3,), dtype="float64")
    hidden = L.Dense(4, activation="relu", dtype="float64")(inputs)
    model = keras.Model(inputs, L.Dense(2, dtype="float64")(hidden))
    x = np.random.default_rng(0).normal(size=(5, 3))
    path = convert(model, tmp_path / "m.tflite")
    assert verify(model, path, x).ok(atol=1e-6)


@pytest.mark.parametrize(
    "layers",
    [
        [L.Conv1D(3, 2), L.Conv1DTranspose(2, 2)],
        [L.SeparableConv1D(3, 2), L.DepthwiseConv1D(2)],
        [L.LSTM(4, return_sequences=True), L.GRU(3)],
        [L.Bidirectional(L.LSTM(2))],
        [L.LayerNormalization(), L.Dense(4, activation="gelu")],
        [L.EinsumDense("abc,cd->abd", output_shape=(None, 4))],
    ],
    ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
)
@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_layers_over_time_agree(tmp_path, layers, quantization):
    keras.utils.set_random_seed(3)
    layers = [type(layer).from_config(layer.get_config()) for layer in layers]
    model = keras.Sequential([keras.Input((6, 8)), *layers])
    x = np.random.default_rng(0).normal(size=(16, 6, 8)).astype(np.float32)
    calibration = x if quantization == "int8" else None
    path = convert(model, tmp_path / "m.tflite", quantization=quantization, calibration=calibration)
    report = verify(model, path, x)
    largest = max(r.max_abs_error / r.reference_max for r in report.results)
    # Calibrated int8 loses what the model's inner ranges cost; float must agree to its rounding.
    assert largest < (0.08 if quantization == "int8" else 1e-6), largest
    assert not any(getattr(layer, "unroll", False) for layer in model._flatten_layers())  # put back as it was


def test_attention_and_embedding_agree(tmp_path):
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    h = L.Embedding(11, 8)(tokens)
    h = L.MultiHeadAttention(2, 4)(h, h)
    model = keras.Model(tokens, L.Dense(3)(L.GlobalAveragePooling1D()(h)))
    x = np.random.default_rng(0).integers(0, 11, (12, 5)).astype(np.int32)
    path = convert(model, tmp_path / "m.tflite")
    assert np.dtype(Runner(path).inputs["tokens"]["dtype"]) == np.int32
    assert verify(model, path, x).ok(atol=1e-6)
    assert verify(model, convert(model, tmp_path / "q.tflite", quantization="int8", calibration=x), x).ok(max_steps=6)


def test_other_sources_give_the_same_file_function(small, tmp_path):
    import tf_keras

    small.model.save(tmp_path / "m.keras")
    small.model.export(tmp_path / "saved", verbose=False)
    legacy = tf_keras.Sequential(
        [tf_keras.layers.Dense(32, activation="relu", input_shape=(6,)), tf_keras.layers.Dense(3)]
    )
    legacy.set_weights(small.model.get_weights())
    for name, source in {"keras": tmp_path / "m.keras", "saved": str(tmp_path / "saved"), "legacy": legacy}.items():
        got = Runner(convert(source, tmp_path / f"{name}.tflite"))(small.x)
        np.testing.assert_allclose(got, small.expected, atol=1e-5, err_msg=name)
    assert verify(legacy, tmp_path / "legacy.tflite", small.x).ok(atol=1e-6)
    path = convert(tmp_path / "saved", tmp_path / "q.tflite", quantization="int8", calibration=small.x, batch_size=4)
    assert Runner(path).batch_size == 4
    assert verify(small.model, path, small.x).ok(max_steps=4)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = L.Dense(3)

    def call(self, x):
        return self.dense(x) * 2.0


def test_subclassed_models(tmp_path):
    model = Subclassed()
    with pytest.raises(ValueError, match="must be built"):
        convert(model, tmp_path / "m.tflite")
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    model(x)
    assert verify(model, convert(model, tmp_path / "m.tflite"), x).ok(atol=1e-6)
    named = convert(model, tmp_path / "n.tflite", signature=tf.TensorSpec((None, 5), tf.float32, name="given"))
    assert list(Runner(named).inputs) == ["given"]


def test_open_axes_are_refused_unless_given(tmp_path):
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, L.GlobalAveragePooling1D()(inputs))
    with pytest.raises(ValueError, match="every axis but the first fixed"):
        convert(model, tmp_path / "m.tflite")
    path = convert(model, tmp_path / "m.tflite", signature=tf.TensorSpec((None, 7, 4), tf.float32))
    assert Runner(path).inputs.popitem()[1]["shape"].tolist() == [1, 7, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int4"}, "quantization"),
        ({"quantization": "int8"}, "calibration"),
        ({"quantization": "dynamic", "calibration": np.zeros((1, 6))}, "calibration"),
        ({"quantization": "float16", "io": "int8"}, "io"),
        ({"quantization": "dynamic", "sparse": True}, "fail to load"),
        ({"quantization": "float16", "sparse": True}, "sparse"),
        ({"quantization": "int8", "sparse": True, "calibration": np.zeros((1, 6))}, "sparse"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_that_break_their_rule(small, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        convert(small.model, tmp_path / "m.tflite", **settings)
    assert not list(tmp_path.iterdir())


def test_things_that_are_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"builtins\.int"):
        convert(3, tmp_path / "m.tflite")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(tmp_path / "none.keras", tmp_path / "m.tflite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"saved_model\.pb"):
        convert(tmp_path / "folder", tmp_path / "m.tflite")


def test_existing_files_are_kept_without_force(small, tmp_path):
    target = tmp_path / "m.tflite"
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="force=True"):
        convert(small.model, target)
    assert target.read_bytes() == b"precious"
    convert(small.model, target, force=True)
    assert target.read_bytes() == small.files["float32"].read_bytes()  # and conversion repeats to the byte
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_sparse_float_files_are_smaller_and_exact(tmp_path):
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((64,)), L.Dense(64)])
    kernel = rng.normal(size=(64, 64)) * (rng.random((64, 64)) < 0.05)
    model.layers[0].set_weights([kernel, np.zeros(64)])
    dense, sparse = convert(model, tmp_path / "d.tflite"), convert(model, tmp_path / "s.tflite", sparse=True)
    assert sparse.stat().st_size < 0.3 * dense.stat().st_size
    assert verify(model, sparse, rng.normal(size=(20, 64)).astype(np.float32)).ok(atol=1e-6)


def test_missing_operations_are_named(tmp_path):
    inputs = keras.Input((4, 4))
    model = keras.Model(inputs, L.Lambda(lambda x: tf.linalg.cholesky(x))(inputs))
    with pytest.raises(ConversionError, match="Cholesky.*Replace"):
        convert(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_loops_are_refused_before_they_kill_the_calibrator(tmp_path):
    inputs = keras.Input((4,))
    loop = L.Lambda(lambda x: tf.while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, v * 2.0), (0, x))[1])
    model = keras.Model(inputs, loop(inputs))
    x = np.ones((4, 4), np.float32)
    with pytest.raises(ConversionError, match="loop"):
        convert(model, tmp_path / "m.tflite", quantization="int8", calibration=x)
    np.testing.assert_array_equal(Runner(convert(model, tmp_path / "m.tflite"))(x), 8 * x)


def test_quantization_without_effect_is_said(tmp_path):
    model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    for quantization in ("dynamic", "int8-qat"):
        with pytest.warns(NoEffectWarning, match="changed nothing"):
            convert(model, tmp_path / f"{quantization}.tflite", quantization=quantization)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, tmp_path / "half.tflite", quantization="float16")


@pytest.mark.parametrize("form", ["array", "list", "dict", "dataset", "pairs", "generator"])
def test_calibration_forms_give_the_same_samples(form):
    x = np.arange(24, dtype=np.float32).reshape(12, 2)
    spec = {"x": tf.TensorSpec((1, 2), tf.float32)}
    dataset = tf.data.Dataset.from_tensor_slices(x)
    data = {
        "array": x,
        "list": [x],
        "dict": {"x": x},
        "dataset": dataset.batch(5),
        "pairs": tf.data.Dataset.zip(dataset, dataset).batch(5),
        "generator": (x[i : i + 4] for i in range(0, 12, 4)),
    }[form]
    np.testing.assert_array_equal(collect_samples(data, spec, 100, seed=0)["x"], x)


def test_calibration_is_limited_and_repeats_by_seed():
    x = np.arange(100, dtype=np.float32)[:, None]
    spec = {"x": tf.TensorSpec((1, 1), tf.float32)}
    a, b, c = (collect_samples(x, spec, 20, seed)["x"] for seed in (1, 1, 2))
    assert len(np.unique(a)) == 20
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((3, 5)), "shape"),
        (np.full((3, 2), np.nan), "finite"),
        (np.zeros((0, 2)), "shape"),
        ({"y": np.zeros((3, 2))}, "name the inputs"),
        (iter(()), "at least one batch"),
    ],
)
def test_calibration_that_does_not_fit(data, message):
    with pytest.raises(ValueError, match=message):
        collect_samples(data, {"x": tf.TensorSpec((1, 2), tf.float32)}, 10, seed=0)


class _Grid(keras.constraints.Constraint):
    def __init__(self, scale):
        self.scale = np.atleast_1d(np.float32(scale))

    def __call__(self, w):
        return w


@keras.saving.register_keras_serializable(package="tfkit_tests")
class FakeQuant(L.Layer):
    """The activations of QAT, with a range that has zero on its grid."""

    def __init__(self, step=1 / 16, **kwargs):
        super().__init__(**kwargs)
        self.step = step

    def call(self, x):
        return tf.quantization.fake_quant_with_min_max_vars(x, -128 * self.step, 127 * self.step)


QAT_CASES = {
    "conv per channel": lambda: L.Conv2D(4, 3, kernel_constraint=_Grid([0.004, 0.008, 0.012, 0.016])),
    "conv per tensor": lambda: L.Conv2D(4, 3, kernel_constraint=_Grid(0.013)),
    "depthwise per channel": lambda: L.DepthwiseConv2D(
        3, depth_multiplier=2, depthwise_constraint=_Grid(np.arange(1, 7) * 0.004)
    ),
    "depthwise per tensor": lambda: L.DepthwiseConv2D(3, depthwise_constraint=_Grid(0.013)),
    "dense per tensor": lambda: L.Dense(4, kernel_constraint=_Grid(0.013)),
}


@pytest.mark.parametrize("case", QAT_CASES)
def test_qat_grids_reach_the_file_to_the_integer(tmp_path, case):
    """The integers stay below 127, so that a converter that takes max|w| / 127 by itself fails."""
    rng = np.random.default_rng(0)
    layer = QAT_CASES[case]()
    inputs = keras.Input((5, 5, 3))
    model = keras.Model(inputs, FakeQuant()(layer(FakeQuant()(inputs))))
    depthwise = isinstance(layer, L.DepthwiseConv2D)
    scale = (layer.depthwise_constraint if depthwise else layer.kernel_constraint).scale
    steps = rng.integers(-100, 101, layer.kernel.shape)
    by_channel = scale.reshape(3, 2) if depthwise and scale.size > 1 else scale
    layer.kernel.assign(steps * by_channel)
    layer.bias.assign(rng.normal(size=layer.bias.shape))
    path = convert(model, tmp_path / "m.tflite", quantization="int8-qat", io="int8")
    run = Runner(path)
    found = [d for d in run.interpreter.get_tensor_details() if d["name"] and _holds(run, d, steps)]
    assert len(found) == 1
    in_file = np.unique(np.float32(found[0]["quantization_parameters"]["scales"]))
    np.testing.assert_allclose(in_file, np.unique(scale), rtol=1e-6)
    x = rng.normal(size=(20, 5, 5, 3)).astype(np.float32)
    report = verify(model, path, x, kernels=("xnnpack", "builtin", "reference"))
    report.raise_if_different(max_steps=1, min_agreement=0.9)
    assert all(r.mean_abs_error / r.step < 0.02 for r in report.results)


def _holds(run: Runner, detail: dict, steps: np.ndarray) -> bool:
    if np.dtype(detail["dtype"]) != np.int8 or int(np.prod(detail["shape"])) != steps.size:
        return False
    return np.array_equal(np.sort(run.interpreter.get_tensor(detail["index"]).ravel()), np.sort(steps.ravel()))


def test_qat_dense_by_channel_where_the_grid_reaches_127(tmp_path):
    rng = np.random.default_rng(0)
    scale = np.float32([0.002, 0.004, 0.006, 0.008])
    layer = L.Dense(4, kernel_constraint=_Grid(scale))
    inputs = keras.Input((32,))
    model = keras.Model(inputs, FakeQuant()(layer(FakeQuant()(inputs))))
    steps = rng.integers(-127, 128, (32, 4))
    steps[0] = 127
    layer.kernel.assign(steps * scale)
    assert tracing.find_grids(model) == {}  # the converter refuses this one, and finds the same grid by itself
    run = Runner(convert(model, tmp_path / "m.tflite", quantization="int8-qat"))
    assert any(_holds(run, d, steps) for d in run.interpreter.get_tensor_details())
    x = rng.normal(size=(20, 32)).astype(np.float32)
    verify(model, tmp_path / "m.tflite", x).raise_if_different(max_steps=1)


def test_integer_ends_need_quantized_ends(tmp_path):
    inputs = keras.Input((40,))
    model = keras.Model(inputs, L.Dense(40)(inputs))
    with pytest.raises(ConversionError, match="fake-quantisation|io='float'"):
        convert(model, tmp_path / "m.tflite", quantization="int8-qat", io="int8")


def test_messages_of_the_converter_become_one_line():
    assert "Erf, Svd" in explain("...\nTF Select ops: Svd, Erf\nDetails:\n", "float32")
    assert "MyOp" in explain("error: 'tf.MyOp' op is neither a custom op nor a flex op\n", "float32")
    assert "no int8 form" in explain("RuntimeError: Failed to quantize: op X\n", "int8")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "m.tflite", b"abc")
    assert not list(tmp_path.iterdir())


def _dense() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (np.full((4, 5), 1e300), "finite"),
        (np.ones((4, 5)) + 1j, "numbers"),
        (np.array([[None] * 5]), "numbers"),
        (3, "arrays"),
    ],
)
def test_calibration_that_would_crash_the_converter_is_refused(tmp_path, calibration, message):
    with pytest.raises(ValueError, match=message):
        convert(_dense(), tmp_path / "m.tflite", quantization="int8", calibration=calibration)


def test_nan_weights_are_refused(tmp_path):
    model = _dense()
    model.layers[0].kernel.assign(np.full((5, 3), np.nan))
    with pytest.raises(ValueError, match="finite weights"):
        convert(model, tmp_path / "m.tflite")


def test_mixed_precision_models_are_written_in_float32(tmp_path):
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(4, 3, activation="relu", dtype="mixed_float16")(inputs)
    x = keras.layers.Dense(3, dtype="mixed_float16")(keras.layers.Flatten(dtype="mixed_float16")(x))
    model = keras.Model(inputs, x)
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype("float32")
    path = convert(model, tmp_path / "m.tflite")
    np.testing.assert_allclose(Runner(path)(x), np.asarray(model(x), "float32"), atol=0.02)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("z", "a", "m")])
def test_inputs_and_outputs_keep_the_models_order(names, tmp_path):
    inputs = [keras.Input((size + 2,), name=name) for size, name in enumerate(names)]
    joined = keras.layers.Concatenate()(inputs)
    outputs = [keras.layers.Dense(size + 1, name=f"out_{name}")(joined) for size, name in enumerate(reversed(names))]
    model = keras.Model(inputs, outputs)
    path = convert(model, tmp_path / "model.tflite")
    runner = Runner(path)
    assert tuple(runner.inputs) == names
    assert [int(detail["shape"][-1]) for detail in runner.outputs.values()] == list(range(1, len(names) + 1))
    x = [np.random.default_rng(0).normal(size=(4, size + 2)).astype("float32") for size in range(len(names))]
    verify(model, path, x).raise_if_different(atol=1e-5)
