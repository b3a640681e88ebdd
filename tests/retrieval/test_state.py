"""What happens to an index when searches, builds and additions meet, or fail half-way; scales; hostile files."""

from __future__ import annotations

import copy
import hashlib
import pickle
import struct
import threading
import time

import numpy as np
import pytest

from tests.retrieval.test_indexes import CASES, each, rewritten, vectors
from tfkit import retrieval
from tfkit.retrieval import blas, index_file, scann
from tfkit.retrieval.base import MOST_THREADS, thread_count

SCALES = [1e-38, 1e-19, 1e-6, 1e19, 1e37]


@each
def test_the_scale_of_items_and_queries_changes_nothing(name):
    items, asked = vectors(300, seed=1), vectors(6, seed=2)
    plain = CASES[name].make().build(items)
    drawn = "Sampling" in name  # What is drawn depends on the query's bits, and for ScaNN on no seed.
    for effort in (CASES[name].full(300), *([] if drawn else plain.efforts(5)[:1])):
        expected = plain.search(asked, 5, **effort)
        for scale in SCALES:
            factor = np.float32(2.0) ** round(np.log2(scale) + (3 if scale < 1e-30 else -3 if scale > 1e30 else 0))
            index = CASES[name].make().build(items * factor)
            for query_factor in (np.float32(1.0), 1 / factor, factor):
                result = index.search(asked * query_factor, 5, **effort)
                power = float(factor) * float(query_factor)
                if not name.startswith("ScaNN") or effort == CASES[name].full(300):  # It trains anew, without a seed.
                    assert np.mean(result.ids == expected.ids) > 0.9
                if result.exact is not None and expected.exact is not None:
                    np.testing.assert_array_equal(result.exact, expected.exact)
                    with np.errstate(over="ignore", under="ignore"):
                        true = (expected.scores.astype(np.float64) * power).astype(np.float32)
                    np.testing.assert_allclose(result.scores, true, rtol=1e-5, atol=1e-44)


@each
def test_sums_beyond_float32_are_ranked_right(name):
    """|q||x| is 1e76, and partial sums cancel: infinities would, and not-a-numbers."""
    rng = np.random.default_rng(0)
    items = (rng.normal(size=(300, 8)) * 1e37).astype(np.float32)
    asked = (rng.normal(size=(5, 8)) * 1e37).astype(np.float32)
    order = np.argsort(-(asked.astype(np.float64) @ items.astype(np.float64).T), axis=1)[:, :10]
    result = CASES[name].make().build(items).search(asked, 10, **CASES[name].full(300))
    np.testing.assert_array_equal(result.ids, order)
    assert not np.isnan(result.scores).any() and np.isposinf(result.scores[:, 0]).all()


@each
def test_an_addition_may_change_the_scale(name, tmp_path):
    items, asked = vectors(300, seed=3), vectors(5, seed=4)
    everything = np.concatenate([items, items[:50] * np.float32(2.0**70)])
    index = CASES[name].make().build(items)
    index.add(everything[300:])
    full = CASES[name].full(350)
    expected = retrieval.Exact().build(everything).search(asked, 40)
    np.testing.assert_array_equal(index.search(asked, 40, **full).ids, expected.ids)
    again = retrieval.Index.load(index.save(tmp_path / "a.index")).search(asked, 40, **full)
    np.testing.assert_array_equal(again.ids, expected.ids)
    np.testing.assert_allclose(again.scores, expected.scores, rtol=1e-5, atol=1e-6 * expected.scores.max())


@each
@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_a_build_or_addition_that_fails_changes_nothing(name, fault, monkeypatch):
    items, asked = vectors(300, seed=1), vectors(5, seed=2)
    index = CASES[name].make().build(items)
    full = CASES[name].full(300)
    expected, before = index.search(asked, 5, **full), dict(vars(index))
    for method in ("_build", "_extend"):
        whole = getattr(type(index), method)

        def half(self, *arguments, whole=whole):
            whole(self, *arguments)
            self.items[:] = 0
            raise fault("in the middle")

        with monkeypatch.context() as patch:
            patch.setattr(type(index), method, half)
            with pytest.raises(fault):
                index.build(vectors(40, 3)) if method == "_build" else index.add(vectors(20, seed=5))
    assert len(index) == 300 and vars(index).keys() == before.keys()
    assert all(vars(index)[key] is value for key, value in before.items())
    result = index.search(asked, 5, **full)
    np.testing.assert_array_equal(result.ids, expected.ids)
    np.testing.assert_array_equal(result.scores, expected.scores)


@each
def test_searches_go_on_while_items_are_added(name):
    items, asked = vectors(900, seed=1), vectors(16, seed=2)
    index = CASES[name].make().build(items[:300])
    faults, stop, sizes = [], threading.Event(), set()

    def look():
        while not stop.is_set():
            try:
                count = len(index)
                result = index.search(asked, 10, threads=1, **CASES[name].full(300))
                again = np.einsum("qd,qkd->qk", asked, items[result.ids])
                np.testing.assert_allclose(result.scores, again, rtol=1e-4, atol=1e-4)
                sizes.add(count)
            except BaseException as fault:  # To be told below.
                faults.append(fault)
                return

    workers = [threading.Thread(target=look) for _ in range(3)]
    for worker in workers:
        worker.start()
    for first in range(300, 900, 100):
        index.add(items[first : first + 100], threads=1)
    index.build(items[:500], threads=1)
    stop.set()
    for worker in workers:
        worker.join()
    assert not faults and len(index) == 500


def test_a_search_sees_the_state_that_it_began_with(monkeypatch):
    """The addition comes when the search has read the number of items, and not yet the links."""
    items, asked = vectors(800, seed=1), vectors(4, seed=2)
    index = retrieval.NSW().build(items[:200])
    expected = index.search(asked, 5, ef=30)
    ready = retrieval.NSW._marks

    def slow(self):
        if len(index) == 200:
            index.add(items[200:])
        return ready(self)

    monkeypatch.setattr(retrieval.NSW, "_marks", slow)
    found = index.search(asked, 5, ef=30, threads=1)
    assert len(index) == 800
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert index.search(asked, 5, ef=30).ids.max() >= 200


def test_of_two_additions_at_once_none_is_lost(monkeypatch):
    index = retrieval.NormScan().build(vectors(10))
    extend = retrieval.NormScan._build

    def slow(self, threads):
        time.sleep(0.02)
        extend(self, threads)

    monkeypatch.setattr(retrieval.NormScan, "_build", slow)
    ids = []
    workers = [threading.Thread(target=lambda n=n: ids.extend(index.add(vectors(3, seed=n)))) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(index) == 28 and sorted(ids) == list(range(10, 28))


def blas_threads():
    blas_of = __import__("threadpoolctl").ThreadpoolController().select(user_api="blas")
    return [library["num_threads"] for library in blas_of.info()], blas_of


def test_blas_has_its_threads_back_after_searches_side_by_side():
    before, controller = blas_threads()
    with controller.limit(limits=3):
        index, asked = retrieval.Exact().build(vectors(3000)), vectors(64, seed=1)
        workers = [
            threading.Thread(target=lambda: [index.search(asked, 5, threads=2) for _ in range(6)]) for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert set(blas_threads()[0]) == {3}
    assert blas_threads()[0] == before


def test_the_least_limit_holds_whatever_the_order_in_which_they_end():
    _, controller = blas_threads()
    with controller.limit(limits=4):
        first, second = blas.at_most(1), blas.at_most(2)
        first.__enter__()
        second.__enter__()
        assert set(blas_threads()[0]) == {1}
        first.__exit__(None, None, None)
        assert set(blas_threads()[0]) == {2}
        with blas.at_most(64):
            assert set(blas_threads()[0]) == {2}
        second.__exit__(None, None, None)
        assert set(blas_threads()[0]) == {4}
        with blas.at_most(64):  # Never more than there were.
            assert set(blas_threads()[0]) == {4}


@each
def test_a_build_holds_blas_to_its_threads(name, monkeypatch):
    seen = []
    kind = type(CASES[name].make())
    build = kind._build
    monkeypatch.setattr(kind, "_build", lambda self, threads: (seen.append(blas_threads()[0]), build(self, threads)))
    _, controller = blas_threads()
    with controller.limit(limits=3):
        CASES[name].make().build(vectors(60), threads=1)
    assert set(seen[0]) == {1}


@each
@pytest.mark.parametrize("much", [10**17, 10**30])
def test_any_effort_may_be_huge(name, much):
    items, asked = vectors(400, seed=1), vectors(5, seed=2)
    index = CASES[name].make().build(items, threads=much)
    for effort in index.effort_names():
        try:
            result = index.search(asked, 5, threads=much, **{effort: much})
        except ValueError as refusal:
            assert effort in str(refusal) and "left out" in str(refusal)
            continue
        assert result.ids.min() >= 0 and result.ids.max() < 400


@each
def test_an_effort_that_has_no_use_is_refused(name):
    index = CASES[name].make().build(vectors(300))
    useless = {"IVF": ["rescore"], "ScaNN by brute force": ["leaves", "rescore"]}.get(name, [])
    for effort in useless:
        with pytest.raises(ValueError, match=f"`{effort}` must be left out"):
            index.search(vectors(2), 5, **{effort: 20})
    assert not any(effort in step for step in index.efforts(5) for effort in useless)


def test_threads_are_bounded():
    assert thread_count(10**30) == MOST_THREADS and thread_count(3) == 3


@each
def test_no_query_is_no_fault(name):
    index = CASES[name].make().build(vectors(300))
    for queries in ([], np.empty((0, 8)), np.empty(0), ()):
        result = index.search(queries, 3)
        assert result.ids.shape == result.scores.shape == (0, 3) and result.ids.dtype == np.int64


@each
def test_a_single_query_has_one_flag(name):
    index, asked = CASES[name].make().build(vectors(300)), vectors(4, seed=1)
    together, alone = index.search(asked, 3), index.search(asked[0], 3)
    assert (together.exact is None) == (alone.exact is None)
    if together.exact is not None:
        assert together.exact.shape == (4,) and np.shape(alone.exact) == () and bool(alone.exact) == together.exact[0]


def test_masked_and_ragged_vectors_are_refused():
    masked = np.ma.masked_array(np.ones((3, 2)), mask=[[0, 0], [0, 1], [0, 0]])
    for call in (retrieval.Exact().build, retrieval.Exact().build(np.ones((4, 2))).search):
        with pytest.raises(ValueError, match="masked"):
            call(masked)
        with pytest.raises(ValueError, match="one length|real numbers"):
            call([[1.0, 2.0], [3.0]])
        call(np.ma.masked_array(np.ones((30, 2))), *([1] if call.__name__ == "search" else []))


def test_a_file_of_a_sibling_is_refused_by_name(tmp_path):
    path = retrieval.IVF().build(vectors(50)).save(tmp_path / "a.index")
    with pytest.raises(retrieval.IndexFileError, match="class IVF, not NSW"):
        retrieval.NSW.load(path)


def test_a_users_class_of_the_same_name_takes_nothing_over(tmp_path):
    class NormScan(retrieval.NormScan):
        pass

    ours, theirs = retrieval.NormScan().build(vectors(9)), NormScan().build(vectors(9))
    assert type(retrieval.Index.load(ours.save(tmp_path / "ours"))) is retrieval.NormScan
    assert type(retrieval.Index.load(theirs.save(tmp_path / "theirs"))) is NormScan


@each
def test_arrays_that_overlap_are_refused(name, tmp_path):
    """Else a header of a kilobyte could ask for a thousand times the file's size."""
    index = CASES[name].make().build(vectors(300))
    path = index.save(tmp_path / "a.index")
    entry = {"name": "more", "dtype": "<f4", "shape": [300, 8], "offset": 0}
    for change in (
        lambda h, b: h["arrays"].append(entry),
        lambda h, b: h["arrays"].extend({**entry, "name": f"more {n}"} for n in range(1000)),
        lambda h, b: h["arrays"].append(dict(h["arrays"][0])),
        lambda h, b: h["arrays"].append({**entry, "shape": [0, 3], "offset": len(b) + 64}),
        lambda h, b: b.extend(bytes(64)),
    ):
        index.save(path, force=True)
        rewritten(path, change)
        with pytest.raises(retrieval.IndexFileError, match="damaged"):
            retrieval.Index.load(path)


def test_the_file_is_written_and_read_in_pieces(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    items = vectors(20_000, 32)
    index = retrieval.Exact().build(items)
    tracemalloc.start()
    path = index.save(tmp_path / "a.index")
    writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tracemalloc.start()
    retrieval.Exact.load(path)
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writing < 0.2 * items.nbytes and reading < 1.5 * items.nbytes


#: Peak of a build over the bytes of the items; what the classes say of their memory, and a little beside. Codes are
#: learned from 32,768 items at most, and so few are all of them.
PEAKS = {
    "IVF with codes": 3.5,
    "SimpleLSH": 2.2,
    "NormRangingLSH": 2.2,
    "GreedyMIPS": 3.5,
    "WedgeSampling": 3.5,
    "DiamondSampling": 3.5,
}


@each
def test_a_build_takes_three_times_the_vectors_at_most(name):
    if "single items" in name:
        pytest.skip("two boxes for each item are what it is")
    tracemalloc = pytest.importorskip("tracemalloc")
    items = vectors(4_000, 256)
    CASES[name].make().build(items[:300])  # Compiles, which takes memory too.
    tracemalloc.start()
    CASES[name].make().build(items, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < PEAKS.get(name, 3.0) * items.nbytes + (1 << 20)


def test_copies_of_scann_are_refused_and_of_others_hold():
    index = retrieval.NSW().build(vectors(100))
    for again in (copy.copy(index), copy.deepcopy(index)):
        again.add(vectors(5))
        assert len(again) == 105 and len(index) == 100
    if scann.available():
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="save"):
                make(retrieval.ScaNN().build(vectors(300)))


def test_headers_that_say_nonsense(tmp_path):
    path = tmp_path / "a.index"
    for header in (b"[]", b"{}", b"\xff", b'{"class": "Exact", "config": [1], "arrays": []}', b"[" * 9999):
        content = struct.pack("<8sIQ", index_file.MAGIC, index_file.VERSION, len(header)) + header
        path.write_bytes(content + hashlib.sha256(content).digest())
        with pytest.raises(retrieval.IndexFileError, match="header"):
            retrieval.Index.load(path)


def test_random_starts_differ_between_queries_and_not_between_threads():
    starts = 3
    items, asked = vectors(500, seed=1), vectors(40, seed=2)
    index = retrieval.NSW(4, 10, hierarchy=False).build(items)
    found = index.search(asked, 5, ef=3, scan=0, starts=starts, threads=1).ids
    np.testing.assert_array_equal(found, index.search(asked, 5, ef=3, scan=0, starts=starts, threads=3).ids)
    np.testing.assert_array_equal(found[::-1], index.search(asked[::-1], 5, ef=3, scan=0, starts=starts).ids)
    twins = np.repeat(asked[:1], 30, axis=0) + np.float32(1e-6) * np.arange(30, dtype=np.float32)[:, None]
    assert len({tuple(row) for row in index.evaluations(twins, 1, ef=2, scan=0, starts=1)[:, None].tolist()}) > 3


def test_evaluations_have_the_shape_of_the_queries():
    index, asked = retrieval.NSW().build(vectors(300)), vectors(4, seed=1)
    many, one = index.evaluations(asked, 3), index.evaluations(asked[1], 3)
    assert many.shape == (4,) and one.shape == () and one == many[1] and many.dtype == one.dtype == np.int64


def test_a_short_budget_still_finds_k():
    result = retrieval.NormScan().build(vectors(50)).search(vectors(3, seed=1), 10, budget=1)
    assert result.ids.min() >= 0


def test_clusters_of_short_items_come_first_where_the_query_points_away():
    long, short = np.array([[9.0, 1.0], [9.5, 1.0]]), np.array([[0.1, 2.0], [0.1, 1.9]])
    index = retrieval.IVF(2).build(np.concatenate([long, short]))
    assert index.search([-1.0, -0.3], 1, probes=1).ids[0] in (2, 3)


def test_an_empty_cluster_is_no_probe():
    items = np.repeat(np.float32([[1.0, 0.0], [0.0, -1.0]]), 10, axis=0)
    index = retrieval.IVF(8).build(items)
    found = index.search([[-1.0, 0.5]], 1, probes=2).ids
    assert found[0, 0] >= 0


def test_efforts_of_codes_vary_what_is_rescored():
    efforts = retrieval.IVF(code_bytes=4).build(vectors(3000)).efforts(10)
    rescored = [effort["rescore"] for effort in efforts]
    assert rescored == sorted(rescored) and len(set(rescored)) > 3 and rescored[-1] == 3000
