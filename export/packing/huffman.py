"""Canonical Huffman codes: lengths from counts, codes from lengths, decoding tables, and lengths in few bits.

Huffman. A method for the construction of minimum-redundancy codes. Proc. IRE 40, 1952.
Differs: code lengths are limited to 15 bits, by flattening the counts until they fit.
"""

from __future__ import annotations

import heapq

import numpy as np

from tfkit.export.packing.bits import BitReader, BitWriter, PackError, exp_golomb_bits

MAX_LENGTH = 15
MAX_SYMBOLS = 4096


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Lengths of a minimum-redundancy code.

    Args:
        counts: how often each symbol occurs: integers, shape (symbols,).

    Returns:
        uint8 lengths, shape (symbols,): 0 for a symbol that does not occur, at most 15. A single occurring symbol
        also has length 0, for it needs no bits; `single_symbol` tells the two apart.
    """
    counts = np.asarray(counts, np.int64)
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.uint8)
    if len(used) < 2:
        return lengths
    weights = counts[used]
    while True:
        depth = _tree_depths(weights)
        if depth.max() <= MAX_LENGTH:
            lengths[used] = depth
            return lengths
        weights = weights // 2 + 1


def _tree_depths(weights: np.ndarray) -> np.ndarray:
    # Ties are broken by age, which keeps the tree flat.
    count = len(weights)
    parent = np.zeros(2 * count - 1, np.int64)
    heap = [(int(w), i) for i, w in enumerate(weights)]
    heapq.heapify(heap)
    for node in range(count, 2 * count - 1):
        a, i = heapq.heappop(heap)
        b, j = heapq.heappop(heap)
        parent[i] = parent[j] = node
        heapq.heappush(heap, (a + b, node))
    depth = np.zeros(2 * count - 1, np.int64)
    for node in range(2 * count - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[:count]


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Canonical codes: shorter before longer, equal lengths in symbol order, each the last plus one, as in deflate.

    Args:
        lengths: shape (symbols,).

    Returns:
        uint32 codes, shape (symbols,).
    """
    lengths = np.asarray(lengths, np.int64)
    codes = np.zeros(len(lengths), np.uint32)
    code = 0
    for length in range(1, int(lengths.max(initial=0)) + 1):
        symbols = np.flatnonzero(lengths == length)
        codes[symbols] = code + np.arange(len(symbols))
        code = (code + len(symbols)) << 1
    return codes


def decode_table(lengths: np.ndarray, single: int) -> tuple[np.ndarray, int]:
    """A one-step decoding table, indexed by the next bits of the stream.

    Args:
        lengths: shape (symbols,).
        single: the symbol to give without reading a bit when all lengths are 0.

    Returns:
        (uint32 entries symbol * 16 + length, shape (2**bits,); bits).

    Raises:
        PackError: the lengths are no complete prefix code.
    """
    lengths = np.asarray(lengths, np.int64)
    bits = int(lengths.max(initial=0))
    if bits == 0:
        return np.array([single << 4], np.uint32), 0
    used = np.flatnonzero(lengths)
    if bits > MAX_LENGTH or int((1 << (bits - lengths[used])).sum()) != 1 << bits:
        raise PackError("damaged: code lengths that form no complete prefix code")
    order = used[np.argsort(lengths[used], kind="stable")]
    return np.repeat((order << 4 | lengths[order]).astype(np.uint32), 1 << (bits - lengths[order])), bits


def single_symbol(counts: np.ndarray) -> int:
    """The first symbol that occurs, 0 when none does."""
    used = np.flatnonzero(counts)
    return int(used[0]) if len(used) else 0


def write_lengths(writer: BitWriter, lengths: np.ndarray, single: int) -> None:
    """Writes code lengths, each as a step from the last non-zero one (from 4 at the start).

    `1` says that at most one symbol occurs, and its number follows in Exp-Golomb code. Otherwise `0` and, for each
    symbol: `0` same, `10s` a step of 1 (s = 1: down), `110s` a step of 2, `1110` a run of absent symbols (Exp-Golomb:
    how many beyond one), `1111` the length in 4 bits.

    Args:
        writer: the stream.
        lengths: shape (symbols,).
        single: the only symbol, used when all lengths are 0.
    """
    if not np.any(lengths):
        writer.put(1, 1)
        writer.put_exp_golomb(single)
        return
    writer.put(0, 1)
    last, at = 4, 0
    values = [int(x) for x in lengths]
    while at < len(values):
        value = values[at]
        step = abs(value - last)
        if value == 0:
            run = 1
            while at + run < len(values) and values[at + run] == 0:
                run += 1
            writer.put(0b1110, 4)
            writer.put_exp_golomb(run - 1)
            at += run
            continue
        if step == 0:
            writer.put(0, 1)
        elif step <= 2:
            writer.put(((1 << step) - 1) << 2 | (value < last), step + 2)
        else:
            writer.put(0b1111 << 4 | value, 8)
        last = value
        at += 1


def length_table_bits(lengths: np.ndarray) -> int:
    """Bits that `write_lengths` spends on a table with at least two symbols."""
    lengths = np.asarray(lengths, np.int64)
    used = lengths[lengths > 0]
    step = np.abs(np.diff(used, prepend=4))
    bits = 1 + int(np.choose(np.minimum(step, 3), (1, 3, 4, 8)).sum())
    edges = np.flatnonzero(np.diff((lengths == 0).astype(np.int8), prepend=0, append=0))
    return bits + sum(4 + exp_golomb_bits(int(run) - 1) for run in edges[1::2] - edges[::2])


def read_lengths(reader: BitReader, symbols: int) -> tuple[np.ndarray, int]:
    """Reads what `write_lengths` wrote.

    Args:
        reader: the stream.
        symbols: size of the alphabet.

    Returns:
        (uint8 lengths of shape (symbols,), the single symbol or 0).

    Raises:
        PackError: the stream ends early or names a length or symbol out of range.
    """
    lengths = np.zeros(symbols, np.uint8)
    if reader.get(1):
        single = reader.get_exp_golomb()
        if single >= symbols:
            raise PackError(f"damaged: symbol {single} of an alphabet of {symbols}")
        return lengths, single
    last, at = 4, 0
    while at < symbols:
        if not reader.get(1):
            value = last
        elif not reader.get(1):
            value = last - 1 if reader.get(1) else last + 1
        elif not reader.get(1):
            value = last - 2 if reader.get(1) else last + 2
        elif not reader.get(1):
            at += reader.get_exp_golomb() + 1
            if at > symbols:
                raise PackError(f"damaged: a run of absent symbols passes the alphabet of {symbols}")
            continue
        else:
            value = reader.get(4)
        if not 1 <= value <= MAX_LENGTH:
            raise PackError(f"damaged: code length {value}; 1 to {MAX_LENGTH} exist")
        lengths[at] = last = value
        at += 1
    return lengths, 0
