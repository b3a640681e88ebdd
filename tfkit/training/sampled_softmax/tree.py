"""A tree of sums over blocks of classes: the compiled part of the samplers by kernels.

Leaves are blocks of consecutive classes; every node holds the sum of the features of its classes. A kernel
K(h, w) = <φ(h), φ(w)> + bias has the sum <φ(h), Σ φ(w)> + bias |classes| over a node, so that a draw goes down by one
inner product a level. Nodes lie in an array of 2 × blocks: the children of i are 2i and 2i + 1, leaves come last.
"""

from __future__ import annotations

import numpy as np

from tfkit.recommenders.random_numbers import uniform
from tfkit.retrieval import kernels

#: Sums of clipped kernels are at least this share of what they would be at bias 1.
_FLOOR = 1e-6


@kernels.kernel
def quadratic_features(w, out):  # type: ignore[no-untyped-def]
    """Adds the upper half of w wᵀ to `out`."""
    place, size = 0, w.shape[0]
    for i in range(size):
        value = w[i]
        for j in range(i, size):
            out[place] += value * w[j]
            place += 1


@kernels.kernel
def quadratic_query(h, alpha, out):  # type: ignore[no-untyped-def]
    """Writes α h hᵀ with doubled off-diagonal, so that <out, Σ features> = α Σ <h, w>²."""
    place, size = 0, h.shape[0]
    for i in range(size):
        value = alpha * h[i]
        for j in range(i, size):
            out[place] = value * h[j] * (1 if i == j else 2)
            place += 1


@kernels.kernel
def refresh(sums, counts, features, block, leaves):  # type: ignore[no-untyped-def]
    """Makes the sums of these leaves (ascending numbers of blocks) anew, then of all nodes above them.

    Sums are made from what is below, never changed by differences, so that no rounding error grows.
    `features`: (classes, dimension of the weights): of the quadratic kernel, made from them here.
    """
    blocks, classes = sums.shape[0] // 2, features.shape[0]
    nodes = np.empty(leaves.shape[0], np.int64)
    for at in range(leaves.shape[0]):
        node = nodes[at] = blocks + leaves[at]
        first = leaves[at] * block
        last = min(first + block, classes)
        sums[node] = 0
        for item in range(first, last):
            quadratic_features(features[item], sums[node])
        counts[node] = last - first
    ascend(sums, counts, nodes)


@kernels.kernel
def ascend(sums, counts, nodes):  # type: ignore[no-untyped-def]
    """Makes the sums of all nodes above the ascending `nodes` anew."""
    size = sums.shape[1]
    touched = np.zeros(sums.shape[0], np.bool_)
    for node in nodes:
        parent = node >> 1
        while parent >= 1 and not touched[parent]:
            touched[parent] = True
            parent >>= 1
    for node in range(sums.shape[0] // 2 - 1, 0, -1):
        if touched[node]:
            for i in range(size):
                sums[node, i] = sums[2 * node, i] + sums[2 * node + 1, i]
            counts[node] = counts[2 * node] + counts[2 * node + 1]


@kernels.kernel
def node_value(sums, counts, node, query, bias):  # type: ignore[no-untyped-def]
    """Returns the kernel's sum over a node, above zero."""
    return max(np.float64(kernels.dot(sums[node], query)) + bias * counts[node], _FLOOR * counts[node])


@kernels.kernel
def draw(  # type: ignore[no-untyped-def]
    sums,
    counts,
    features,
    block,
    leaf_queries,
    node_queries,
    bias,
    squared,
    positives,
    count,
    attempts,
    seed,
    ids,
    logs,
):
    """Draws for each query, each draw down the tree by itself; a node's sum is computed once a query.

    Args:
        sums, counts: the tree.
        features: (classes, …): what the kernel of one class is made of: K = s² + bias if `squared`, else s, with s the
            inner product with the leaf's query.
        block: classes of a leaf.
        leaf_queries, node_queries: (queries, …).
        positives: (queries, most): never drawn; -1 for none.
        seed: 64 bits.
        ids, logs: (queries, count): what is drawn, and the logarithms of the probabilities.
    """
    blocks, classes = sums.shape[0] // 2, features.shape[0]
    values = np.empty(2 * blocks)
    owner = np.full(2 * blocks, -1, np.int64)
    chances = np.empty(block)
    state = np.empty(1, np.uint64)
    for row in range(node_queries.shape[0]):
        query, leaf_query = node_queries[row], leaf_queries[row]
        state[0] = seed + np.uint64(row) * np.uint64(0xD1342543DE82EF95)
        # The mass of the positives, along their paths.
        taken = 0.0
        for p in range(positives.shape[1]):
            item = positives[row, p]
            again = item < 0
            for other in range(p):
                again = again or positives[row, other] == item
            if again:
                continue
            node = blocks + item // block
            chance = 1.0
            while node > 1:
                for child in (node, node ^ 1):
                    if owner[child] != row:
                        owner[child] = row
                        values[child] = node_value(sums, counts, child, query, bias)
                chance *= values[node] / (values[node] + values[node ^ 1])
                node >>= 1
            first = (item // block) * block
            last = min(first + block, classes)
            total = fill(features, first, last, leaf_query, bias, squared, chances)
            taken += chance * chances[item - first] / total
        free = np.log(max(1.0 - taken, 1e-12))
        for sample in range(count):
            for _ in range(attempts):
                node, chance = 1, 1.0
                while node < blocks:
                    left = 2 * node
                    for child in (left, left + 1):
                        if owner[child] != row:
                            owner[child] = row
                            values[child] = node_value(sums, counts, child, query, bias)
                    share = values[left] / (values[left] + values[left + 1])
                    if uniform(state) < share:
                        node = left
                        chance *= share
                    else:
                        node = left + 1
                        chance *= 1.0 - share
                first = (node - blocks) * block
                last = min(first + block, classes)
                total = fill(features, first, last, leaf_query, bias, squared, chances)
                rest, at = uniform(state) * total, 0
                while at < last - first - 1 and rest >= chances[at]:
                    rest -= chances[at]
                    at += 1
                item = first + at
                positive = False
                for p in range(positives.shape[1]):
                    positive = positive or positives[row, p] == item
                if not positive:
                    break
            ids[row, sample] = item
            logs[row, sample] = np.log(chance * chances[at] / total) - free


@kernels.kernel
def fill(features, first, last, query, bias, squared, out):  # type: ignore[no-untyped-def]
    """Writes the kernels of a block's classes to `out`, and returns their sum."""
    total = 0.0
    for item in range(first, last):
        score = np.float64(kernels.dot(features[item], query))
        value = score * score + bias if squared else max(score + bias, _FLOOR)
        out[item - first] = value
        total += value
    return total
