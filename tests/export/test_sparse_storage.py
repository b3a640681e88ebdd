import keras
import numpy as np
import pytest

from tfkit.compression.block_pruning import BlockPruning
from tfkit.export import convert
from tfkit.export.runner import Runner
from tfkit.export.sparse_storage import SparsifyError, sparsify, sparsify_bytes, zero_blocks


def network(block):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(64), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    return BlockPruning(0.8, block, schedule="constant").apply(model)


X = np.random.default_rng(0).normal(size=(40, 64)).astype("float32")


@pytest.mark.parametrize(("quantization", "block"), [("float32", 4), ("dynamic", 16), ("int8", 16)])
def test_sparse_files_compute_what_dense_ones_do(tmp_path, quantization, block):
    model = network((1, block))
    calibration = X if quantization == "int8" else None
    dense = convert(model, tmp_path / "d.tflite", quantization=quantization, calibration=calibration)
    result = sparsify(dense, tmp_path / "s.tflite")
    assert len(result.tensors) == 3  # A tiny weight stays float in a "dynamic" file, and 1x16 blocks are 1x4 ones too.
    assert result.size_bytes == result.path.stat().st_size < result.dense_bytes
    expected, got = Runner(dense, xnnpack=False)(X), Runner(result.path)(X)
    # One int8 step of the output, or float rounding; a block at the wrong place gives errors of the output's size.
    step = np.ptp(expected) / 255 if quantization != "float32" else 1e-6
    assert np.abs(got - expected).max() <= 1.01 * step


def test_the_converters_own_sparse_float_file_is_as_large(tmp_path):
    model = network((1, 4))
    theirs = convert(model, tmp_path / "c.tflite", sparse=True)
    ours = sparsify(convert(model, tmp_path / "d.tflite"), tmp_path / "s.tflite")
    assert abs(ours.size_bytes - theirs.stat().st_size) < 300
    np.testing.assert_allclose(Runner(ours.path)(X), Runner(theirs)(X), atol=1e-6)


def test_dense_weights_stay(tmp_path):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    dense = convert(model, tmp_path / "d.tflite")
    result = sparsify(dense, tmp_path / "s.tflite")
    assert result.tensors == () and result.path.read_bytes() == dense.read_bytes()
    with pytest.raises(FileExistsError, match="force"):
        sparsify(dense, tmp_path / "s.tflite")


def test_share_of_zero_blocks():
    values = np.ones((2, 8), np.float32)
    values[0, :4] = 0
    values[1, 1:4] = 0  # Three of four: not a block.
    assert zero_blocks(values, 4) == 0.25
    assert zero_blocks(values[:, :6], 4) == 0.0


def test_damaged_files_are_refused(tmp_path):
    content = convert(network((1, 4)), tmp_path / "d.tflite").read_bytes()
    for cut in (100, 1000, len(content) // 2):
        (tmp_path / "bad.tflite").write_bytes(content[:cut])
        with pytest.raises((SparsifyError, ValueError)):
            sparsify(tmp_path / "bad.tflite", tmp_path / "out.tflite")
    assert not (tmp_path / "out.tflite").exists()


def test_bytes_repeat(tmp_path):
    content = convert(network((1, 4)), tmp_path / "d.tflite").read_bytes()
    assert sparsify_bytes(content) == sparsify_bytes(content)
