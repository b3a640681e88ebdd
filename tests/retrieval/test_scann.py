"""ScaNN: what is ours around the package, and the layer over its TensorFlow operations."""

from __future__ import annotations

import builtins
import subprocess
import sys

import numpy as np
import pytest

from tfkit import retrieval
from tfkit.retrieval import NSW, Exact, IndexFileError, scann

needs_scann = pytest.mark.skipif(not scann.available(), reason="the package scann is not installed")


def vectors(count, dimension=12, seed=0):
    """Low-rank vectors with noise, as embeddings are."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(4, dimension))
    return (rng.normal(size=(count, 4)) @ basis + 0.3 * rng.normal(size=(count, dimension))).astype("float32")


def recall(index, queries, k=10, **effort):
    oracle = Exact().build(index.items).search(queries, k).ids
    return float((index.search(queries, k, **effort).ids[:, :, None] == oracle[:, None]).any(axis=1).mean())


@pytest.fixture(scope="module")
def tree():
    if not scann.available():
        pytest.skip("the package scann is not installed")
    return retrieval.ScaNN("tree", block=5).build(vectors(3000))


def test_what_is_looked_at_decides_what_is_found(tree):
    queries = vectors(100, seed=1)
    by_leaves = [recall(tree, queries, leaves=leaves, rescore=200) for leaves in (1, 5, 20, 55)]
    assert by_leaves == sorted(by_leaves) and by_leaves[0] < 0.8 and by_leaves[-1] > 0.97
    by_rescore = [recall(tree, queries, leaves=55, rescore=rescore) for rescore in (10, 30, 100)]
    assert by_rescore == sorted(by_rescore) and by_rescore[0] < by_rescore[-1] - 0.1


def test_scores_are_exact_and_sorted(tree):
    queries = vectors(50, seed=1)
    result = tree.search(queries, 10, leaves=3, rescore=20)
    again = np.einsum("qd,qkd->qk", queries, tree.items[result.ids])
    np.testing.assert_allclose(result.scores, again, rtol=1e-5, atol=1e-5)
    assert (np.diff(result.scores, axis=1) <= 0).all() and result.exact is None


def test_too_few_in_the_leaves_are_minus_one(tree):
    result = tree.search(vectors(5, seed=1), 2000, leaves=1, rescore=2500)
    missing = result.ids == -1
    assert missing.any(axis=1).all() and np.isneginf(result.scores[missing]).all()
    assert np.isfinite(result.scores[~missing]).all() and not missing[:, 0].any()


@pytest.mark.parametrize("effort", [{"leaves": 0}, {"rescore": 0}, {"leaves": 2.5}, {"leaves": 0, "rescore": 20}])
def test_efforts_out_of_range_are_refused(tree, effort):
    with pytest.raises(ValueError, match="leaves|rescore"):
        tree.search(vectors(2, seed=1), 5, **effort)


def test_more_is_looked_at_for_more_recall(tree):
    efforts = [tree.default_effort(10, wanted) for wanted in (0.5, 0.8, 0.95, 0.99)]
    assert [e["leaves"] for e in efforts] == sorted(e["leaves"] for e in efforts)
    assert [e["rescore"] for e in efforts] == sorted(e["rescore"] for e in efforts)
    assert tree.default_effort(10, 1.0)["leaves"] == tree._leaves
    assert recall(tree, vectors(100, seed=1)) > 0.9


@needs_scann
def test_the_structure_follows_the_number_of_items(monkeypatch):
    monkeypatch.setattr(scann, "TREE_ITEMS", 500)
    kinds = [retrieval.ScaNN().build(vectors(count))._kind for count in (100, 400, 600)]
    assert kinds == ["", "hashing", "tree"]
    assert retrieval.ScaNN().build(vectors(100)).search(vectors(2, seed=1), 3).exact.all()


@needs_scann
@pytest.mark.parametrize("block", [1, 2, 5, 16])
def test_codes_survive_a_file_whatever_their_width(block, tmp_path):
    index = retrieval.ScaNN("tree", block=block).build(vectors(600, 13))
    again = retrieval.ScaNN.load(index.save(tmp_path / "a.index"))
    expected, got = (one.search(vectors(20, 13, seed=1), 5, leaves=6, rescore=15) for one in (index, again))
    np.testing.assert_array_equal(expected.ids, got.ids)
    for name, array in index._arrays().items():
        np.testing.assert_array_equal(array, again._arrays()[name])


def test_a_file_with_another_tree_is_refused(tree):
    arrays = tree._arrays()
    for change in (
        {"leaf": arrays["leaf"] + 1}, {"leaf": -arrays["leaf"] - 1}, {"centres": arrays["centres"][:3]},
        {"centres": np.zeros((0, 12), np.float32)}, {"codes": arrays["codes"] + 16}, {"codes": arrays["codes"][:, 1:]},
        {"codebook": arrays["codebook"][1:]}, {"codebook": arrays["codebook"] * np.inf},
    ):  # fmt: skip
        damaged = retrieval.ScaNN("tree", block=5)
        damaged.items = tree.items
        with pytest.raises(IndexFileError, match="damaged"):
            damaged._restore({**arrays, **change})


@needs_scann
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"structure": "forest"}, "structure"),
        ({"clusters": 0}, "clusters"),
        ({"block": 17}, "block"),
        ({"threshold": 1}, "threshold"),
        ({"target_recall": 0}, "target_recall"),
    ],
)
def test_bad_settings(arguments, name):
    with pytest.raises(ValueError, match=name):
        retrieval.ScaNN(**arguments)


def test_without_the_package_the_default_is_a_graph_and_says_so(monkeypatch):
    monkeypatch.setattr(scann, "available", lambda: False)
    with pytest.warns(UserWarning, match="NSW"):
        index = retrieval.default_index(vectors(50))
    assert isinstance(index, NSW) and len(index) == 50

    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("scann"):
            raise ModuleNotFoundError("No module named 'scann'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(scann.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"tfkit\[retrieval\]"):
        retrieval.ScaNN()


@needs_scann
def test_the_default_is_scann():
    index = retrieval.default_index(vectors(50), target_recall=0.9)
    assert isinstance(index, retrieval.ScaNN) and index.target_recall == 0.9


@pytest.mark.parametrize(("count", "structure"), [(600, "tree"), (600, "hashing"), (300, "brute_force"), (40, "auto")])
def test_a_layer_gives_what_the_index_gives_and_a_saved_model_too(count, structure, tmp_path):
    pytest.importorskip("scann.scann_ops.py.scann_ops")
    import keras
    import tensorflow as tf

    index = retrieval.ScaNN(structure, block=3).build(vectors(count))
    tower = keras.Sequential([keras.Input((5,)), keras.layers.Dense(12)])
    effort = {"leaves": 4, "rescore": 20}
    for name in {"hashing": ["leaves"], "brute_force": ["leaves", "rescore"]}.get(structure, []):
        with pytest.raises(ValueError, match=name):
            index.as_layer(7, **effort)
        effort.pop(name)
    layer = index.as_layer(7, **effort)
    model = keras.Sequential([tower, layer])
    asked = np.random.default_rng(1).normal(size=(9, 5)).astype("float32")
    scores, ids = model.predict(asked, verbose=0)
    expected = index.search(tower.predict(asked, verbose=0), 7, **effort)
    np.testing.assert_array_equal(ids, expected.ids)
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-5, atol=1e-5)
    assert [tuple(output.shape) for output in model.outputs] == [(None, 7), (None, 7)]

    path = layer.export(model, tmp_path / "served")
    served = tf.saved_model.load(str(path)).signatures["serving_default"](tf.constant(asked))
    np.testing.assert_array_equal(served["ids"].numpy(), ids)
    with pytest.raises(FileExistsError, match="force"):
        layer.export(model, path)
    with pytest.raises(ValueError, match="contain this layer"):
        layer.export(tower, tmp_path / "other")
    with pytest.raises(NotImplementedError, match="index.save"):
        model.save(tmp_path / "model.keras")


def test_a_layer_gives_minus_one_where_fewer_are_found(tree):
    pytest.importorskip("scann.scann_ops.py.scann_ops")
    asked = vectors(5, seed=1)
    layer = tree.as_layer(2000, leaves=1, rescore=2500)
    scores, ids = (np.asarray(value) for value in layer(asked))
    # On one thread: the package ranks few leaves roughly, and otherwise so for another number of queries at once.
    expected = tree.search(asked, 2000, leaves=1, rescore=2500, threads=1)
    assert scores.shape == ids.shape == (5, 2000) and ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.sort(expected.ids))
    np.testing.assert_array_equal(np.isneginf(scores), ids == -1)
    assert (ids == -1).any(axis=1).all() and (np.diff((ids == -1).astype(int), axis=1) >= 0).all()


def test_two_layers_in_a_model_mixed_precision_and_an_empty_batch(tree, tmp_path):
    pytest.importorskip("scann.scann_ops.py.scann_ops")
    import keras
    import tensorflow as tf

    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs = keras.Input((5,))
        embedded = keras.layers.Dense(12)(inputs)
        first, second = tree.as_layer(3, leaves=9), retrieval.ScaNN().build(vectors(40)).as_layer(4)
        model = keras.Model(inputs, [*first(embedded), *second(embedded)])
    finally:
        keras.config.set_dtype_policy("float32")
    asked = np.random.default_rng(1).normal(size=(6, 5)).astype("float32")
    outputs = model(asked)
    assert [(tuple(o.shape), o.dtype.name) for o in outputs] == [
        ((6, 3), "float32"), ((6, 3), "int64"), ((6, 4), "float32"), ((6, 4), "int64"),
    ]  # fmt: skip
    half = keras.Model(inputs, embedded)(asked).numpy()
    assert half.dtype == np.float16
    np.testing.assert_array_equal(outputs[1], tree.search(half, 3, leaves=9).ids)
    assert first.name != second.name and tree.as_layer(3, name="answers").name == "answers"
    assert [tuple(o.shape) for o in model(asked[:0])] == [(0, 3), (0, 3), (0, 4), (0, 4)]

    one = keras.Model(inputs, first(embedded))
    served = tf.saved_model.load(str(first.export(one, tmp_path / "served"))).signatures["serving_default"]
    assert served(tf.zeros((0, 5)))["ids"].shape == (0, 3)


@needs_scann
@pytest.mark.parametrize("structure", ["tree", "hashing", "brute_force"])
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-60, 2.0**60, 2.0**122])
def test_a_layer_at_any_scale(structure, scale):
    pytest.importorskip("scann.scann_ops.py.scann_ops")
    items, asked = vectors(300), vectors(4, seed=1)
    index = retrieval.ScaNN(structure).build(items * np.float32(scale))
    layer = index.as_layer(5, **({} if structure == "brute_force" else {"rescore": 299}))
    truth = Exact().build(items).search(asked, 5)
    for factor in (1.0, 1 / scale, 2.0**-110, 2.0**120):
        scores, ids = layer(asked * np.float32(factor))
        assert np.mean(np.asarray(ids) == truth.ids) > 0.9
        with np.errstate(over="ignore", under="ignore"):
            expected = (truth.scores.astype(np.float64) * scale * factor).astype(np.float32)
        same = np.asarray(ids) == truth.ids
        np.testing.assert_allclose(np.asarray(scores)[same], expected[same], rtol=1e-4, atol=1e-44)


@needs_scann
def test_brute_force_proves_its_result_and_has_no_effort():
    index = retrieval.ScaNN("brute_force").build(vectors(300))
    assert index.efforts(5) == [{}] and index.search(vectors(3, seed=1), 5).exact.all()
    assert bool(index.search(vectors(1, seed=1)[0], 5).exact) is True


@needs_scann
def test_hashing_takes_no_leaves():
    index = retrieval.ScaNN("hashing").build(vectors(300))
    assert all(set(effort) == {"rescore"} for effort in index.efforts(5))
    with pytest.raises(ValueError, match="`leaves` must be left out"):
        index.search(vectors(2), 3, leaves=1)


def test_a_layer_checks_its_input(tree):
    pytest.importorskip("scann.scann_ops.py.scann_ops")
    import keras

    with pytest.raises(ValueError, match="queries"):
        tree.as_layer(3)(keras.Input((5,)))
    with pytest.raises(ValueError, match="`k`"):
        tree.as_layer(3001)


def test_the_family_needs_no_tensorflow():
    code = (
        "import sys, tfkit.retrieval; sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras', 'scann')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
