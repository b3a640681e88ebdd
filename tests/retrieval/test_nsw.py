"""NSW: its kernels against NumPy, its graph, and what it finds where norms are skewed."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit.retrieval import NSW, Exact, IndexFileError, graph, nsw


def vectors(count, dimension=16, seed=0, skew=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dimension)) * np.exp(skew * rng.normal(size=(count, 1)))).astype("float32")


def recall(index, items, queries, k=10, **effort):
    expected = Exact().build(items).search(queries, k).ids
    found = index.search(queries, k, **effort).ids
    return float((found[:, :, None] == expected[:, None]).any(axis=1).mean())


def levels_of(index):
    """Gives each link as (level, from, to)."""
    for node, row in enumerate(index.links):
        yield from ((0, node, other) for other in row[row >= 0])
        for level in range(1, index.levels[node] + 1):
            above = index.upper[index.first_row[node] + level - 1]
            yield from ((level, node, other) for other in above[above >= 0])


@pytest.mark.parametrize("space", nsw.SPACES)
def test_similarity_is_what_the_space_says(space):
    items = vectors(30, 5, skew=0.7) + 2
    known = nsw._known(items, space)
    wide = items.astype(float)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    if space == "centred":
        wide = wide - wide.mean(axis=0)
    elif space == "angle":
        wide = wide / norms
    elif space == "euclidean":
        wide = np.hstack([wide, np.sqrt(norms.max() ** 2 - norms**2)])
    expected = wide @ wide.T
    angles = expected / np.outer(*2 * [np.linalg.norm(wide, axis=1)])
    for a in range(30):
        for b in range(30):
            assert graph.similarity(items, known, graph.SCALE, a, b) == pytest.approx(expected[a, b], abs=1e-3)
            if space == "centred":
                assert graph.similarity(items, known, graph.SPREAD, a, b) == pytest.approx(angles[a, b], abs=1e-4)


def test_in_the_euclidean_space_the_nearest_have_the_largest_inner_products():
    items, query = vectors(200, 6, skew=0.5), vectors(1, 6, seed=1)[0]
    added = nsw._known(items, "euclidean")[:, graph.ADDED]
    points, asked = np.column_stack([items, added]), np.append(query, 0)
    assert np.argmin(((points - asked) ** 2).sum(axis=1)) == np.argmax(items @ query)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), np.linalg.norm(items, axis=1).max(), rtol=1e-5)


@pytest.mark.parametrize("capacity", [1, 5, 40])
def test_the_list_keeps_the_best_and_of_equals_the_lower_ids(capacity):
    rng = np.random.default_rng(0)
    offered = [(np.float32(score), node) for node, score in enumerate(rng.integers(0, 6, 30))]
    rng.shuffle(offered)
    scores, nodes, count = np.empty(capacity, np.float32), np.empty(capacity, np.int64), 0
    for seen, (score, node) in enumerate(offered, start=1):
        best = sorted(offered[:seen], key=lambda pair: (-pair[0], pair[1]))[:capacity]
        count, place = graph.put(scores, nodes, count, score, np.int64(node))
        assert list(zip(scores[:count], nodes[:count] >> 1, strict=True)) == best
        assert (place < capacity) == ((score, node) in best)


def test_choose_takes_none_nearer_to_another_link_than_to_the_node():
    items = vectors(60)
    known = nsw._known(items, "angle")
    unit = items / np.linalg.norm(items, axis=1, keepdims=True)
    near = unit @ unit.T
    order = [i for i in np.argsort(-near[0], kind="stable") if i != 0]
    kept: list[int] = []
    for i in order:
        if len(kept) < 8 and all(near[i, j] < near[i, 0] for j in kept):
            kept.append(int(i))
    chosen = np.empty(8, np.int64)
    found = graph.choose(items, known, 0, 2 * np.array(order), len(order), 8, chosen)
    assert chosen[:found].tolist() == kept


def test_a_walk_over_all_links_is_greedy_search():
    """Each node is linked with all others: the first step sees everything."""
    items, query = vectors(40), vectors(1, seed=1)[0]
    links = np.array([[j for j in range(40) if j != i] for i in range(40)], np.int32)
    scores, nodes = np.empty(5, np.float32), np.empty(5, np.int64)
    scores[0], nodes[0] = items[7] @ query, 14
    visited = np.zeros(40, np.uint8)
    visited[7] = 1
    count, computed = graph.walk(
        query,
        items,
        None,
        None,
        links,
        np.zeros(40, np.int64),
        0,
        scores,
        nodes,
        1,
        5,
        visited,
        1,
        np.empty(39, np.int64),
    )
    assert (nodes[:count] >> 1).tolist() == np.argsort(-(items @ query))[:5].tolist() and computed == 39
    assert (nodes[:count] & 1).all()


@pytest.mark.parametrize("hierarchy", [True, False])
def test_links_are_sound(hierarchy):
    index = NSW(6, 20, hierarchy=hierarchy).build(vectors(800))
    links = list(levels_of(index))
    assert all(a != b for _, a, b in links) and len(set(links)) == len(links)
    assert all(index.levels[b] >= level for level, _, b in links)
    for row in (*index.links, *index.upper):
        assert (row[int((row >= 0).sum()) :] == -1).all()
    assert index.links.shape[1] == (12 if hierarchy else 24)
    assert (index.levels.max() > 0) == hierarchy
    if not hierarchy:  # Links go both ways, but for lists that were full.
        pairs, full = {(a, b) for _, a, b in links}, (index.links >= 0).all(axis=1)
        assert all((b, a) in pairs or full[b] for a, b in pairs)


def test_levels_thin_out_by_the_degree():
    levels = NSW(8, 4).build(vectors(20000, 4)).levels
    for level in (1, 2):
        assert (levels >= level).mean() == pytest.approx(8.0**-level, rel=0.25)


@pytest.mark.parametrize("hierarchy", [True, False])
def test_the_seed_repeats_whatever_the_threads(hierarchy):
    items, more = vectors(1500), vectors(300, seed=1)
    first, second, other = (NSW(hierarchy=hierarchy, seed=seed) for seed in (3, 3, 4))
    for index, threads in ((first, 1), (second, 3), (other, 1)):
        index.build(items, threads=threads).add(more, threads=threads)
    np.testing.assert_array_equal(first.links, second.links)
    np.testing.assert_array_equal(first.upper, second.upper)
    assert not np.array_equal(first.links, other.links)


@pytest.mark.parametrize("space", nsw.SPACES)
def test_the_graph_alone_finds_equal_norms(space):
    items, queries = vectors(3000), vectors(100, seed=1)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    assert recall(NSW(space=space).build(items), items, queries, ef=100, scan=0) > 0.97


def skewed(count=4000, dimension=24, seed=0):
    """Returns items of skewed norms with a large popularity in common, and queries that care little for it."""
    rng = np.random.default_rng(seed)
    size = np.exp(0.8 * rng.normal(size=(count, 1)))
    items = rng.normal(size=(count, dimension)) / np.sqrt(dimension)
    items[:, 0] += 2
    queries = rng.normal(size=(200, dimension)) / np.sqrt(dimension)
    return (items * size).astype("float32"), queries.astype("float32")


def test_skewed_norms_and_popularity_do_not_break_it():
    items, queries = skewed()
    index = NSW().build(items)
    assert recall(index, items, queries, ef=160) > 0.93
    plain = NSW(space="inner_product").build(items)
    assert recall(plain, items, queries, ef=160, scan=0) < 0.8 < recall(index, items, queries, ef=160, scan=0)


def test_a_shift_of_all_items_changes_no_links():
    items = np.round(64 * vectors(500, 8)).astype("float32")
    plain, shifted = NSW().build(items), NSW().build(items + 256)
    assert (plain.links == shifted.links).mean() > 0.99


def test_more_effort_finds_more_and_costs_more():
    items, queries = vectors(5000, 32), vectors(100, 32, seed=1)
    index = NSW().build(items)
    found = [recall(index, items, queries, ef=ef, scan=0) for ef in (10, 40, 160)]
    cost = [index.evaluations(queries, ef=ef, scan=0).mean() for ef in (10, 40, 160)]
    assert found == sorted(found) and found[-1] > 0.95 and cost == sorted(cost) and cost[-1] < 4000


def test_several_starts_find_more():
    items, queries = vectors(5000, 32), vectors(100, 32, seed=1)
    index = NSW(12, 40, space="angle", hierarchy=False).build(items)
    found = [recall(index, items, queries, ef=10, scan=0, starts=starts) for starts in (1, 4, 16)]
    assert found[0] < found[1] < found[2]


def test_the_scan_alone_is_the_best_of_the_largest_norms():
    items, queries = vectors(600, skew=0.5), vectors(5, seed=1)
    result = NSW().build(items).search(queries, 3, ef=0, scan=400)
    largest = np.sort(np.argsort(-np.linalg.norm(items, axis=1), kind="stable")[:400])
    expected = Exact().build(items[largest]).search(queries, 3).ids
    np.testing.assert_array_equal(result.ids, largest[expected])


def test_none_is_scanned_where_norms_are_equal_and_few_where_few_are_large():
    even = vectors(5000)
    lengths = [NSW(4, 4).build(vectors(5000, skew=skew))._scan_length(10, 40) for skew in (0.0, 0.4, 0.8)]
    assert nsw.SCAN_PER_NODE * 40 >= lengths[0] > lengths[1] > lengths[2] > 10
    even /= np.linalg.norm(even, axis=1, keepdims=True)
    assert NSW(4, 4).build(even)._scan_length(10, 40) == 0


def test_the_threshold_of_the_scan_is_that_of_normal_scores():
    """Of items of one norm the k-th best of n normal scores is the quantile 1 - k/n."""
    items = np.zeros((5000, 3), np.float32)
    items[:, 0] = 2
    index = NSW(2, 1).build(items)
    index._scan_length(50, 10)
    assert index._thresholds[50] == pytest.approx(2 * 2.3263, rel=1e-3)  # 1 % lie above 2.3263 deviations.


def test_an_item_that_no_link_leads_to_is_found_by_a_scan():
    items = vectors(300)
    index = NSW().build(items)
    index.links[:] = -1
    result = index.search(vectors(4, seed=1), 5, ef=10, scan=0)
    np.testing.assert_array_equal(result.ids, Exact().build(items).search(vectors(4, seed=1), 5).ids)


@pytest.mark.parametrize("hierarchy", [True, False])
def test_items_added_one_by_one_are_linked(hierarchy):
    items, queries = vectors(400), vectors(40, seed=1)
    index = NSW(hierarchy=hierarchy).build(items[:1])
    for item in items[1:]:
        index.add(item[None])
    assert recall(index, items, queries, ef=60, scan=0, starts=2) > 0.95


def test_duplicates_do_not_cut_the_graph():
    items = np.concatenate([np.repeat(vectors(20), 50, axis=0), vectors(1000, seed=1)])
    queries = vectors(50, seed=2)
    expected = Exact().build(items).search(queries, 10).scores
    found = NSW().build(items).search(queries, 10, ef=200, scan=0).scores
    assert np.isclose(found, expected, rtol=1e-4).mean() > 0.9


def test_wrap_around_of_the_marks():
    items, queries = vectors(500), vectors(600, seed=1)
    index = NSW().build(items)
    together = index.search(queries, 5, ef=20, threads=1)
    single = [index.search(query, 5, ef=20).ids for query in queries]
    np.testing.assert_array_equal(together.ids, np.stack(single))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"degree": 1}, "at least 2"), ({"construction": 0}, "at least 1"), ({"space": "l1"}, "one of"),
        ({"hierarchy": 1}, "True or False"), ({"seed": -1}, "at least 0"),
    ],
)  # fmt: skip
def test_bad_settings(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        NSW(**arguments)


def test_bad_efforts():
    index = NSW().build(vectors(50))
    for effort in ({"ef": -1}, {"ef": 2.5}, {"scan": -1}, {"starts": -1}):
        with pytest.raises(ValueError, match=next(iter(effort))):
            index.search(vectors(1), 3, **effort)


def test_a_link_above_the_level_of_its_item_is_refused():
    index = NSW(4).build(vectors(200))
    arrays = {name: array.copy() for name, array in index._arrays().items()}
    node = int(np.argmax(index.levels == 1))
    arrays["upper"][index.first_row[node], 0] = int(np.argmax(index.levels == 0))
    with pytest.raises(IndexFileError, match="level"):
        index._restore(arrays)
    with pytest.raises(IndexFileError, match="upper"):
        index._restore({**index._arrays(), "upper": index.upper[:-1]})


@pytest.mark.parametrize("space", nsw.SPACES)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40])
def test_what_is_known_of_items_follows_their_scale(space, scale):
    items = vectors(40, 5, skew=0.7) + 2
    plain, scaled = nsw._known(items, space), nsw._known(items * np.float32(scale), space)
    powers = {graph.OFFSET: 2, graph.SCALE: -1 if space == "angle" else 0, graph.ADDED: 1}
    powers[graph.SPREAD] = -1 if space in ("centred", "angle") else 0
    for column, power in powers.items():
        np.testing.assert_allclose(
            scaled[:, column], plain[:, column] * scale**power, rtol=1e-4, atol=1e-6 * scale**power
        )


def test_how_much_is_scanned_does_not_depend_on_the_scale():
    items = vectors(2000, skew=0.8)
    lengths = {NSW(4, 10).build(items * np.float32(scale))._scan_length(10, 64) for scale in (2.0**-100, 1, 2.0**60)}
    assert len(lengths) == 1 and lengths.pop() > 10
