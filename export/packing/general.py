"""Stored, deflate and LZMA streams for what is not a weight buffer.

Deflate: RFC 1951. LZMA: Igor Pavlov's LZMA SDK, its raw streams without container.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable
from typing import Any

from tfkit.export.packing.bits import PackError
from tfkit.export.packing.dictionary import tflite_dictionary

STORED, DEFLATE, LZMA2, DEFLATE_PRESET, LZMA1 = 0, 1, 2, 3, 16  # LZMA1 + (pb * 5 + lp) * 9 + lc, with lc + lp <= 4
_MAX_DICTIONARY = 1 << 26
_PADDING = bytes(16)
_SMALL = 1 << 16
_TRIM_LIMIT = 1 << 20
_SETTINGS = [(lc, lp, pb) for lp in range(5) for lc in range(5 - lp) for pb in range(3)]


def dictionary_size(size: int) -> int:
    """LZMA's dictionary for a stream of `size` bytes: the next power of two, from 4 KiB to 64 MiB."""
    return min(max(1 << max(size - 1, 0).bit_length(), 4096), _MAX_DICTIONARY)


def _filters(codec: int, size: int, fast: bool = False) -> list[dict[str, int]]:
    search = {"dict_size": dictionary_size(size), "mode": lzma.MODE_NORMAL, "nice_len": 273, "mf": lzma.MF_BT4}
    search["depth"] = 512
    if fast:
        search |= {"mode": lzma.MODE_FAST, "nice_len": 64, "mf": lzma.MF_HC4, "depth": 8}
    if codec == LZMA2:
        return [{"id": lzma.FILTER_LZMA2, **search, "lc": 3, "lp": 0, "pb": 2}]
    properties = codec - LZMA1
    lc, lp, pb = properties % 9, properties // 9 % 5, properties // 45
    return [{"id": lzma.FILTER_LZMA1, **search, "lc": lc, "lp": lp, "pb": pb}]


def compress_with(data: bytes, codec: int) -> bytes:
    """One stream in the given codec; `data` must not be empty."""
    if codec == STORED:
        return data
    if codec in (DEFLATE, DEFLATE_PRESET):
        preset: dict[str, Any] = {"zdict": tflite_dictionary()} if codec == DEFLATE_PRESET else {}
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, **preset)
        return deflate.compress(data) + deflate.flush()
    stream = lzma.compress(data, format=lzma.FORMAT_RAW, filters=_filters(codec, len(data)))
    if codec == LZMA2:
        return stream
    # The first byte is always 0, and most of the last ones only flush the coder: the decoder puts zeros in their place.
    stream = stream[1:]
    if len(data) <= _TRIM_LIMIT:
        while stream and decompress(stream[:-1], codec, len(data), strict=False) == data:
            stream = stream[:-1]
    return stream


def compress(data: bytes, *, thorough: bool = True) -> tuple[int, bytes]:
    """The shortest stream found.

    Args:
        data: what to compress.
        thorough: whether to try every LZMA setting on up to 64 KiB, rather than the two usual ones.

    Returns:
        (codec, payload).
    """
    best = STORED, data
    if not data:
        return best
    small = len(data) <= _SMALL
    codecs: Iterable[int] = [LZMA2, DEFLATE, DEFLATE_PRESET] if small else [LZMA2, DEFLATE]
    if small and thorough:
        codecs = [*codecs, *_most_promising(data, [LZMA1 + (pb * 5 + lp) * 9 + lc for lc, lp, pb in _SETTINGS])]
    elif len(data) <= _TRIM_LIMIT:
        codecs = [*codecs, LZMA1 + (2 * 5 + 2) * 9]  # lc 0, lp 2, pb 2: four-byte elements
    for codec in codecs:
        # Deflate is slow on long runs, where LZMA is far ahead of it.
        if codec == DEFLATE and not small and len(best[1]) < 0.9 * len(data):
            continue
        payload = compress_with(data, codec)
        if len(payload) < len(best[1]):
            best = codec, payload
    return best


def _most_promising(data: bytes, codecs: list[int]) -> list[int]:
    sizes = {
        codec: len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=_filters(codec, len(data)))) for codec in codecs
    }
    return sorted(codecs, key=lambda codec: sizes[codec])[:2]


def probe(data: bytes) -> int:
    """Roughly what `compress` would give, in bytes, found several times faster."""
    if not data:
        return 0
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=_filters(LZMA2, len(data), fast=True)))


def decompress(payload: bytes | memoryview, codec: int, size: int, *, strict: bool = True) -> bytes:
    """Decodes a stream.

    Args:
        payload: the stream.
        codec: as `compress` gave it.
        size: bytes to give; no more are ever produced.
        strict: whether a stream of another size is an error.

    Returns:
        The data; without `strict`, whatever came out, b"" for a damaged stream.

    Raises:
        PackError: unknown codec, damaged stream, or another size.
    """
    try:
        data = _decompress(bytes(payload), codec, size)
    except (lzma.LZMAError, zlib.error, EOFError) as error:
        if not strict:
            return b""
        raise PackError(f"damaged: {error}") from None
    if strict and len(data) != size:
        raise PackError(f"damaged: a stream gave {len(data)} bytes where {size} were declared")
    return data


def _decompress(payload: bytes, codec: int, size: int) -> bytes:
    if codec == STORED:
        return payload
    if not size:
        return b"" if not payload else payload
    if codec == DEFLATE:
        return zlib.decompressobj(-15).decompress(payload, size)
    if codec == DEFLATE_PRESET:
        return zlib.decompressobj(-15, zdict=tflite_dictionary()).decompress(payload, size)
    properties = codec - LZMA1
    if codec != LZMA2 and not (0 <= properties < 225 and properties % 9 + properties // 9 % 5 <= 4):
        raise PackError(f"damaged: no codec has number {codec}")
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(codec, size))
    return decoder.decompress(payload if codec == LZMA2 else b"\0" + payload + _PADDING, size)


def codec_name(codec: int) -> str:
    """A codec in words."""
    if codec < LZMA1:
        return ["stored", "deflate", "LZMA2", "deflate with preset dictionary"][codec]
    properties = codec - LZMA1
    return f"LZMA lc={properties % 9} lp={properties // 9 % 5} pb={properties // 45}"
