"""Compiled pieces of graph indexes: the list of the best candidates, the walk over links, and the choice of links.

Links are int32 matrices, a row for each node, filled from the left and ended by -1. Items that a walk will need are
asked for ahead (prefetched): memory, not arithmetic, is what a walk waits for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from tfkit.retrieval.candidates import score_range
from tfkit.retrieval.kernels import dot, kernel, next_random, sort_heaps, started

#: Columns of what a build knows of each item: an offset, two scales and the added coordinate, see `similarity`.
OFFSET, SCALE, SPREAD, ADDED = 0, 1, 2, 3
#: Values in a line of the cache, of float32 and int32 alike.
_LINE = 16
_LAST_EPOCH = 255
#: One link in so many is kept whatever its direction: few items are apart from all others where norms are skewed.
_FILL = 2


def _typed_prefetch(typing_context: Any, array: Any, row: Any, column: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        matrix = context.make_array(signature.args[0])(context, builder, arguments[0])
        strides = cgutils.unpack_tuple(builder, matrix.strides, 2)
        offset = builder.add(builder.mul(arguments[1], strides[0]), builder.mul(arguments[2], strides[1]))
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.inttoptr(builder.add(builder.ptrtoint(matrix.data, offset.type), offset), pointer)
        function_type = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function_type)
        builder.call(function, [address, word(0), word(3), word(1)])  # To be read, soon and often; data.
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


#: `_prefetch(matrix, row, column)` asks for the line of the cache that holds an element of a matrix.
_prefetch: Any = intrinsic(_typed_prefetch)


@kernel
def similarity(items, known, scale, a, b):  # type: ignore[no-untyped-def]
    """Returns how near two items are: (<a, b> + offsets) times their scales, and the product of added coordinates."""
    product = dot(items[a], items[b]) + known[a, OFFSET] + known[b, OFFSET]
    return product * known[a, scale] * known[b, scale] + known[a, ADDED] * known[b, ADDED]


@kernel
def score_of(query, items, known, own, other):  # type: ignore[no-untyped-def]
    """Returns the score of an item for a query; `known` and `own` as in `walk`."""
    score = dot(query, items[other])
    if known is not None:
        score = (score + own[OFFSET] + known[other, OFFSET]) * own[SCALE] * known[other, SCALE]
        score += own[ADDED] * known[other, ADDED]
    return score


@kernel
def put(scores, nodes, count, score, node):  # type: ignore[no-untyped-def]
    """Puts a node into the list of the best, the best first, if it belongs there; of equal scores the lower id first.

    Args:
        scores: their length is the most the list holds.
        nodes: twice the id, and 1 more once its links were followed.
        count: nodes in the list.
        score, node: what is offered.

    Returns:
        The nodes in it now, and the place of the new one: the list's length if it was turned away.
    """
    capacity = scores.shape[0]
    if count == capacity:
        last = capacity - 1
        if score < scores[last] or (score == scores[last] and node > nodes[last] >> 1):
            return count, capacity
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if scores[middle] > score or (scores[middle] == score and nodes[middle] >> 1 < node):
            low = middle + 1
        else:
            high = middle
    if count < capacity:
        count += 1
    for i in range(count - 1, low, -1):
        scores[i], nodes[i] = scores[i - 1], nodes[i - 1]
    scores[low], nodes[low] = score, 2 * node
    return count, low


@kernel
def walk(  # type: ignore[no-untyped-def]
    query, items, known, own, links, first_row, level, scores, nodes, count, effort, visited, epoch, fresh
):
    """Follows the links of the best node not yet followed, until those of the best so many all are.

    Args:
        query: float32, (dimension,).
        known, own: what a build knows of all items, and of the one that is the query; None: plain inner products.
        links: int32, (rows, most links).
        first_row, level: as in `descend`; level 0: the row of a node is its id.
        scores, nodes, count: the list, see `put`; what is in it must be marked as visited.
        effort: of how many of the best the links are followed.
        visited, epoch: a node was seen if its mark is the epoch.
        fresh: int64, room for the links of a node.

    Returns:
        The nodes in the list, and how many inner products were computed.
    """
    at, computed = 0, 0
    while at < min(count, effort):
        if nodes[at] & 1:
            at += 1
            continue
        node = nodes[at] >> 1
        nodes[at] |= 1
        row = node if level == 0 else first_row[node] + level - 1
        found = 0
        for j in range(links.shape[1]):
            other = np.int64(links[row, j])
            if other < 0:
                break
            if visited[other] != epoch:
                visited[other] = epoch
                fresh[found] = other
                found += 1
                for line in range(0, items.shape[1], _LINE):
                    _prefetch(items, other, line)
                if known is not None:
                    _prefetch(known, other, 0)
        computed += found
        at += 1
        for j in range(found):
            other = fresh[j]
            score = score_of(query, items, known, own, other)
            count, place = put(scores, nodes, count, score, other)
            if place <= at and place < scores.shape[0]:
                at = place
                if level == 0:  # Perhaps the next to be followed.
                    for line in range(0, links.shape[1], _LINE):
                        _prefetch(links, other, line)
    return count, computed


@kernel
def descend(query, items, known, own, upper, first_row, node, top, low):  # type: ignore[no-untyped-def]
    """Walks to the best neighbour, again and again, on each level from `top` to above `low`.

    Args:
        query, items, known, own: as in `walk`.
        upper: int32, the links above the ground: of a node's level l in row `first_row[node] + l - 1`.
        first_row: of each node.
        node: to start from; it has a row on the level `top`.
        top, low: levels.

    Returns:
        The node arrived at, its score, and how many inner products were computed.
    """
    best, computed = score_of(query, items, known, own, node), 1
    for level in range(top, low, -1):
        moved = True
        while moved:
            moved = False
            row = first_row[node] + level - 1
            for j in range(upper.shape[1]):
                if upper[row, j] < 0:
                    break
                for line in range(0, items.shape[1], _LINE):
                    _prefetch(items, np.int64(upper[row, j]), line)
            for j in range(upper.shape[1]):
                other = np.int64(upper[row, j])
                if other < 0:
                    break
                computed += 1
                score = score_of(query, items, known, own, other)
                if score > best:
                    best, node, moved = score, other, True
    return node, best, computed


@kernel
def choose(items, known, node, nodes, count, most, chosen):  # type: ignore[no-untyped-def]
    """Chooses links among candidates: none that is nearer to one chosen before it than to the node itself.

    Where these are less than half of the links there are places for, the best of the others fill that half.

    Args:
        items, known: as in `walk`; how near is measured with the scale `SPREAD`.
        node: whose links they will be.
        nodes, count: twice the ids of the candidates, the best first, see `put`.
        most: links to choose.
        chosen: int64, room for them.

    Returns:
        How many were chosen.
    """
    found = 0
    for i in range(count):
        candidate = nodes[i] >> 1
        near, apart = similarity(items, known, SPREAD, candidate, node), True
        for j in range(found):
            if similarity(items, known, SPREAD, candidate, chosen[j]) >= near:
                apart = False
                break
        if apart:
            chosen[found] = candidate
            found += 1
            if found == most:
                break
    for i in range(count):
        if _FILL * found >= most:
            break
        candidate, known_already = nodes[i] >> 1, False
        for j in range(found):
            known_already |= chosen[j] == candidate
        if not known_already:
            chosen[found] = candidate
            found += 1
    return found


@kernel
def propose(  # type: ignore[no-untyped-def]
    batch, items, known, levels, links, upper, first_row, entries, top, construction, degree, diverse
):
    """Looks up the neighbours of new nodes among the old ones, and writes the links of the new ones.

    Args:
        batch: int64, the new nodes.
        items, known: as in `walk`.
        levels: the level of each node.
        links, upper, first_row: links of the ground and of the levels above, as in `descend`.
        entries: int64, for each new node an old one to start from, which has a row on the level `top`.
        top: the highest level of old nodes.
        construction: length of the list of candidates.
        degree: most links of a new node on each level.
        diverse: whether links are chosen by `choose`; else the nearest are.
    """
    visited, epoch = np.zeros(links.shape[0], np.uint8), 0
    scores, nodes = np.empty(construction, np.float32), np.empty(construction, np.int64)
    fresh, chosen = np.empty(max(links.shape[1], upper.shape[1]), np.int64), np.empty(degree, np.int64)
    for place, node in enumerate(batch):
        query, own, level = items[node], known[node], min(levels[node], top)
        start, score, _ = descend(query, items, known, own, upper, first_row, entries[place], top, level)
        scores[0], nodes[0], count = score, 2 * start, 1
        while level >= 0:
            epoch += 1
            if epoch > _LAST_EPOCH:
                visited[:] = 0
                epoch = 1
            for i in range(count):
                nodes[i] &= ~1
                visited[nodes[i] >> 1] = epoch
            if level:
                count, _ = walk(query, items, known, own, upper, first_row, level, scores, nodes, count, construction,
                                visited, epoch, fresh)  # fmt: skip
                row = upper[first_row[node] + level - 1]
            else:
                count, _ = walk(query, items, known, own, links, first_row, 0, scores, nodes, count, construction,
                                visited, epoch, fresh)  # fmt: skip
                row = links[node]
            if diverse:
                found = choose(items, known, node, nodes, count, degree, chosen)
            else:
                found = min(count, degree)
                for j in range(found):
                    chosen[j] = nodes[j] >> 1
            for j in range(found):
                row[j] = chosen[j]
            level -= 1


@kernel
def connect(batch, items, known, levels, links, upper, first_row, top, diverse, share, shares):  # type: ignore[no-untyped-def]
    """Links back to new nodes from the nodes that they chose.

    A full list is chosen anew where links are diverse, and stays as it is where they are not.

    Args:
        batch, items, known, levels, links, upper, first_row, top, diverse: as in `propose`.
        share, shares: the part of the old nodes whose lists are written here, so that threads share the work.
    """
    width = max(links.shape[1], upper.shape[1])
    scores, nodes = np.empty(width + 1, np.float32), np.empty(width + 1, np.int64)
    chosen = np.empty(width, np.int64)
    for node in batch:
        for level in range(min(levels[node], top) + 1):
            row = links[node] if level == 0 else upper[first_row[node] + level - 1]
            for other in row:
                if other < 0:
                    break
                if other % shares != share:
                    continue
                back = links[other] if level == 0 else upper[first_row[other] + level - 1]
                most = back.shape[0]
                held = most
                for j in range(most):
                    if back[j] < 0:
                        held = j
                        break
                if held < most:
                    back[held] = node
                elif diverse:
                    count, _ = put(scores, nodes, 0, similarity(items, known, SCALE, other, node), node)
                    for j in range(most):
                        near = similarity(items, known, SCALE, other, back[j])
                        count, _ = put(scores, nodes, count, near, np.int64(back[j]))
                    found = choose(items, known, np.int64(other), nodes, count, most, chosen)
                    for j in range(most):
                        back[j] = chosen[j] if j < found else -1


@kernel
def explore(  # type: ignore[no-untyped-def]
    queries,
    bits,
    seed,
    items,
    links,
    upper,
    first_row,
    entry,
    top,
    starts,
    prefix,
    effort,
    scores,
    nodes,
    counts,
    marks,
    computed,
):
    """Searches the graph for each query, from what is known of the answer and from further starts.

    Args:
        queries, items: float32.
        bits, seed: the queries as uint32; with the seed they are where the generator of random starts begins.
        links, upper, first_row, entry, top: the graph, as in `propose`; top -1: `entry` is no start.
        starts: from how many random nodes the graph is searched, one after the other.
        prefix: int64, items whose scores are known: none that belongs into a list is missing there.
        effort: as in `walk`.
        scores, nodes, counts: the lists, a row for each query, and how many items are in them; ids, the best first.
        marks: uint8, zeros or what an earlier call left: a mark for each node, and the epoch.
        computed: int64, to be filled with the inner products computed for each query.
    """
    visited, epoch = marks[: links.shape[0]], np.int64(marks[links.shape[0]])
    fresh = np.empty(links.shape[1], np.int64)
    other_scores, other_nodes = np.empty(max(effort, 1), np.float32), np.empty(max(effort, 1), np.int64)
    for i in range(queries.shape[0]):
        query, own_scores, own_nodes, count = queries[i], scores[i], nodes[i], counts[i]
        epoch += 1
        if epoch > _LAST_EPOCH:
            visited[:] = 0
            epoch = np.int64(1)
        total = 0
        for node in prefix:
            visited[node] = epoch
        for j in range(count):
            own_nodes[j] *= 2
        if top >= 0:
            node, score, spent = descend(query, items, None, None, upper, first_row, entry, top, 0)
            total += spent
            if visited[node] != epoch:
                visited[node] = epoch
                count, _ = put(own_scores, own_nodes, count, score, node)
        count, spent = walk(query, items, None, None, links, first_row, 0, own_scores, own_nodes, count, effort,
                            visited, epoch, fresh)  # fmt: skip
        total += spent
        state = started(seed, bits[i])
        for _ in range(starts):
            state, word = next_random(state)
            start = np.int64(((word >> np.uint64(32)) * np.uint64(links.shape[0])) >> np.uint64(32))
            if visited[start] == epoch:
                continue
            visited[start] = epoch
            other_scores[0], other_nodes[0] = score_of(query, items, None, None, start), 2 * start
            found, spent = walk(query, items, None, None, links, first_row, 0, other_scores, other_nodes, 1, effort,
                                visited, epoch, fresh)  # fmt: skip
            total += 1 + spent
            for j in range(found):
                count, _ = put(own_scores, own_nodes, count, other_scores[j], other_nodes[j] >> 1)
        for j in range(count):
            own_nodes[j] >>= 1
        counts[i] = count
        computed[i] = total
    marks[links.shape[0]] = epoch


@kernel
def find_few(  # type: ignore[no-untyped-def]
    queries,
    bits,
    seed,
    items,
    links,
    upper,
    first_row,
    entry,
    top,
    starts,
    prefix_items,
    order,
    length,
    effort,
    k,
    marks,
):
    """Scans the prefix and explores the graph in one call, for so few queries that calls would take longer.

    Args:
        prefix_items: rows of the longest items, in their `order`.
        length: how many of them are scanned.
        k: items wanted.
        queries, bits, seed, items, links, upper, first_row, entry, top, starts, effort, marks: as in `explore`.

    Returns:
        Scores and ids, each (queries, k); how many items each list holds, and the shortest; inner products computed.
    """
    width = max(k, effort)
    scores, nodes = np.empty((queries.shape[0], width), np.float32), np.empty((queries.shape[0], width), np.int64)
    counts, computed = np.zeros(queries.shape[0], np.int64), np.zeros(queries.shape[0], np.int64)
    for i in range(queries.shape[0]):
        counts[i] = score_range(queries[i], prefix_items, order, 0, length, scores[i], nodes[i], 0)
    sort_heaps(scores, nodes, counts)
    explore(queries, bits, seed, items, links, upper, first_row, entry, top, starts, order[:length], effort, scores,
            nodes, counts, marks, computed)  # fmt: skip
    computed += length
    return scores[:, :k].copy(), nodes[:, :k].copy(), counts, counts.min(), computed
