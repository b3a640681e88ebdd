"""The packed file: header, directory, coded buffers, and the rest in one stream.

The byte layout is described in docs/pack_format.md.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from tfkit.export.packing import general
from tfkit.export.packing.bits import PackError, read_varint, write_varint
from tfkit.export.packing.flatbuffer import WeightBuffer, weight_buffers
from tfkit.export.packing.tensor import CodedTensor, decode_tensor, encode_tensor

MAGIC = b"TFK"
VERSION = 1
MODE_STORED, MODE_WHOLE, MODE_PARTS = 0, 1, 2
KIND_COPY, KIND_TENSOR = 0, 1
DEFAULT_MAX_BYTES = 512 << 20
_SMALL_FILE = 1 << 16
_MAX_PARTS = 4096  # bounds the work that a small hostile file can ask for
_REST_LIMIT = 1 << 12  # buffers up to this size may do better inside the rest


class Part(NamedTuple):
    """A buffer that the directory lists.

    Attributes:
        buffer: which bytes of the file.
        kind: KIND_COPY or KIND_TENSOR.
        payload: its bytes in the packed file.
        coded: where the bits went; of a copy, those of the original.
    """

    buffer: WeightBuffer
    kind: int
    payload: bytes
    coded: CodedTensor


class Packed(NamedTuple):
    """A packed file in memory.

    Attributes:
        data: the packed bytes.
        parts: the listed buffers; none when the file was packed as a whole.
        left: weight buffers that stayed in the rest.
        rest_bytes: the rest before packing.
        rest_packed_bytes: and after.
        rest_coding: its codec, in words.
    """

    data: bytes
    parts: list[Part]
    left: list[WeightBuffer]
    rest_bytes: int
    rest_packed_bytes: int
    rest_coding: str


def pack_parts(data: bytes) -> Packed:
    """Packs a file, the shortest way found.

    Args:
        data: any bytes.

    Returns:
        The packed file and what it is made of.
    """
    head = MAGIC
    checksum = zlib.crc32(data).to_bytes(4, "little")

    def header(mode: int) -> bytes:
        return head + bytes([VERSION << 4 | mode]) + checksum

    buffers = weight_buffers(data)
    parts, left = _code_buffers(data, buffers)
    parts, left = _settle_small_buffers(data, parts, left)
    best = _assemble(data, header(MODE_PARTS), parts, left) if parts else None
    if best is None or _lzma_may_win(data, len(best.data)):
        codec, payload = general.compress(data)
        whole = header(MODE_WHOLE) + write_varint(len(data)) + bytes([codec]) + payload
        if best is None or len(whole) < len(best.data):
            best = Packed(whole, [], buffers, len(data), len(payload), general.codec_name(codec))
        if not parts and data:
            lone = _code_buffers(data, [WeightBuffer(0, len(data), 8, (len(data),), "", "bytes")])[0]
            single = _assemble(data, header(MODE_PARTS), lone, buffers)
            if len(single.data) < len(best.data):
                best = single
    stored = header(MODE_STORED) + data
    if len(stored) <= len(best.data):
        best = Packed(stored, [], buffers, len(data), len(data), general.codec_name(general.STORED))
    return best


def _lzma_may_win(data: bytes, packed: int) -> bool:
    # LZMA's full search takes a second a megabyte. Its fast search is close to it on noisy data, and within a factor
    # on data with structure, which tells when it cannot win.
    if len(data) <= _SMALL_FILE:
        return True
    size = general.probe(data)
    return size < packed * (1.04 if size > len(data) // 2 else 1.6)


def _general_wins(content: bytes, coded: int) -> bool:
    return _lzma_may_win(content, coded) and len(general.compress(content, thorough=False)[1]) < coded


def _code_buffers(data: bytes, buffers: list[WeightBuffer]) -> tuple[list[Part], list[WeightBuffer]]:
    parts: list[Part] = []
    left: list[WeightBuffer] = []
    first: dict[bytes, int] = {}
    for buffer in buffers:
        if len(parts) == _MAX_PARTS:
            left.append(buffer)
            continue
        content = data[buffer.start : buffer.start + buffer.size]
        if content in first:
            original = parts[first[content]]
            payload = write_varint(first[content])
            parts.append(Part(buffer, KIND_COPY, payload, original.coded._replace(payload=payload)))
            continue
        coded = encode_tensor(content, buffer.width, buffer.shape)
        if coded is None or _general_wins(content, len(coded.payload)):
            left.append(buffer)
            continue
        first[content] = len(parts)
        parts.append(Part(buffer, KIND_TENSOR, coded.payload, coded))
    return parts, left


def _settle_small_buffers(
    data: bytes, parts: list[Part], left: list[WeightBuffer]
) -> tuple[list[Part], list[WeightBuffer]]:
    """Moves small buffers into the rest where that shortens the file."""
    rest = len(data) - sum(part.buffer.size for part in parts)
    if rest > _SMALL_FILE or any(part.kind == KIND_COPY for part in parts):
        return parts, left  # a long rest takes seconds a try; copies count on the numbering
    small = [part for part in parts if part.buffer.size <= _REST_LIMIT]
    best = len(_assemble(data, b"", parts, left).data)
    for part in sorted(small, key=lambda p: p.buffer.size)[:32]:
        without = [p for p in parts if p is not part]
        size = len(_assemble(data, b"", without, left).data)
        if size < best:
            best, parts, left = size, without, sorted([*left, part.buffer])
    return parts, left


def _assemble(data: bytes, header: bytes, parts: list[Part], left: list[WeightBuffer]) -> Packed:
    directory = [write_varint(len(data)), write_varint(len(parts))]
    rest: list[bytes] = []
    end = 0
    for part in parts:
        start, size = part.buffer.start, part.buffer.size
        directory += [
            write_varint(start - end),
            write_varint(size),
            bytes([part.kind]),
            write_varint(len(part.payload)),
        ]
        rest.append(data[end:start])
        end = start + size
    rest.append(data[end:])
    joined = b"".join(rest)
    codec, payload = general.compress(joined)
    directory.append(bytes([codec]))
    packed = b"".join([header, *directory, *(part.payload for part in parts), payload])
    return Packed(packed, parts, left, len(joined), len(payload), general.codec_name(codec))


def unpack_bytes(packed: bytes, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """Gives back the bytes that were packed.

    Args:
        packed: a packed file.
        max_bytes: the largest original to accept; a larger one is refused before any memory is taken for it.

    Returns:
        The original bytes; their checksum was right.

    Raises:
        PackError: the file is not a packed one, is damaged, or is larger than `max_bytes`.
    """
    view = memoryview(packed)
    if len(view) < 8 or view[:3] != MAGIC:
        raise PackError(f"not a packed file: it must begin with {MAGIC!r}, got {bytes(view[:4])!r}")
    version, mode = view[3] >> 4, view[3] & 15
    if version != VERSION or mode > MODE_PARTS:
        raise PackError(f"version {version}, mode {mode}; this reads version {VERSION}, modes 0 to 2: update tfkit")
    if mode == MODE_STORED:
        _check_size(len(view) - 8, max_bytes)
        data = bytes(view[8:])
    else:
        size, at = read_varint(view, 8)
        _check_size(size, max_bytes)
        if mode == MODE_WHOLE:
            data = general.decompress(view[at + 1 :], _byte(view, at), size)
        else:
            data = _unpack_parts(view, at, size)
    if zlib.crc32(data) != int.from_bytes(view[4:8], "little"):
        raise PackError("damaged: the checksum of the unpacked bytes is wrong")
    return data


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise PackError(f"the file declares {size} bytes, max_bytes allows {max_bytes}: raise it if you trust the file")


def _byte(view: memoryview, at: int) -> int:
    if at >= len(view):
        raise PackError(f"truncated: byte {at} wanted of {len(view)}")
    return view[at]


def _unpack_parts(view: memoryview, at: int, size: int) -> bytes:
    count, at = read_varint(view, at)
    if count > _MAX_PARTS:
        raise PackError(f"damaged: {count} buffers, at most {_MAX_PARTS} can be listed")
    entries: list[tuple[int, int, int, int]] = []
    end = 0
    for _ in range(count):
        gap, at = read_varint(view, at)
        length, at = read_varint(view, at)
        kind, (payload, at) = _byte(view, at), read_varint(view, at + 1)
        if kind > KIND_TENSOR or end + gap + length > size:
            raise PackError(f"damaged: a buffer of kind {kind} at {end + gap}, {length} bytes, in a file of {size}")
        entries.append((end + gap, length, kind, payload))
        end += gap + length
    codec = _byte(view, at)
    at += 1
    rest_size = size - sum(entry[1] for entry in entries)
    rest_at = at + sum(entry[3] for entry in entries)
    if rest_at > len(view):
        raise PackError(f"truncated: the rest begins at {rest_at} of {len(view)} bytes")
    rest = memoryview(general.decompress(view[rest_at:], codec, rest_size))
    out = np.empty(size, np.uint8)
    taken = end = 0
    for i, (start, length, kind, payload) in enumerate(entries):
        out[end:start] = np.frombuffer(rest[taken : taken + start - end], np.uint8)
        taken += start - end
        end = start + length
        if kind == KIND_TENSOR:
            decode_tensor(view[at : at + payload], out[start:end])
        else:
            number, used = read_varint(view[at : at + payload], 0)
            if number >= i or entries[number][1] != length or used != payload:
                raise PackError(f"damaged: buffer {i} is a copy of {number}")
            out[start:end] = out[entries[number][0] :][:length]
        at += payload
    out[end:] = np.frombuffer(rest[taken:], np.uint8)
    return out.tobytes()
