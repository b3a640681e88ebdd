"""The inner loops of packing and unpacking, compiled by numba.

Compiled code has no bounds checks of its own, so every index that a file decides is checked here by hand. Import this
module only where it is used: numba takes a second to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

OK, TRUNCATED, OUTSIDE = 0, 1, 2
PADDING = 8  # zero bytes that must follow a stream, so that peeking needs no check


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no writable cache directory: compile in every process
        return numba.njit(function)


@_compiled
def put_bits(values: np.ndarray, counts: np.ndarray, out: np.ndarray) -> None:
    """Writes the low `counts[i]` (at most 56) bits of each value, most significant first, into the zeroed `out`."""
    word = np.uint64(0)
    held: Any = 0
    at = 0
    for i in range(len(values)):
        count = np.int64(counts[i])
        if count == 0:
            continue
        word = (word << np.uint64(count)) | (values[i] & ((np.uint64(1) << np.uint64(count)) - np.uint64(1)))
        held += count
        while held >= 8:
            held -= 8
            out[at] = np.uint8((word >> np.uint64(held)) & np.uint64(255))
            at += 1
    if held:
        out[at] = np.uint8((word << np.uint64(8 - held)) & np.uint64(255))


def as_words(payload: bytes | memoryview) -> np.ndarray:
    """A stream as native uint32 words, most significant byte first, with the zero padding that peeking relies on."""
    size = (len(payload) + 3) // 4 * 4 + PADDING
    padded = np.zeros(size, np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    return padded.view(">u4").astype(np.uint32)


@_compiled
def _peek(words: np.ndarray, at: int, count: int) -> Any:
    # count <= 32 bits from bit `at`. Two shifts at the end, for one by 64 would be undefined when count is 0.
    word = (np.uint64(words[at >> 5]) << np.uint64(32)) | np.uint64(words[(at >> 5) + 1])
    return np.int64(((word << np.uint64(at & 31)) >> np.uint64(1)) >> np.uint64(63 - count))


@_compiled
def read_symbols(words: np.ndarray, at: int, end: int, table: np.ndarray, bits: int, out: np.ndarray) -> int:
    """Decodes len(out) symbols from `as_words`. Returns the bit behind them, or -1 when the stream ended."""
    for i in range(len(out)):
        entry: Any = np.int64(table[_peek(words, at, bits)])
        at += entry & 15
        if at > end:
            return -1
        out[i] = entry >> 4
    return at


@_compiled
def read_tensor(
    words: np.ndarray,  # from as_words
    at: int,  # first bit
    end: int,  # bits of the stream
    starts: np.ndarray,  # (classes + 1,) int64: where each class begins, counted in elements
    order: np.ndarray,  # (lines,) int64: lines in class order; empty: as they lie
    lines: int,
    length: int,  # elements a line
    transposed: bool,  # the lines are columns
    counts: np.ndarray,  # (classes,) int64: values each class codes
    sparse: bool,
    gap_tables: np.ndarray,  # all gap tables behind one another, uint32
    gap_at: np.ndarray,  # (classes,) int64
    gap_bits: np.ndarray,  # (classes,) int64
    gap_base: np.ndarray,  # (gap symbols,) int64
    gap_extra: np.ndarray,  # (gap symbols,) int64
    value_tables: np.ndarray,
    value_at: np.ndarray,
    value_bits: np.ndarray,
    codebook: np.ndarray,  # (values,) int64: the high bits
    low_bits: int,
    shift: int,
    zigzag: bool,
    width: int,  # bits an element: 4, 8, 16 or 32
    out: np.ndarray,  # uint8: the tensor's bytes, filled with the background
) -> tuple[int, int]:
    """Decodes one tensor into `out`. Returns (error code, bit behind the stream)."""
    size = width >> 3
    moved = transposed or len(order) > 0
    next_line, line_end, line = -1, 0, 0
    for c in range(len(counts)):
        position = starts[c] - 1
        for _ in range(counts[c]):
            position += 1
            if sparse:
                entry: Any = np.int64(gap_tables[gap_at[c] + _peek(words, at, gap_bits[c])])
                at += entry & 15
                if at > end:
                    return TRUNCATED, at
                symbol = entry >> 4
                extra = gap_extra[symbol]
                position += gap_base[symbol] + _peek(words, at, extra)
                at += extra
            if position >= starts[c + 1]:
                return OUTSIDE, at
            if at > end:
                return TRUNCATED, at
            entry = np.int64(value_tables[value_at[c] + _peek(words, at, value_bits[c])])
            at += entry & 15
            if at > end:
                return TRUNCATED, at
            value = (codebook[entry >> 4] << low_bits) | _peek(words, at, low_bits)
            at += low_bits
            if at > end:
                return TRUNCATED, at
            value <<= shift
            if zigzag:
                value = (value >> 1) ^ -(value & 1)
            index = position
            if moved:
                while position >= line_end:
                    next_line += 1
                    line_end += length
                    line = order[next_line] if len(order) else next_line
                inside = position - (line_end - length)
                index = inside * lines + line if transposed else line * length + inside
            if size == 1:
                out[index] = value & 255
            elif size:
                for b in range(size):
                    out[index * size + b] = (value >> (8 * b)) & 255
            else:
                high = 4 * (index & 1)
                out[index >> 1] = (out[index >> 1] & (0xF0 >> high)) | ((value & 15) << high)
    return OK, at


@_compiled
def read_zero_signs(words: np.ndarray, at: int, end: int, size: int, out: np.ndarray) -> tuple[int, int]:
    """Sets the top bit of each all-zero element of `size` bytes whose bit says so. Returns (error code, bit behind)."""
    for i in range(0, len(out), size):
        zero = True
        for b in range(size):
            zero = zero and out[i + b] == 0
        if zero:
            if at >= end:
                return TRUNCATED, at
            out[i + size - 1] = _peek(words, at, 1) << 7
            at += 1
    return OK, at
