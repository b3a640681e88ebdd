import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression.block_pruning import BlockPruning, NMPruning, block_mask, blocks_of, nm_mask
from tfkit.export import convert
from tfkit.export.runner import Runner


def dense_model(inputs=48, units=20):
    return keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(units)])


@pytest.mark.parametrize("block", [(1, 4), (1, 16), (4, 1), (2, 3)])
def test_every_block_is_kept_or_dropped_whole(block):
    kernel = np.random.default_rng(0).normal(size=(48, 20)).astype("float32")
    mask = block_mask(kernel, 0.7, block)
    tflite = mask.T.reshape(20 // block[0], block[0], 48 // block[1], block[1])  # (outputs, inputs), as in the file.
    sums = tflite.sum(axis=(1, 3))
    assert set(np.unique(sums)) == {0, block[0] * block[1]}
    assert np.sum(sums == 0) == round(0.7 * sums.size)
    means = np.abs(kernel).T.reshape(tflite.shape).mean(axis=(1, 3))
    assert means[sums == 0].max() <= means[sums > 0].min()


def test_blocks_at_the_edge_count_what_they_have():
    np.testing.assert_allclose(blocks_of(np.ones((6, 3)), (2, 4)), np.ones((2, 2)))
    mask = block_mask(np.arange(1, 19).reshape(6, 3), 0.5, (2, 4))
    assert mask.shape == (6, 3) and mask[:4].sum() == 0 and mask[4:].sum() == 6


def test_blocks_of_one_are_magnitude_pruning():
    from tfkit.compression.pruning import magnitude_mask

    kernel = np.random.default_rng(0).normal(size=(7, 5))
    np.testing.assert_array_equal(block_mask(kernel, 0.6, (1, 1)), magnitude_mask(kernel, 0.6))


def test_training_reaches_the_share_and_the_file_is_sparse(tmp_path):
    pruning = BlockPruning(0.9, frequency=1)
    model = dense_model(64, 64)
    x = np.random.default_rng(0).normal(size=(6, 64)).astype("float32")
    final = pruning.apply(model, lambda m, callbacks: zoo.train(m, x, steps=4, callbacks=callbacks))
    kernel = np.asarray(final.layers[-1].kernel)
    assert np.sum(~kernel.T.reshape(64, 16, 4).any(-1)) == round(0.9 * 1024)
    assert np.count_nonzero(kernel) == 4096 - 4 * round(0.9 * 1024)
    path = convert(final, tmp_path / "m.tflite", sparse=True)
    np.testing.assert_allclose(Runner(path)(x), final(x), atol=1e-5)
    operations = [op["op_name"] for op in Runner(path).interpreter._get_ops_details()]
    assert "DENSIFY" not in operations  # Blocks along the other axis would be unpacked at load.


def test_only_dense_layers_are_touched():
    model, _ = zoo.convolutions()
    with pytest.warns(UserWarning, match="changed nothing"):
        BlockPruning(0.5).prepare(model)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
@pytest.mark.parametrize("axis", [0, 2])
def test_exactly_n_of_each_group_stay(n, m, axis):
    weight = np.random.default_rng(0).normal(size=(24, 3, 16)).astype("float32")
    mask = np.moveaxis(nm_mask(weight, n, m, axis), axis, -1)
    groups = mask.reshape(-1, m)
    assert np.all(groups.sum(-1) == n)
    sizes = np.moveaxis(np.abs(weight), axis, -1).reshape(-1, m)
    for kept, size in zip(groups, sizes, strict=True):
        assert size[kept == 0].max() <= size[kept == 1].min()


def test_a_short_group_keeps_at_most_n():
    assert nm_mask(np.array([[1.0], [2], [3], [4], [5], [6], [7]]), 2, 4, 0).ravel().tolist() == [0, 0, 1, 1, 0, 1, 1]


def test_groups_run_along_the_inputs_of_each_layer():
    inputs = keras.Input((8, 8, 8))
    x = keras.layers.Conv2D(4, 3)(inputs)
    x = keras.layers.Conv2DTranspose(8, 3)(x)
    x = keras.layers.DepthwiseConv2D(3)(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    final = NMPruning(schedule="constant").apply(model)
    conv, transposed, depthwise, dense = [layer for layer in final.layers if layer.weights]
    for kernel, axis in ((conv.kernel, 2), (transposed.kernel, 3), (dense.kernel, 0)):
        groups = np.moveaxis(np.asarray(kernel), axis, -1).reshape(-1, 4)
        assert np.all(np.count_nonzero(groups, axis=-1) == 2)
    assert np.all(np.asarray(depthwise.kernel) != 0)


def test_gradual_groups_lose_one_weight_at_a_time():
    pruning = NMPruning(1, 4, begin=0.0, end=0.8, frequency=1)
    prepared = pruning.prepare(dense_model())
    shares = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: shares.append(
            float(np.mean(np.asarray(prepared.layers[-1].transforms["kernel"][0].mask)))
        )
    )
    x = np.random.default_rng(0).normal(size=(6, 48)).astype("float32")
    zoo.train(prepared, x, steps=10, callbacks=[*pruning.callbacks(), record])
    assert set(shares) == {1.0, 0.75, 0.5, 0.25} and shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockPruning(0.5, (4,)), "outputs, inputs"),
        (lambda: BlockPruning(0.5, (0, 4)), "at least 1"),
        (lambda: BlockPruning(90), "write 0.9"),
        (lambda: NMPruning(4, 4), "less than m"),
        (lambda: NMPruning(0, 4), "at least 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
