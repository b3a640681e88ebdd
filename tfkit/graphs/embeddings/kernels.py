"""Compiled walks and skip-gram with negative sampling."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from tfkit.graphs.sampling.kernels import below, kernel, mix, unit

#: Sums may be taken in any order, so that they are taken eight and more at a time.
_FAST = {"reassoc", "contract", "nsz"}


def fast_kernel(function: Any) -> Any:
    """Compiles a function whose float sums may be reordered."""
    return numba.njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy", boundscheck=False)(function)


@kernel
def uniform_walks(indptr, indices, starts, length, seed, walks):  # type: ignore[no-untyped-def]
    """Writes uniform random walks of `length` nodes: (starts, length); -1 after a node without a way on."""
    for w in range(starts.shape[0]):
        node = starts[w]
        state = mix(np.uint64(seed) + mix(np.uint64(w)))
        walks[w, 0] = node
        for step in range(1, length):
            begin = indptr[node]
            degree = indptr[node + 1] - begin
            if degree == 0:
                walks[w, step:] = -1
                break
            state = mix(state)
            node = indices[begin + below(state, degree)]
            walks[w, step] = node


@kernel
def weighted_walks(indptr, indices, cumulated, starts, length, seed, walks):  # type: ignore[no-untyped-def]
    """The same, each step with a chance in proportion to the edge's weight (`cumulated` within each row)."""
    for w in range(starts.shape[0]):
        node = starts[w]
        state = mix(np.uint64(seed) + mix(np.uint64(w)))
        walks[w, 0] = node
        for step in range(1, length):
            state = mix(state)
            at = weighted_pick(indptr, cumulated, node, unit(state))
            if at < 0:
                walks[w, step:] = -1
                break
            node = indices[at]
            walks[w, step] = node


@kernel
def weighted_pick(indptr, cumulated, node, share):  # type: ignore[no-untyped-def]
    """Returns the position of the row's entry where its cumulated weight passes share of the sum; -1 for none."""
    low, high = indptr[node], indptr[node + 1] - 1
    if high < low:
        return -1
    wanted = share * cumulated[high]
    while low < high:
        middle = (low + high) >> 1
        if cumulated[middle] > wanted:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def adjacent(indptr, indices, a, b):  # type: ignore[no-untyped-def]
    """Whether there is an entry (a, b), by binary search in a sorted row."""
    low, high = indptr[a], indptr[a + 1]
    while low < high:
        middle = (low + high) >> 1
        if indices[middle] < b:
            low = middle + 1
        else:
            high = middle
    return low < indptr[a + 1] and indices[low] == b


@kernel
def biased_walks(indptr, indices, cumulated, weighted, starts, length, p, q, seed, walks):  # type: ignore[no-untyped-def]
    """node2vec's walks by rejection: a step is proposed by weight, and accepted with its bias over the largest one."""
    back, near, far = 1.0 / p, 1.0, 1.0 / q
    largest = max(back, near, far)
    smallest = min(back, near, far)
    for w in range(starts.shape[0]):
        node = starts[w]
        before = np.int64(-1)
        state = mix(np.uint64(seed) + mix(np.uint64(w)))
        walks[w, 0] = node
        for step in range(1, length):
            begin = indptr[node]
            degree = indptr[node + 1] - begin
            if degree == 0:
                walks[w, step:] = -1
                break
            while True:
                state = mix(state)
                if weighted:
                    other = indices[weighted_pick(indptr, cumulated, node, unit(state))]
                else:
                    other = indices[begin + below(state, degree)]
                if before < 0:
                    break
                state = mix(state)
                height = unit(state) * largest
                # Accepted without a look at the neighbours of the node before where every bias would do.
                if height < smallest:
                    break
                if other == before:
                    bias = back
                elif adjacent(indptr, indices, before, other):
                    bias = near
                else:
                    bias = far
                if height < bias:
                    break
            before, node = node, np.int64(other)
            walks[w, step] = node


@fast_kernel
def step_pair(center, context, gradient, label, rate):  # type: ignore[no-untyped-def]
    """One logistic step of a pair: moves `context`, and adds the center's share to `gradient`."""
    total = np.float32(0.0)
    for i in range(center.shape[0]):
        total += center[i] * context[i]
    # The logistic function is flat beyond; word2vec stops there too.
    if total > 6.0:
        sigma = np.float32(1.0)
    elif total < -6.0:
        sigma = np.float32(0.0)
    else:
        sigma = np.float32(1.0) / (np.float32(1.0) + np.exp(-total))
    g = rate * (label - sigma)
    for i in range(center.shape[0]):
        gradient[i] += g * context[i]
        context[i] += g * center[i]


@fast_kernel
def skip_gram(walks, window, negatives, table, first, last, rates, seed, centers, contexts):  # type: ignore[no-untyped-def]
    """Skip-gram with negative sampling over rows `first` to `last` of the walks; the learning rate falls along them.

    As word2vec: each position draws its window from 1 to `window`, and every pair has its own negatives.
    """
    dimension = centers.shape[1]
    gradient = np.empty(dimension, np.float32)
    state = mix(np.uint64(seed) + mix(np.uint64(first)))
    drawn = np.empty(negatives, np.int64)
    size = table.shape[0]
    length = walks.shape[1]
    for w in range(first, last):
        rate = np.float32(rates[0] + (rates[1] - rates[0]) * (w - first) / max(1, last - first))
        for i in range(length):
            node = walks[w, i]
            if node < 0:
                break
            state = mix(state)
            reach = 1 + below(state, window)
            for j in range(max(0, i - reach), min(length, i + reach + 1)):
                other = walks[w, j]
                if j == i or other < 0:
                    continue
                # Drawn together: the table is larger than the caches, and its reads then wait for each other no more.
                for n in range(negatives):
                    state = mix(state)
                    drawn[n] = table[below(state, size)]
                # As word2vec, the context's vector moves the input side, and the center's the output side.
                for d in range(dimension):
                    gradient[d] = 0.0
                vector = centers[other]
                step_pair(vector, contexts[node], gradient, np.float32(1.0), rate)
                for n in range(negatives):
                    if drawn[n] != node:
                        step_pair(vector, contexts[drawn[n]], gradient, np.float32(0.0), rate)
                for d in range(dimension):
                    vector[d] += gradient[d]


@fast_kernel
def edge_steps(sources, targets, cumulated, negatives, table, samples, rates, seed, centers, contexts):  # type: ignore[no-untyped-def]
    """LINE: edges drawn by weight, each with negatives; `contexts` may be `centers` itself (first order)."""
    dimension = centers.shape[1]
    gradient = np.empty(dimension, np.float32)
    state = mix(np.uint64(seed))
    size, count = table.shape[0], sources.shape[0]
    for s in range(samples):
        rate = np.float32(rates[0] + (rates[1] - rates[0]) * s / samples)
        state = mix(state)
        wanted = unit(state) * cumulated[count - 1]
        low, high = 0, count - 1
        while low < high:
            middle = (low + high) >> 1
            if cumulated[middle] > wanted:
                high = middle
            else:
                low = middle + 1
        source, target = sources[low], targets[low]
        for d in range(dimension):
            gradient[d] = 0.0
        step_pair(centers[source], contexts[target], gradient, np.float32(1.0), rate)
        for _ in range(negatives):
            state = mix(state)
            negative = table[below(state, size)]
            if negative != target and negative != source:
                step_pair(centers[source], contexts[negative], gradient, np.float32(0.0), rate)
        for d in range(dimension):
            centers[source, d] += gradient[d]


@fast_kernel
def similarity_steps(indptr, indices, alpha, negatives, samples, rates, seed, embedding):  # type: ignore[no-untyped-def]
    """VERSE: pairs of a node and the end of a PageRank walk from it, against uniform noise, one table of vectors."""
    nodes, dimension = embedding.shape
    gradient = np.empty(dimension, np.float32)
    state = mix(np.uint64(seed))
    # Biases as in the authors' program: without them a pair of no relation could not have the product 0.
    biases = (np.log(np.float64(nodes)), np.log(np.float64(nodes) / negatives))
    for s in range(samples):
        rate = np.float32(rates[0] + (rates[1] - rates[0]) * s / samples)
        state = mix(state)
        node = below(state, nodes)
        other = node
        while True:
            state = mix(state)
            degree = indptr[other + 1] - indptr[other]
            if degree == 0 or unit(state) >= alpha:
                break
            state = mix(state)
            other = np.int64(indices[indptr[other] + below(state, degree)])
        for d in range(dimension):
            gradient[d] = 0.0
        for turn in range(negatives + 1):
            if turn:
                state = mix(state)
                other = below(state, nodes)
            total = np.float64(0.0)
            for d in range(dimension):
                total += embedding[node, d] * embedding[other, d]
            bias = biases[0] if turn == 0 else biases[1]
            share = np.float32(rate * ((1.0 if turn == 0 else 0.0) - 1.0 / (1.0 + np.exp(bias - total))))
            for d in range(dimension):
                gradient[d] += share * embedding[other, d]
                embedding[other, d] += share * embedding[node, d]
        for d in range(dimension):
            embedding[node, d] += gradient[d]
