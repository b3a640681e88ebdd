"""Compiled pieces that the indexes share: inner products and the list of the best found so far.

All release the interpreter's lock, so that threads run side by side.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

#: Sums may be taken in any order, so that they are taken eight and more at a time; NaN and infinities stay as they are.
FAST = {"reassoc", "contract", "nsz"}
#: Scores that are compared at a time, and, where one of them counts, of these so many at a time.
_TOGETHER, _FEWER = 128, 32


def kernel(function: Any) -> Any:
    """Compiles a function, once for all processes."""
    return numba.njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy", boundscheck=False)(function)


@kernel
def dot(a, b):  # type: ignore[no-untyped-def]
    """Returns the inner product of two vectors."""
    total = np.float32(0.0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@kernel
def offer(scores, ids, count, score, item):  # type: ignore[no-untyped-def]
    """Puts an item into a heap of the best, its worst on top, if it belongs there.

    Of equal scores the lower id is the better one.

    Args:
        scores, ids: the heap's arrays; their length is its capacity.
        count: items in it.
        score, item: what is offered.

    Returns:
        The items in it now.
    """
    capacity = scores.shape[0]
    if score != score:  # Not a number: no order would hold.
        score = np.float32(-np.inf)
    if count < capacity:
        at = count
        while at > 0:
            parent = (at - 1) >> 1
            if scores[parent] < score or (scores[parent] == score and ids[parent] > item):
                break
            scores[at], ids[at] = scores[parent], ids[parent]
            at = parent
        scores[at], ids[at] = score, item
        return count + 1
    if score < scores[0] or (score == scores[0] and item > ids[0]):
        return count
    at = 0
    while True:
        child = 2 * at + 1
        if child >= capacity:
            break
        other = child + 1
        if other < capacity and (
            scores[other] < scores[child] or (scores[other] == scores[child] and ids[other] > ids[child])
        ):
            child = other
        if score < scores[child] or (score == scores[child] and item > ids[child]):
            break
        scores[at], ids[at] = scores[child], ids[child]
        at = child
    scores[at], ids[at] = score, item
    return count


@kernel
def offer_block(block, items, rows, scores, ids, counts):  # type: ignore[no-untyped-def]
    """Offers a block of scores to the heaps of their queries.

    Most scores are worse than the heap's worst: many at a time are passed over by comparisons without a branch.

    Args:
        block: (queries, items).
        items: ids of the columns.
        rows: for each row of the block, the place of its query in what follows.
        scores, ids, counts: the heaps, see `empty_heaps`.
    """
    for position in range(block.shape[0]):
        row, query = block[position], rows[position]
        heap, held, count = scores[query], ids[query], counts[query]
        at = 0
        while at < row.shape[0] and count < heap.shape[0]:
            count = offer(heap, held, count, row[at], items[at])
            at += 1
        # Lengths that the compiler knows give whole registers, and a bool no more than a bit for each score.
        while at + _TOGETHER <= row.shape[0]:
            bound, above = heap[0], False
            for i in range(_TOGETHER):
                above |= row[at + i] >= bound
            if above:
                for first in range(at, at + _TOGETHER, _FEWER):
                    above = False
                    for i in range(_FEWER):
                        above |= row[first + i] >= heap[0]
                    if above:
                        for i in range(first, first + _FEWER):
                            if row[i] >= heap[0]:
                                count = offer(heap, held, count, row[i], items[i])
            at += _TOGETHER
        while at < row.shape[0]:
            if row[at] >= heap[0]:
                count = offer(heap, held, count, row[at], items[at])
            at += 1
        counts[query] = count


@kernel
def sort_heaps(scores, ids, counts):  # type: ignore[no-untyped-def]
    """Turns each heap into a list, the best first; what was never filled becomes -inf and -1."""
    for query in range(scores.shape[0]):
        heap, held, count = scores[query], ids[query], counts[query]
        for i in range(count, heap.shape[0]):
            heap[i] = -np.inf
            held[i] = -1
        # The worst of what is left goes to the end, as heapsort has it.
        for last in range(count - 1, 0, -1):
            worst, item = heap[0], held[0]
            score, moved = heap[last], held[last]
            at = 0
            while True:
                child = 2 * at + 1
                if child >= last:
                    break
                other = child + 1
                if other < last and (
                    heap[other] < heap[child] or (heap[other] == heap[child] and held[other] > held[child])
                ):
                    child = other
                if score < heap[child] or (score == heap[child] and moved > held[child]):
                    break
                heap[at], held[at] = heap[child], held[child]
                at = child
            heap[at], held[at] = score, moved
            heap[last], held[last] = worst, item


@kernel
def ordered(scores, ids, k):  # type: ignore[no-untyped-def]
    """Returns scores, float32, and ids, int64, each (queries, k), of lists that another library found.

    Args:
        scores: (queries, at most k), the best first; NaN where nothing was found.
        ids: of the same shape, of any integer type, and of equal scores in any order.
        k: wanted.

    Returns:
        The lists, of equal scores the lower id first; where there is nothing, -inf and -1.
    """
    best, named = np.empty((scores.shape[0], k), np.float32), np.empty((scores.shape[0], k), np.int64)
    for query in range(scores.shape[0]):
        count = 0
        for place in range(scores.shape[1]):
            score, item = np.float32(scores[query, place]), np.int64(ids[query, place])
            if score != score:
                continue
            at = count
            while at > 0 and (
                best[query, at - 1] < score or (best[query, at - 1] == score and named[query, at - 1] > item)
            ):
                best[query, at], named[query, at] = best[query, at - 1], named[query, at - 1]
                at -= 1
            best[query, at], named[query, at] = score, item
            count += 1
        for place in range(count, k):
            best[query, place], named[query, place] = -np.inf, -1
    return best, named


@kernel
def next_random(state):  # type: ignore[no-untyped-def]
    """Returns the generator's next state and a random word (splitmix64)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    word = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state, word ^ (word >> np.uint64(31))


@kernel
def started(seed, bits):  # type: ignore[no-untyped-def]
    """Returns where the generator starts for a seed and a query, given as the bits of its numbers, uint32."""
    state = np.uint64(seed)
    for t in range(bits.shape[0]):
        _, state = next_random(state ^ np.uint64(bits[t]))
    return state


def empty_heaps(queries: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scores, ids and counts of empty heaps for so many queries."""
    return np.empty((queries, k), np.float32), np.empty((queries, k), np.int64), np.zeros(queries, np.int64)
