import keras
import pytest

from tfkit.compression.block_pruning import BlockPruning, NMPruning
from tfkit.compression.pruning import MagnitudePruning
from tfkit.compression.sparse_speed import sparsity_speed
from tfkit.export import convert
from tfkit.export.sparse_storage import sparsify


def network(width=64):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((width,)), keras.layers.Dense(64, name="fc")])


def blocks(share=0.9, block=(1, 4), width=64):
    return BlockPruning(share, block, schedule="constant").apply(network(width))


def unstructured():
    return MagnitudePruning(0.9, schedule="constant").apply(network())


@pytest.mark.parametrize(
    ("model", "quantization", "faster", "reason"),
    [
        (network, "float32", False, "few zeros"),
        (unstructured, "float32", False, "unstructured zeros give no speed"),
        (lambda: NMPruning(schedule="constant").apply(network()), "float32", False, "unstructured"),
        (blocks, "float32", True, "sparse kernel"),
        (lambda: blocks(0.5), "float32", False, "below about 75%"),
        (lambda: blocks(width=66), "float32", False, "multiple of 4"),
        (blocks, "dynamic", False, "below about 87%"),
        (lambda: blocks(block=(1, 16)), "dynamic", True, "1x16"),
        (lambda: blocks(block=(1, 16)), "int8", False, "XNNPACK's dense int8 one is faster"),
        (lambda: blocks(block=(4, 1)), "float32", False, "no blocks of 1x4"),
    ],
)
def test_verdicts_on_dense_layers(model, quantization, faster, reason):
    report = sparsity_speed(model(), quantization=quantization)
    (row,) = report.layers
    assert row.faster is report.faster is faster
    assert reason in row.reason
    assert row.reason in str(report)
    assert not row.stored_sparsely


def test_a_way_that_gains_is_named():
    assert "sparse=True" in sparsity_speed(blocks()).layers[0].remedy
    assert "sparsify" in sparsity_speed(blocks(block=(1, 16)), quantization="dynamic").layers[0].remedy
    assert "block=(1, 4)" in sparsity_speed(unstructured()).layers[0].remedy


@pytest.mark.parametrize(("quantization", "reason"), [("float32", "AVX"), ("int8", "does not exist")])
def test_convolutions_do_not_gain(quantization, reason):
    model = keras.Sequential([keras.Input((8, 8, 8)), keras.layers.Conv2D(8, 1)])
    (row,) = sparsity_speed(MagnitudePruning(0.9, schedule="constant").apply(model), quantization=quantization).layers
    assert not row.faster and reason in row.reason and "structured" in row.remedy


def test_prepared_models_count_their_masks():
    prepared = BlockPruning(0.9, schedule="constant").prepare(network())
    assert sparsity_speed(prepared).layers[0].zeros == pytest.approx(0.9, abs=0.001)


def test_verdicts_on_files(tmp_path):
    model = blocks()
    dense, sparse = convert(model, tmp_path / "d.tflite"), convert(model, tmp_path / "s.tflite", sparse=True)
    (row,) = sparsity_speed(dense).layers
    assert not row.faster and not row.stored_sparsely and "stores them densely" in row.reason
    assert row.zeros == pytest.approx(0.9, abs=0.001) and row.weights == 4096
    (row,) = sparsity_speed(sparse).layers
    assert row.faster and row.stored_sparsely and not row.remedy
    assert row.zeros == row.zero_blocks == pytest.approx(0.9, abs=0.001)


def test_unstructured_files_are_unpacked_at_load(tmp_path):
    (row,) = sparsity_speed(convert(unstructured(), tmp_path / "s.tflite", sparse=True)).layers
    assert not row.faster and row.stored_sparsely and row.operation == "FULLY_CONNECTED"
    assert row.zeros == pytest.approx(0.9, abs=0.001)


def test_sparse_convolution_files(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 16)), keras.layers.Conv2D(32, 1)])
    pruned = MagnitudePruning(0.9, schedule="constant").apply(model)
    (row,) = sparsity_speed(convert(pruned, tmp_path / "s.tflite", sparse=True)).layers
    assert row.operation == "CONV_2D" and row.stored_sparsely and not row.faster and "unpacked" in row.reason


def test_dynamic_files(tmp_path):
    dense = convert(blocks(block=(1, 16)), tmp_path / "d.tflite", quantization="dynamic")
    (row,) = sparsity_speed(dense).layers
    assert not row.faster and "sparsify" in row.remedy
    (row,) = sparsity_speed(sparsify(dense, tmp_path / "s.tflite").path).layers
    assert row.faster and row.stored_sparsely and row.zero_blocks == pytest.approx(0.9, abs=0.01)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="quantization"):
        sparsity_speed(network(), quantization="float16")
    content = convert(network(), tmp_path / "d.tflite").read_bytes()
    (tmp_path / "bad.tflite").write_bytes(content[: len(content) // 3])
    with pytest.raises(ValueError, match="bad.tflite"):
        sparsity_speed(tmp_path / "bad.tflite")
