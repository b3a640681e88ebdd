"""Bit streams and variable-length integers, the alphabet of the packed format.

Bits fill each byte from the most significant down, so that canonical codes compare as numbers. The reader is for
headers and tables; the long streams are read by `tfkit.export.packing.kernels`.
"""

from __future__ import annotations

import numpy as np

MAX_VARINT_BYTES = 9  # 63 bits: every value fits a signed 64-bit integer


class PackError(ValueError):
    """A packed file that is damaged, truncated, foreign, or larger than the caller allowed."""


def write_varint(value: int) -> bytes:
    """Little-endian base 128: seven bits a byte, the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Reads a varint.

    Args:
        data: the packed file.
        at: offset of the first byte.

    Returns:
        (value, offset behind it).

    Raises:
        PackError: the data end inside the integer, or it is longer than 63 bits.
    """
    value = 0
    for i in range(MAX_VARINT_BYTES):
        if at + i >= len(data):
            raise PackError(f"truncated: an integer at byte {at} runs past the end of {len(data)} bytes")
        byte = data[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise PackError(f"damaged: the integer at byte {at} is longer than {MAX_VARINT_BYTES} bytes")


class BitWriter:
    """Collects (value, bit count) tokens; `getvalue` lays them out in one pass."""

    def __init__(self) -> None:
        self._values: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._pending: list[tuple[int, int]] = []
        self.bits = 0

    def put(self, value: int, count: int) -> None:
        """Appends the `count` low bits of `value` (at most 56)."""
        self._pending.append((value, count))
        self.bits += count

    def put_many(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Appends many tokens; `values` and `counts` have one shape, tokens of zero bits vanish."""
        self._flush()
        self._values.append(values.astype(np.uint64).ravel())
        self._counts.append(counts.astype(np.uint8).ravel())
        self.bits += int(counts.sum(dtype=np.int64))

    def _flush(self) -> None:
        if self._pending:
            pairs = np.array(self._pending, np.uint64)
            self._values.append(pairs[:, 0])
            self._counts.append(pairs[:, 1].astype(np.uint8))
            self._pending = []

    def put_exp_golomb(self, value: int, order: int = 0) -> None:
        """Appends `value` >= 0 in Exp-Golomb code of the given order (see `exp_golomb_bits`)."""
        width = exp_golomb_bits(value, order)
        shifted = value + (1 << order)
        length = shifted.bit_length()
        self.put(0, width - length)
        self.put(shifted, length)

    def getvalue(self) -> bytes:
        """The stream, its last byte filled up with zero bits."""
        from tfkit.export.packing import kernels

        self._flush()
        if not self._values:
            return b""
        out = np.zeros((self.bits + 7) // 8 + 8, np.uint8)
        kernels.put_bits(np.concatenate(self._values), np.concatenate(self._counts), out)
        return out[: (self.bits + 7) // 8].tobytes()


def exp_golomb_bits(value: int, order: int = 0) -> int:
    """Bits of the Exp-Golomb code: value + 2^order in binary, after as many zeros as it has bits beyond order + 1."""
    return 2 * (value + (1 << order)).bit_length() - order - 1


class BitReader:
    """Reads a bit stream, refusing to run past its end.

    Args:
        data: the stream's bytes.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self.bits = 8 * len(data)
        self.at = 0

    def get(self, count: int) -> int:
        """The next `count` bits as a number.

        Raises:
            PackError: fewer bits are left.
        """
        end = self.at + count
        if end > self.bits:
            raise PackError(f"truncated: bit {end} wanted of a stream of {self.bits}")
        first, last = self.at >> 3, (end + 7) >> 3
        word = int.from_bytes(self._data[first:last], "big")
        self.at = end
        return word >> (8 * last - end) & ((1 << count) - 1)

    def get_exp_golomb(self, order: int = 0) -> int:
        """The next number in Exp-Golomb code.

        Raises:
            PackError: the stream ends, or the number has more than 48 bits.
        """
        zeros = 0
        while not self.get(1):
            zeros += 1
            if zeros + order > 47:
                raise PackError("damaged: an Exp-Golomb number has more than 48 bits")
        return (1 << (zeros + order) | self.get(zeros + order)) - (1 << order)
