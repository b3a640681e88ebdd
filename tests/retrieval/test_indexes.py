"""What every index promises, whatever its method."""

import hashlib
import json
import struct
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfkit import retrieval
from tfkit.retrieval import scann
from tfkit.retrieval.index_file import MAGIC, VERSION


class Case(NamedTuple):
    """How to make an index, and the effort at which it must find everything."""

    make: Any
    full: Any = lambda count: {}


#: A row or more for each class, named by it; the test below fails if one is missing.
CASES: dict[str, Case] = {
    "Exact": Case(retrieval.Exact),
    "NormScan": Case(retrieval.NormScan),
    "IVF": Case(retrieval.IVF, lambda count: {"probes": count}),
    "IVF with codes": Case(
        lambda: retrieval.IVF(code_bytes=3, clustering="euclidean"), lambda count: {"probes": count, "rescore": count}
    ),
    "GreedyMIPS": Case(retrieval.GreedyMIPS, lambda count: {"budget": count}),
    "PCATree": Case(retrieval.PCATree, lambda count: {"hamming": count}),
    "PCATree by leaves": Case(lambda: retrieval.PCATree(depth=3), lambda count: {"leaves": count}),
    "KDTree": Case(retrieval.KDTree),
    "KDTree of single items": Case(lambda: retrieval.KDTree(leaf_items=1), lambda count: {"leaves": count}),
    "SimpleLSH": Case(retrieval.SimpleLSH, lambda count: {"candidates": count}),
    "SimpleLSH of few bits": Case(lambda: retrieval.SimpleLSH(bits=5, seed=1), lambda count: {"candidates": count}),
    "NormRangingLSH": Case(retrieval.NormRangingLSH, lambda count: {"candidates": count}),
    "WedgeSampling": Case(retrieval.WedgeSampling, lambda count: {"candidates": count}),
    "DiamondSampling": Case(lambda: retrieval.DiamondSampling(seed=3), lambda count: {"candidates": count}),
    "NSW": Case(retrieval.NSW, lambda count: {"ef": count}),
    "NSW without a hierarchy": Case(
        lambda: retrieval.NSW(8, 30, space="euclidean", hierarchy=False, seed=1), lambda count: {"ef": count}
    ),
    "NSW by inner product": Case(lambda: retrieval.NSW(4, space="inner_product"), lambda count: {"ef": count}),
    "NSW by angle": Case(lambda: retrieval.NSW(space="angle"), lambda count: {"ef": count}),
}
if scann.available():
    CASES |= {
        "ScaNN": Case(retrieval.ScaNN, lambda count: {"rescore": count}),
        "ScaNN as a tree": Case(
            lambda: retrieval.ScaNN("tree", block=3, clusters=9), lambda count: {"leaves": 9, "rescore": count}
        ),
        "ScaNN by brute force": Case(lambda: retrieval.ScaNN("brute_force")),
    }
each = pytest.mark.parametrize("name", CASES)


def vectors(count, dimension=8, seed=0, skew=0.5):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dimension)) * np.exp(skew * rng.normal(size=(count, 1)))).astype("float32")


def truth(items, queries, k):
    """Scores and ids by NumPy in float64, the lower id first among equals."""
    scores = queries.astype(np.float64) @ items.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def check(result, items, queries, k):
    """The scores must be the best there are, and those of the ids, which must differ."""
    expected, _ = truth(items, queries, k)
    scale = np.linalg.norm(queries, axis=1, keepdims=True) * np.linalg.norm(items, axis=1).max() + 1e-30
    assert result.scores.dtype == np.float32 and result.ids.dtype == np.int64
    assert result.scores.shape == result.ids.shape == (len(queries), k)
    np.testing.assert_allclose(result.scores / scale, expected / scale, atol=2e-6)
    again = np.einsum("qd,qkd->qk", queries.astype(np.float64), items.astype(np.float64)[result.ids])
    np.testing.assert_allclose(result.scores / scale, again / scale, atol=2e-6)
    assert all(len(set(row)) == k for row in result.ids.tolist())


def test_every_class_has_a_row():
    public = {name for name in retrieval.__all__ if isinstance(getattr(retrieval, name), type)}
    indexes = {n for n in public if issubclass(getattr(retrieval, n), retrieval.Index)} - {"Index"}
    assert indexes - {"ScaNN"} == {name.split()[0] for name in CASES} - {"ScaNN"}


@each
@pytest.mark.parametrize(("count", "queries", "k"), [(1, 1, 1), (7, 3, 7), (300, 20, 10), (3000, 5, 100)])
def test_at_full_effort_it_finds_the_best(name, count, queries, k):
    items, asked = vectors(count), vectors(queries, seed=1)
    index = CASES[name].make().build(items)
    check(index.search(asked, k, **CASES[name].full(count)), items, asked, k)


@each
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_small_sets_of_any_kind(name, data):
    count, dimension = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    values = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0, -20.0, 1e-6])
    items = np.array(data.draw(st.lists(values, min_size=count * dimension, max_size=count * dimension)), np.float32)
    items = items.reshape(count, dimension)  # Duplicates and zero vectors are the rule.
    query = np.array([data.draw(st.lists(values, min_size=dimension, max_size=dimension))], np.float32)
    k = data.draw(st.integers(1, count))
    result = CASES[name].make().build(items).search(query, k, **CASES[name].full(count))
    check(result, items, query, k)


@each
def test_of_equal_scores_the_lower_id_comes_first(name):
    items = np.repeat(vectors(4), 5, axis=0)[np.random.default_rng(0).permutation(20)]
    query = vectors(1, seed=3)
    result = CASES[name].make().build(items).search(query, 20, **CASES[name].full(20))
    pairs = list(zip(-result.scores[0], result.ids[0], strict=True))
    assert pairs == sorted(pairs)


@each
def test_rotations_change_nothing_and_the_scale_of_a_query_its_scores_only(name):
    items, asked = vectors(400, seed=4), vectors(10, seed=5)
    rotation = np.linalg.qr(np.random.default_rng(6).normal(size=(8, 8)))[0].astype("float32")
    full = CASES[name].full(400)
    plain = CASES[name].make().build(items).search(asked, 5, **full)
    turned = CASES[name].make().build(items @ rotation).search(asked @ rotation, 5, **full)
    scaled = CASES[name].make().build(items).search(4 * asked, 5, **full)
    np.testing.assert_array_equal(plain.ids, scaled.ids)
    np.testing.assert_allclose(4 * plain.scores, scaled.scores, rtol=1e-5)
    np.testing.assert_allclose(plain.scores, turned.scores, rtol=1e-3, atol=1e-4)


@each
def test_any_layout_and_type_of_numbers(name):
    items, asked = np.round(8 * vectors(200)), np.round(8 * vectors(6, seed=1))
    index, full = CASES[name].make(), CASES[name].full(200)
    expected = index.build(items).search(asked, 3, **full)
    for change in (
        lambda a: a.astype("float64"), np.asfortranarray, lambda a: a.astype("int16"), lambda a: a.tolist(),
        lambda a: np.repeat(a, 2, axis=0)[::2], lambda a: a.astype(">f4"),
    ):  # fmt: skip
        got = CASES[name].make().build(change(items)).search(change(asked), 3, **full)
        np.testing.assert_array_equal(expected.ids, got.ids)
    single = index.search(asked[0], 3, **full)
    assert single.ids.shape == single.scores.shape == (3,)
    np.testing.assert_array_equal(single.ids, expected.ids[0])
    assert index.search(np.empty((0, 8)), 3, **full).ids.shape == (0, 3)


@each
def test_the_items_are_left_alone_and_copied(name):
    items = vectors(100)
    before = items.copy()
    index = CASES[name].make().build(items)
    expected = index.search(before[:3], 4, **CASES[name].full(100))
    np.testing.assert_array_equal(items, before)
    items[:] = 0
    np.testing.assert_array_equal(index.search(before[:3], 4, **CASES[name].full(100)).ids, expected.ids)


@each
def test_what_is_added_is_found(name):
    items, asked = vectors(300), vectors(10, seed=1)
    index = CASES[name].make().build(items[:200])
    np.testing.assert_array_equal(index.add(items[200:]), np.arange(200, 300))
    assert len(index) == 300
    check(index.search(asked, 10, **CASES[name].full(300)), items, asked, 10)


@each
def test_threads_share_an_index(name):
    items, asked = vectors(2000), vectors(64, seed=1)
    index, full = CASES[name].make().build(items, threads=2), CASES[name].full(2000)
    expected = index.search(asked, 10, threads=1, **full)
    found: list[Any] = [None] * 6

    def look(place):
        found[place] = index.search(asked, 10, threads=1 + place % 3, **full)

    workers = [threading.Thread(target=look, args=(place,)) for place in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in found:
        np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-5, atol=1e-5)


@each
def test_bad_items(name):
    make = CASES[name].make
    nan = np.ones((3, 2))
    nan[1, 1] = np.nan
    for items, rule in (
        (np.empty((0, 4)), "at least 1"), (np.ones(3), "shape"), (np.ones((2, 0)), "shape"), (nan, "finite"),
        ([[np.inf, 1.0]], "finite"), ([[1e300, 1.0]], "finite"), ([["a", "b"]], "real numbers"),
        (np.ones((2, 2), complex), "real numbers"), (np.ones((2, 2, 2)), "shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rule):
            make().build(items)


@each
def test_bad_searches(name):
    index = CASES[name].make()
    with pytest.raises(ValueError, match="build"):
        index.search([[1.0, 2.0]])
    with pytest.raises(ValueError, match="build"):
        index.save("nowhere")
    index.build(vectors(30))
    for queries, options, rule in (
        (np.ones((1, 7)), {}, "dimension 8"), (np.ones(7), {}, "dimension 8"), (np.full((1, 8), np.nan), {}, "finite"),
        (np.ones((1, 8)), {"k": 31}, "at most 30"), (np.ones((1, 8)), {"k": 0}, "at least 1"),
        (np.ones((1, 8)), {"k": 2.0}, "integer"), (np.ones((1, 8)), {"nonsense": 3}, "effort"),
        (np.ones((1, 8)), {"threads": 0}, "threads"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rule):
            index.search(queries, **options)
    with pytest.raises(ValueError, match="dimension 8"):
        index.add(np.ones((2, 3)))


@each
def test_efforts_are_taken_and_reach_everything(name):
    items, asked = vectors(500), vectors(20, seed=1)
    index = CASES[name].make().build(items)
    expected, _ = truth(items, asked, 10)
    found = [np.mean(np.isclose(index.search(asked, 10, **e).scores, expected, rtol=1e-4)) for e in index.efforts(10)]
    assert found[-1] >= 0.95 and found[-1] == max(found)


@each
def test_a_file_gives_the_index_back(name, tmp_path):
    items, asked = vectors(300), vectors(10, seed=1)
    index = CASES[name].make().build(items)
    path = index.save(tmp_path / "a.index")
    with pytest.raises(FileExistsError, match="force"):
        index.save(path)
    again = type(index).load(index.save(path, force=True))
    assert repr(again) == repr(index) and again.memory_bytes == index.memory_bytes >= items.nbytes
    for effort in index.efforts(10):
        expected, got = index.search(asked, 10, **effort), retrieval.Index.load(path).search(asked, 10, **effort)
        np.testing.assert_array_equal(expected.ids, got.ids)
        np.testing.assert_array_equal(expected.scores, got.scores)
    again.add(vectors(5, seed=9))
    again.search(asked, 10)


def rewritten(path, change):
    """Writes the file anew with another header or other arrays, and a checksum that fits."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content, 12)
    header, body = json.loads(content[20 : 20 + length]), bytearray(content[20 + length : -32])
    change(header, body)
    text = json.dumps(header).encode()
    new = struct.pack("<8sIQ", MAGIC, VERSION, len(text)) + text + bytes(body)
    path.write_bytes(new + hashlib.sha256(new).digest())


@each
def test_damaged_files(name, tmp_path):
    path = CASES[name].make().build(vectors(60)).save(tmp_path / "a.index")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(retrieval.IndexFileError, match=r"a\.index"):
            retrieval.Index.load(path)
    for end in (0, 7, 20, 60, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(retrieval.IndexFileError):
            retrieval.Index.load(path)


@each
def test_hostile_files(name, tmp_path):
    """Whoever writes a file can write its checksum too."""
    index = CASES[name].make().build(vectors(60))
    path = tmp_path / "a.index"
    changes = [
        lambda h, b: h.update({"class": "Index"}), lambda h, b: h.update({"class": ["x"]}),
        lambda h, b: h.update(arrays=[]), lambda h, b: h.update(config={"nonsense": 1}),
        lambda h, b: h["arrays"][0].update(shape=[1 << 40, 1 << 40]), lambda h, b: h["arrays"][0].update(shape=[-1, 8]),
        lambda h, b: h["arrays"][0].update(offset=len(b) - 4), lambda h, b: h["arrays"][0].update(dtype="O"),
        lambda h, b: b.__setitem__(slice(0, 4), b"\xff\xff\xff\x7f"), lambda h, b: h["arrays"][0].update(shape=[480]),
    ]  # fmt: skip
    for change in changes:
        index.save(path, force=True)
        rewritten(path, change)
        with pytest.raises(retrieval.IndexFileError):
            retrieval.Index.load(path)
    index.save(path, force=True)
    places = []
    rewritten(path, lambda h, b: places.extend(h["arrays"][1:]))
    for entry in places:
        for value in (b"\xff", b"\x7f", b"\x01"):
            index.save(path, force=True)

            def fill(header, body, entry=entry, value=value):
                size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
                body[entry["offset"] : entry["offset"] + size] = value * size

            rewritten(path, fill)
            try:  # Some values are as good as others; none may crash, or give ids that are not there.
                result = retrieval.Index.load(path).search(vectors(3, seed=1), 5)
            except retrieval.IndexFileError:
                continue
            assert result.ids.min() >= -1 and result.ids.max() < 60
