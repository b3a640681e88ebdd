"""Compiled pieces of the samplers. Random numbers come from counters, so that a result depends on the seed alone."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


def kernel(function: Any) -> Any:
    """Compiles a function, once for all processes; it releases the interpreter's lock."""
    return numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)(function)


@kernel
def mix(state):  # type: ignore[no-untyped-def]
    """Returns the SplitMix64 hash of a 64-bit state."""
    z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def below(bits, bound):  # type: ignore[no-untyped-def]
    """Returns an integer from 0 to bound - 1 out of 64 random bits (bound below 2**32; off by 2**-32 at most)."""
    return np.int64(((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@kernel
def unit(bits):  # type: ignore[no-untyped-def]
    """Returns a float in [0, 1) out of 64 random bits."""
    return np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@kernel
def sample_rows(indptr, targets, fanout, seed, chosen, counts):  # type: ignore[no-untyped-def]
    """Draws at most `fanout` entries of each target's row without replacement (Floyd's algorithm).

    Args:
        indptr: of the CSR matrix.
        targets: rows.
        fanout: entries a row; rows with no more give all.
        seed: 64 bits.
        chosen: (targets, fanout), receives positions in the CSR arrays.
        counts: (targets,), receives how many.
    """
    for row in range(targets.shape[0]):
        start = indptr[targets[row]]
        degree = indptr[targets[row] + 1] - start
        if degree <= fanout:
            for j in range(degree):
                chosen[row, j] = start + j
            counts[row] = degree
            continue
        state = mix(np.uint64(seed) ^ mix(np.uint64(targets[row])))
        for j in range(fanout):
            top = degree - fanout + j
            state = mix(state)
            pick = start + below(state, top + 1)
            for i in range(j):
                if chosen[row, i] == pick:
                    pick = start + top
                    break
            chosen[row, j] = pick
        counts[row] = fanout


@kernel
def renumber(targets, found, position, order):  # type: ignore[no-untyped-def]
    """Gives local numbers: the targets first, then others as they come; `found` is overwritten with them.

    Args:
        targets: node ids, all different.
        found: node ids.
        position: (nodes,) all -1; is left so.
        order: receives the node of each number; long enough for all.

    Returns:
        How many numbers were given.
    """
    count = 0
    for i in range(targets.shape[0]):
        position[targets[i]] = count
        order[count] = targets[i]
        count += 1
    for i in range(found.shape[0]):
        node = found[i]
        if position[node] < 0:
            position[node] = count
            order[count] = node
            count += 1
        found[i] = position[node]
    for i in range(count):
        position[order[i]] = -1
    return count


@kernel
def induced_size(indptr, indices, nodes, position):  # type: ignore[no-untyped-def]
    """Sets `position` of the nodes to their numbers, and returns the entries among them."""
    for i in range(nodes.shape[0]):
        position[nodes[i]] = i
    count = 0
    for i in range(nodes.shape[0]):
        for e in range(indptr[nodes[i]], indptr[nodes[i] + 1]):
            if position[indices[e]] >= 0:
                count += 1
    return count


@kernel
def induced_fill(indptr, indices, nodes, position, rows, columns, entries):  # type: ignore[no-untyped-def]
    """Writes the entries among the nodes, sorted by row, and sets `position` back to -1."""
    count = 0
    for i in range(nodes.shape[0]):
        for e in range(indptr[nodes[i]], indptr[nodes[i] + 1]):
            other = position[indices[e]]
            if other >= 0:
                rows[count], columns[count], entries[count] = i, other, e
                count += 1
    for i in range(nodes.shape[0]):
        position[nodes[i]] = -1


@kernel
def rows_between(indptr, indices, targets, position, rows, columns, entries):  # type: ignore[no-untyped-def]
    """Writes the entries of the targets' rows whose column has a number in `position`; returns how many."""
    count = 0
    for i in range(targets.shape[0]):
        for e in range(indptr[targets[i]], indptr[targets[i] + 1]):
            other = position[indices[e]]
            if other >= 0:
                rows[count], columns[count], entries[count] = i, other, e
                count += 1
    return count


@kernel
def all_entries(indptr, targets, rows, entries):  # type: ignore[no-untyped-def]
    """Writes row number and position of every entry of the targets' rows."""
    count = 0
    for i in range(targets.shape[0]):
        for e in range(indptr[targets[i]], indptr[targets[i] + 1]):
            rows[count], entries[count] = i, e
            count += 1


@kernel
def walk_nodes(indptr, indices, roots, length, seed, found):  # type: ignore[no-untyped-def]
    """Writes the nodes of uniform random walks: found[walk, step]; a walk that cannot go on stays where it is."""
    for w in range(roots.shape[0]):
        node = roots[w]
        state = mix(np.uint64(seed) ^ mix(np.uint64(w)))
        found[w, 0] = node
        for step in range(1, length + 1):
            degree = indptr[node + 1] - indptr[node]
            if degree:
                state = mix(state)
                node = indices[indptr[node] + below(state, degree)]
            found[w, step] = node


@kernel
def grow_parts(indptr, indices, order, parts, capacity, rounds):  # type: ignore[no-untyped-def]
    """Splits nodes into parts of at most `capacity` with few edges between them.

    Nodes in `order` join, one by one, the part with the most of their neighbours, weighed by its free room (linear
    deterministic greedy); then, in rounds, each moves to the part of most of its neighbours that has room.

    Returns:
        (nodes,) part numbers.
    """
    nodes = indptr.shape[0] - 1
    owner = np.full(nodes, -1, np.int32)
    sizes = np.zeros(parts, np.int64)
    votes = np.zeros(parts, np.int64)
    smallest = 0
    for turn in range(rounds + 1):
        for i in range(nodes):
            node = order[i]
            old = owner[node]
            for e in range(indptr[node], indptr[node + 1]):
                other = owner[indices[e]]
                if other >= 0 and indices[e] != node:
                    votes[other] += 1
            best, score = old, -1.0
            if old >= 0:
                score = np.float64(votes[old])
            for e in range(indptr[node], indptr[node + 1]):
                other = owner[indices[e]]
                if other < 0 or other == old or sizes[other] >= capacity:
                    continue
                weight = 1.0 if turn else 1.0 - sizes[other] / capacity
                if votes[other] * weight > score:
                    best, score = other, votes[other] * weight
            if best < 0:
                for p in range(parts):
                    if sizes[p] < sizes[smallest]:
                        smallest = p
                best = smallest
            for e in range(indptr[node], indptr[node + 1]):
                other = owner[indices[e]]
                if other >= 0:
                    votes[other] = 0
            if best != old:
                if old >= 0:
                    sizes[old] -= 1
                sizes[best] += 1
                owner[node] = best
    return owner
