"""Lossless entropy coding of .tflite files: `pack`, `unpack`, and the same in memory.

Han, Mao, Dally. Deep compression: compressing deep neural networks with pruning, trained quantization and Huffman
coding. https://arxiv.org/abs/1510.00149 (sections 2 to 4).
Differs: any file can be packed; what no codebook suits is coded by LZMA or deflate, or stored. See docs/pack_format.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tfkit.export.packing.bits import PackError
from tfkit.export.packing.container import DEFAULT_MAX_BYTES, KIND_COPY, Part, pack_parts, unpack_bytes
from tfkit.export.packing.flatbuffer import WeightBuffer
from tfkit.internal.files import write_atomically

__all__ = ["BufferRow", "PackError", "PackResult", "pack", "pack_bytes", "unpack", "unpack_bytes"]

SUFFIX = ".tfk"
_OVERHEAD_BYTES = 8  # of a stored file; no packed file is longer than its original by more


class BufferRow(NamedTuple):
    """One weight buffer of a packed file. Bytes and bits are counted in the packed stream, none is an estimate.

    Attributes:
        name: the tensor's name.
        dtype: the tensor's type.
        shape: the tensor's shape.
        coding: "sparse" (gaps and values), "dense" (values), "copy" of an earlier buffer, or "rest": left in the
            stream that holds everything else, where its bytes cannot be told apart.
        size_bytes: before.
        packed_bytes: after, tables included; None in the rest.
        elements: number of elements.
        coded: values in the stream: all of a dense buffer; of a sparse one those that are not the background.
        distinct: symbols of the codebook.
        classes: classes of rows or columns with tables of their own.
        fixed_value_bits: bits of a value before Huffman coding.
        value_bits: average bits of a value after it.
        fixed_index_bits: bits of an index before Huffman coding, in Deep Compression's fixed-width code; 0: dense.
        index_bits: average bits of an index after it.
        fixed_entries: (index, value) pairs of the fixed-width code, filler zeros included.
        value_bytes, index_bytes: the streams.
        table_bytes: codebook, Huffman tables and header.
        zero_sign_bytes: what telling -0.0 from 0.0 cost.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    size_bytes: int
    packed_bytes: int | None
    elements: int
    coded: int
    distinct: int
    classes: int
    fixed_value_bits: int
    value_bits: float
    fixed_index_bits: int
    index_bits: float
    fixed_entries: int
    value_bytes: float
    index_bytes: float
    table_bytes: float
    zero_sign_bytes: float

    @property
    def density(self) -> float:
        """Share of the elements that are coded: of a pruned tensor, the weights kept."""
        return self.coded / self.elements if self.elements else 0.0

    @property
    def fixed_bytes(self) -> float:
        """Bytes before Huffman coding: (index, value) pairs of fixed width and the codebook's values."""
        codebook = self.distinct * self.size_bytes / self.elements if self.elements else 0.0
        return self.fixed_entries * (self.fixed_value_bits + self.fixed_index_bits) / 8 + codebook


class PackResult(NamedTuple):
    """What `pack` wrote.

    Attributes:
        path: the packed file.
        size_bytes: its size.
        raw_size_bytes: the original's.
        buffers: one row a weight buffer, in file order.
        rest_bytes: everything outside coded buffers, before.
        rest_packed_bytes: and after.
        rest_coding: how, in words.
    """

    path: Path
    size_bytes: int
    raw_size_bytes: int
    buffers: tuple[BufferRow, ...]
    rest_bytes: int
    rest_packed_bytes: int
    rest_coding: str

    @property
    def ratio(self) -> float:
        """Original over packed size."""
        return self.raw_size_bytes / self.size_bytes

    @property
    def overhead_bytes(self) -> int:
        """Header and directory."""
        return self.size_bytes - self.rest_packed_bytes - sum(row.packed_bytes or 0 for row in self.buffers)


def pack(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, force: bool = False) -> PackResult:
    """Packs a file without loss.

    Args:
        path: a .tflite file; any other file is packed as a whole.
        out: the packed file; by default `path` with ".tfk" appended.
        force: whether to replace an existing `out`.

    Returns:
        Sizes and a row a weight buffer.

    Raises:
        FileNotFoundError: there is no file at `path`.
        FileExistsError: `out` exists and `force` is not set.
    """
    source = Path(path)
    target = Path(out) if out is not None else source.with_name(source.name + SUFFIX)
    _check_target(source, target, force)
    data = source.read_bytes()
    packed = pack_parts(data)
    write_atomically(target, packed.data)
    rows = [_part_row(part) for part in packed.parts] + [_left_row(buffer) for buffer in packed.left]
    starts = [part.buffer.start for part in packed.parts] + [buffer.start for buffer in packed.left]
    ordered = tuple(row for _, row in sorted(zip(starts, rows, strict=True), key=lambda pair: pair[0]))
    return PackResult(
        target, len(packed.data), len(data), ordered, packed.rest_bytes, packed.rest_packed_bytes, packed.rest_coding
    )


def unpack(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Path:
    """Writes the original of a packed file; nothing is written unless its checksum is right.

    Args:
        path: a file of `pack`.
        out: the file to write; by default `path` without its ".tfk".
        force: whether to replace an existing `out`.
        max_bytes: the largest original to accept.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: there is no file at `path`.
        FileExistsError: `out` exists and `force` is not set.
        PackError: the file is no packed file, is damaged, or is larger than `max_bytes`.
        ValueError: `out` is missing and `path` does not end in ".tfk".
    """
    source = Path(path)
    if out is None and source.suffix != SUFFIX:
        raise ValueError(f"out must be given when path does not end in {SUFFIX!r}, got path {str(source)!r}")
    target = Path(out) if out is not None else source.with_suffix("")
    _check_target(source, target, force)
    if source.stat().st_size > max_bytes + _OVERHEAD_BYTES:
        raise PackError(f"max_bytes allows {max_bytes}, {source} itself has {source.stat().st_size}: raise max_bytes")
    write_atomically(target, unpack_bytes(source.read_bytes(), max_bytes))
    return target


def pack_bytes(data: bytes) -> bytes:
    """Packs bytes in memory: the content of the file that `pack` would write."""
    return pack_parts(data).data


def _check_target(source: Path, target: Path, force: bool) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"path must name a file, got {str(source)!r}, which is none")
    if target.exists() and (not force or target.samefile(source)):
        remedy = "give another out" if target.samefile(source) else "give another out, or force=True to replace it"
        raise FileExistsError(f"out must not exist, {str(target)!r} does: {remedy}")


def _part_row(part: Part) -> BufferRow:
    coded, buffer = part.coded, part.buffer
    copy = part.kind == KIND_COPY
    coding = "copy" if copy else "sparse" if coded.sparse else "dense"
    share = 0.0 if copy else 1.0  # a copy's streams are counted with its original
    return BufferRow(
        name=buffer.name,
        dtype=buffer.dtype,
        shape=buffer.shape,
        coding=coding,
        size_bytes=buffer.size,
        packed_bytes=len(part.payload),
        elements=8 * buffer.size // buffer.width,
        coded=coded.coded,
        distinct=coded.distinct,
        classes=coded.classes,
        fixed_value_bits=coded.fixed_value_bits,
        value_bits=coded.value_bits / max(coded.coded, 1),
        fixed_index_bits=coded.fixed_index_bits,
        index_bits=coded.index_bits / max(coded.coded, 1),
        fixed_entries=coded.fixed_entries,
        value_bytes=share * coded.value_bits / 8,
        index_bytes=share * coded.index_bits / 8,
        table_bytes=len(part.payload) if copy else coded.table_bits / 8,
        zero_sign_bytes=share * coded.zero_sign_bits / 8,
    )


def _left_row(buffer: WeightBuffer) -> BufferRow:
    elements = 8 * buffer.size // buffer.width
    return BufferRow(
        buffer.name, buffer.dtype, buffer.shape, "rest", buffer.size, None, elements, elements, 0, 1, buffer.width,
        float(buffer.width), 0, 0.0, elements, 0.0, 0.0, 0.0, 0.0,
    )  # fmt: skip
