"""How element values become Huffman symbols: a codebook of high bits, low bits plain.

With no low bits this is Deep Compression's codebook; with the mantissa as low bits it codes signs and exponents of
dense floats; on int8 it is plain Huffman coding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tfkit.export.packing.bits import BitReader, BitWriter, PackError
from tfkit.export.packing.huffman import MAX_SYMBOLS


class ValueCode(NamedTuple):
    """A bijection from element patterns to (symbol, low bits).

    Attributes:
        width: bits of an element: 4, 8, 16 or 32.
        zigzag: signed integers are folded first, so that small magnitudes have small patterns.
        shift: low bits that are zero in every value, dropped.
        low_bits: bits above those, stored plainly.
        codebook: the distinct high parts, ascending: int64.
    """

    width: int
    zigzag: bool
    shift: int
    low_bits: int
    codebook: np.ndarray

    def split(self, patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(symbols, low bits) of int64 patterns."""
        folded = (fold(patterns, self.width) if self.zigzag else patterns) >> self.shift
        return np.searchsorted(self.codebook, folded >> self.low_bits), folded & ((1 << self.low_bits) - 1)

    def write(self, writer: BitWriter) -> None:
        """Writes flags and codebook: first value, then steps less one, in Exp-Golomb code of the best order."""
        writer.put(self.zigzag, 1)
        writer.put(self.shift, 5)
        writer.put(self.low_bits, 5)
        writer.put_exp_golomb(len(self.codebook))
        if not len(self.codebook):
            return
        order, _ = codebook_cost(self.codebook)
        writer.put(order, 5)
        for step in _steps(self.codebook):
            writer.put_exp_golomb(int(step), order)

    @classmethod
    def read(cls, reader: BitReader, width: int) -> ValueCode:
        """Reads what `write` wrote.

        Args:
            reader: the stream.
            width: bits of an element.

        Raises:
            PackError: the parts do not fit an element, or the codebook is too long.
        """
        zigzag, shift, low_bits = bool(reader.get(1)), reader.get(5), reader.get(5)
        size = reader.get_exp_golomb()
        if size > MAX_SYMBOLS or shift + low_bits >= width:
            raise PackError(f"damaged: a codebook of {size} values above {shift} + {low_bits} of {width} bits")
        codebook = np.zeros(size, np.int64)
        if size:
            order, last = reader.get(5), -1
            for i in range(size):
                last += reader.get_exp_golomb(order) + 1
                codebook[i] = last
            if last >> (width - shift - low_bits):
                raise PackError(f"damaged: codebook value {last} does not fit {width} bits")
        return cls(width, zigzag, shift, low_bits, codebook)


def fold(patterns: np.ndarray, width: int) -> np.ndarray:
    """Two's complement patterns to 0, -1, 1, -2, ... = 0, 1, 2, 3, ..., as int64."""
    signed = (patterns ^ (1 << (width - 1))) - (1 << (width - 1))
    return (signed << 1) ^ (signed >> 63)


def _steps(codebook: np.ndarray) -> np.ndarray:
    return np.diff(codebook, prepend=-1) - 1


def codebook_cost(codebook: np.ndarray) -> tuple[int, int]:
    """(best Exp-Golomb order, bits of the codebook in it)."""
    steps = _steps(codebook)[None] + (np.int64(1) << np.arange(32, dtype=np.int64)[:, None])
    lengths = np.frexp(steps.astype(np.float64))[1].astype(np.int64)
    bits = (2 * lengths - np.arange(32)[:, None] - 1).sum(axis=1)
    order = int(bits.argmin())
    return order, int(bits[order])


def entropy_bits(counts: np.ndarray) -> float:
    """Bits that an ideal code with these counts spends: -sum n log2(n / N)."""
    counts = counts[counts > 0].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if len(counts) else 0.0


def choose_value_code(patterns: np.ndarray, counts: np.ndarray, width: int) -> tuple[ValueCode, float] | None:
    """The cheapest value code, by entropy and an estimate of its tables.

    Args:
        patterns: the distinct patterns, int64.
        counts: how often each occurs.
        width: bits of an element.

    Returns:
        (code, estimated bits), or None when no code has few enough symbols.
    """
    best: tuple[ValueCode, float] | None = None
    total = int(counts.sum())
    for zigzag in (False, True):
        folded = fold(patterns, width) if zigzag else patterns
        order = np.argsort(folded)
        folded, weights = folded[order], counts[order]
        merged = int(np.bitwise_or.reduce(folded)) if len(folded) else 0
        shift = min((merged & -merged).bit_length() - 1, width - 1) if merged else 0
        folded = folded >> shift
        for low_bits in range(width - shift - 1, -1, -1):
            high = folded >> low_bits
            first = np.flatnonzero(np.diff(high, prepend=-1))
            if len(first) > MAX_SYMBOLS:
                break
            codebook = high[first]
            grouped = np.add.reduceat(weights, first) if len(first) else weights
            tables = codebook_cost(codebook)[1] + 2.5 * len(codebook) if len(codebook) else 0.0
            cost = total * low_bits + entropy_bits(grouped) + tables
            if best is None or cost < best[1]:
                best = ValueCode(width, zigzag, shift, low_bits, codebook), cost
        if best is not None and best[0].low_bits == 0:
            break
    return best
