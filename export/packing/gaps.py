"""Gap symbols: a run of background elements as one Huffman symbol and a few plain bits.

Deep Compression stores gaps in a fixed number of bits and bridges longer ones with filler zeros. Here a gap below
2^s is its own symbol, and a larger one is its power of two with m further bits, the rest plain: the tail of the
distribution costs few table entries, and no gap is too long.

Han, Mao, Dally. Deep compression. https://arxiv.org/abs/1510.00149 (section 2, figure 2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tfkit.export.packing.bits import BitReader, BitWriter, PackError

MAX_GAP_BITS = 31
MAX_DIRECT = 8  # largest s


class GapCode(NamedTuple):
    """How gaps become symbols.

    Attributes:
        direct: s; gaps below 2**s are symbols of their own.
        mantissa: m <= s; bits below the leading one that belong to the symbol of a larger gap.
    """

    direct: int
    mantissa: int

    def split(self, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Symbols, plain bits and their count for each gap: int64 arrays of the gaps' shape."""
        gaps = gaps.astype(np.int64)
        small = gaps < 1 << self.direct
        power = np.frexp(np.maximum(gaps, 1).astype(np.float64))[1].astype(np.int64) - 1
        extra = np.where(small, 0, power - self.mantissa)
        top = np.where(small, 0, (gaps >> np.maximum(extra, 0)) & ((1 << self.mantissa) - 1))
        symbols = np.where(small, gaps, (1 << self.direct) + ((power - self.direct) << self.mantissa) + top)
        return symbols, np.where(small, 0, gaps & ((1 << np.maximum(extra, 0)) - 1)), extra

    def bases(self, symbols: int) -> tuple[np.ndarray, np.ndarray]:
        """(smallest gap of each symbol, plain bits that follow it): int64, shape (symbols,)."""
        index = np.arange(symbols, dtype=np.int64)
        beyond = np.maximum(index - (1 << self.direct), 0)
        power = self.direct + (beyond >> self.mantissa)
        large = index >= 1 << self.direct
        extra = np.where(large, power - self.mantissa, 0)
        top = (beyond & ((1 << self.mantissa) - 1)) | (1 << self.mantissa)
        return np.where(large, top << extra, index), extra

    @property
    def symbols(self) -> int:
        """Size of the whole alphabet."""
        return (1 << self.direct) + ((MAX_GAP_BITS - self.direct) << self.mantissa)

    def write(self, writer: BitWriter) -> None:
        """Writes s and m in four bits each."""
        writer.put(self.direct << 4 | self.mantissa, 8)

    @classmethod
    def read(cls, reader: BitReader) -> GapCode:
        """Reads what `write` wrote.

        Raises:
            PackError: s or m is out of range.
        """
        code = cls(reader.get(4), reader.get(4))
        if code.direct > MAX_DIRECT or code.mantissa > code.direct:
            raise PackError(f"damaged: gap code with s = {code.direct}, m = {code.mantissa}; 8 >= s >= m holds")
        return code


# What an encoder tries: fine and coarse, for short and for long tables.
GAP_CODES = tuple(
    GapCode(s, m) for s, m in ((1, 1), (2, 1), (3, 2), (4, 2), (4, 3), (5, 2), (5, 3), (5, 4), (6, 3), (6, 5), (7, 5))
)


def fixed_width_cost(gaps: np.ndarray, value_bits: int) -> tuple[int, int]:
    """Deep Compression before Huffman coding: gaps in the best fixed width, longer ones bridged by filler zeros.

    Args:
        gaps: background elements before each value, shape (values,).
        value_bits: bits of a value's index; a filler costs one as well.

    Returns:
        (bits of a gap, entries: values and fillers).
    """
    if not len(gaps):
        return 0, 0
    entries = {width: len(gaps) + int((gaps >> width).sum()) for width in range(1, 17)}
    width = min(entries, key=lambda w: entries[w] * (w + value_bits))
    return width, entries[width]
