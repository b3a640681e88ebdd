"""Narrow and mixed files: the same weights, outputs to a step, and what each operation got."""

import importlib.util
import struct

import keras
import numpy as np
import pytest

from tfkit.compression import NoEffectWarning, QuantizationAware
from tfkit.export import RunnerError, convert, mixed_precision, narrow_weights
from tfkit.export.mixed_precision import common_steps, pack_integers
from tfkit.export.packing.flatbuffer import weight_buffers
from tfkit.export.runner import Runner

L = keras.layers
X = np.random.default_rng(0).normal(size=(12, 8, 8, 3)).astype("float32")
quantizer = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_quantizer") is None, reason="needs the package ai-edge-quantizer"
)


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = L.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    return keras.Model(inputs, L.Dense(9, name="dense")(L.Flatten()(x)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A float file and int8 files with weights of 2, 4 and 8 bits."""
    folder = tmp_path_factory.mktemp("mixed")
    model = network()
    made = {"float": convert(model, folder / "float.tflite")}
    for bits in (2, 4, 8):
        compressor = QuantizationAware(bits=bits)
        prepared = compressor.prepare(model)
        prepared(X, training=True)
        final = compressor.finalize(prepared)
        made[bits] = convert(final, folder / f"int{bits}.tflite", quantization="int8-qat", io="int8")
    return made


def unpack(data, bits, count):
    """The integers in packed bytes, by a loop."""
    values = []
    for byte in data:
        for shift in range(0, 8, bits):
            value = (byte >> shift) & (2**bits - 1)
            values.append(value - 2**bits if value >= 2 ** (bits - 1) else value)
    return np.array(values[:count])


def weights_of(path):
    """Returns (values, bytes, dtype) of each weight of more than one axis, by shape."""
    content = path.read_bytes()
    interpreter = Runner(path, xnnpack=False).interpreter
    found = {}
    for buffer in weight_buffers(content, smallest=16):
        if len(buffer.shape) < 2:
            continue
        detail = next(d for d in interpreter.get_tensor_details() if d["name"] == buffer.name)
        scales, axis = (detail["quantization_parameters"][key] for key in ("scales", "quantized_dimension"))
        bits = {"int8": 8, "int4": 4, "int2": 2}[buffer.dtype]
        raw = content[buffer.start : buffer.start + buffer.size]
        integers = unpack(raw, bits, int(np.prod(buffer.shape))).reshape(buffer.shape)
        along = [-1 if i == axis and scales.size > 1 else 1 for i in range(len(buffer.shape))]
        found[buffer.shape] = (integers * scales.reshape(along), buffer.size, buffer.dtype, buffer.start)
    return found


@pytest.mark.parametrize("bits", [2, 4])
def test_integers_are_packed_low_bits_first(bits):
    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 37).astype(np.int8)
    packed = pack_integers(values, bits)
    assert packed.size == -(-37 * bits // 8)
    np.testing.assert_array_equal(unpack(packed.tolist(), bits, 37), values)


def test_common_steps():
    columns = np.array([[36, 0, 126, 5], [-54, 0, 18, -7], [18, 0, 0, 1]], np.int8)
    np.testing.assert_array_equal(common_steps(columns, 4), [9, 1, 18, 1])
    np.testing.assert_array_equal(common_steps(columns, 3), [18, 1, 0, 0])
    np.testing.assert_array_equal(common_steps(columns, 8), [1, 1, 1, 1])
    np.testing.assert_array_equal(common_steps(np.array([[-128]], np.int8), 2), [128])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("fast_only", [True, False])
def test_narrow_weights_are_the_same_weights(files, bits, fast_only, tmp_path):
    path = tmp_path / "narrow.tflite"
    rows = narrow_weights(files[bits], path, fast_only=fast_only)
    assert {row.operation: row.least_bits for row in rows} == {
        "CONV_2D": bits, "DEPTHWISE_CONV_2D": bits, "FULLY_CONNECTED": bits,
    }  # fmt: skip
    stored = {row.operation: row.bits for row in rows}
    convolution = 8 if fast_only else 4
    assert stored == {
        "CONV_2D": convolution, "DEPTHWISE_CONV_2D": convolution, "FULLY_CONNECTED": 4 if fast_only else bits,
    }  # fmt: skip
    assert all(bool(row.note) == (row.bits != bits) for row in rows)
    old, new = weights_of(files[bits]), weights_of(path)
    assert set(old) == set(new) == {row.shape for row in rows}
    for row in rows:
        values, size, dtype, start = new[row.shape]
        np.testing.assert_allclose(values, old[row.shape][0], rtol=1e-5, atol=1e-8)
        assert size == -(-values.size * row.bits // 8) and dtype == f"int{row.bits}" and start % 16 == 0
    (output,) = Runner(path).outputs.values()
    for xnnpack in (True, False):
        wanted, found = (Runner(file, xnnpack=xnnpack)(X) for file in (files[bits], path))
        # A layer's output may move by a step where its bias did; two more layers follow.
        assert np.abs(found - wanted).max() <= 3.01 * output["quantization"][0]
        assert np.mean(found != wanted) < 0.5


def test_narrow_biases_have_the_scale_the_kernels_prescribe(files, tmp_path):
    path = tmp_path / "narrow.tflite"
    narrow_weights(files[4], path, fast_only=False)
    interpreter = Runner(path, xnnpack=False).interpreter
    details = {d["index"]: d["quantization_parameters"]["scales"] for d in interpreter.get_tensor_details()}
    checked = 0
    for operation in interpreter._get_ops_details():
        if len(operation["inputs"]) == 3 and operation["inputs"][2] >= 0:
            x, weight, bias = (details[index] for index in operation["inputs"])
            np.testing.assert_allclose(np.broadcast_to(x * weight, bias.shape), bias, rtol=1e-4)
            checked += 1
    assert checked >= 2


def test_eight_bits_stay_and_that_is_said(files, tmp_path):
    path = tmp_path / "same.tflite"
    with pytest.warns(NoEffectWarning, match="no weights were narrowed"):
        rows = narrow_weights(files[8], path)
    assert {row.bits for row in rows} == {8}
    np.testing.assert_array_equal(Runner(path)(X), Runner(files[8])(X))
    with pytest.warns(NoEffectWarning, match="no int8 weights"):
        narrow_weights(files["float"], path, force=True)
    with pytest.raises(FileExistsError):
        narrow_weights(files[4], path)


def test_damaged_files_are_refused(files, tmp_path):
    content = files[4].read_bytes()
    bad = tmp_path / "bad.tflite"
    rng = np.random.default_rng(0)
    pieces = [content[: len(content) // 2], b"nothing", b"", content[:8] + bytes(len(content) - 8)]
    pieces.append(struct.pack("<I", 2**31) + content[4:])
    for piece in pieces:
        bad.write_bytes(piece)
        for function in (narrow_weights, lambda *a: mixed_precision(*a, "int8-dynamic")):
            with pytest.raises(RunnerError):
                function(bad, tmp_path / "out.tflite")
    for _ in range(30):  # Whatever the damage, an error of ours or a file that loads.
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 4):
            damaged[at] = rng.integers(0, 256)
        bad.write_bytes(bytes(damaged))
        try:
            narrow_weights(bad, tmp_path / "out.tflite", force=True)
        except RunnerError:
            continue
        Runner(tmp_path / "out.tflite")
    with pytest.raises(FileNotFoundError):
        narrow_weights(files[4], tmp_path / "none" / "out.tflite")


@quantizer
@pytest.mark.parametrize("precision", ["int8", "int4", "int8-dynamic", "int4-dynamic", "int8-weights", "int4-weights"])
def test_one_precision_for_all(files, precision, tmp_path):
    path = tmp_path / "mixed.tflite"
    static = precision in ("int8", "int4")
    rows = mixed_precision(files["float"], path, precision, calibration=X if static else None)
    given = {row.operation: row.given for row in rows if row.weight_bytes}
    # The package has no int4 form of a depthwise convolution.
    wide = precision.replace("int4", "int8")
    assert given == {"CONV_2D": precision, "DEPTHWISE_CONV_2D": wide, "FULLY_CONNECTED": precision}
    assert all(row.asked == precision for row in rows)
    wanted = Runner(files["float"])(X)
    error = np.sqrt(np.mean(np.square(Runner(path)(X) - wanted))) / wanted.std()
    assert 0 < error < (0.3 if "int4" in precision else 0.03)
    assert path.stat().st_size < files["float"].stat().st_size


@quantizer
def test_patterns_choose_by_name_kind_and_place(files, tmp_path):
    path = tmp_path / "mixed.tflite"
    rows = mixed_precision(files["float"], path, {"conv": "float32", "DEPTHWISE*": "int8-weights", "*": "int4-dynamic"})
    weighted = {row.operation: row for row in rows if row.weight_bytes}
    assert {kind: row.given for kind, row in weighted.items()} == {
        "CONV_2D": "float32",
        "DEPTHWISE_CONV_2D": "int8-weights",
        "FULLY_CONNECTED": "int4-dynamic",
    }
    place = weighted["FULLY_CONNECTED"].place
    rows = mixed_precision(files["float"], path, {f"#{place}": "int8-weights"}, force=True)
    assert [row.place for row in rows if row.given != "float32"] == [place]
    sizes = {buffer.shape: buffer.dtype for buffer in weight_buffers(path.read_bytes()) if len(buffer.shape) > 1}
    assert sorted(sizes.values()) == ["float32", "float32", "int8"]


@quantizer
def test_bad_arguments_of_mixed_precision(files, tmp_path):
    path = tmp_path / "mixed.tflite"
    with pytest.raises(ValueError, match="precision"):
        mixed_precision(files["float"], path, "int3")
    with pytest.raises(ValueError, match="`calibration` must hold"):
        mixed_precision(files["float"], path, "int8")
    with pytest.raises(ValueError, match="calibration"):
        mixed_precision(files["float"], path, "int8", calibration=X * np.nan)
    with pytest.warns(NoEffectWarning):
        mixed_precision(files["float"], path, {"nothing": "int8"})
    assert path.read_bytes() == files["float"].read_bytes()
