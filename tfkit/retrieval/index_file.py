"""The file of an index: a header in JSON, the arrays one behind the other, and a checksum.

A reader takes nothing on trust: arrays lie one behind the other and fill the file, so that what is read takes no more
memory than the file has bytes, and no byte is run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"TFKINDEX"
VERSION = 1
_PREAMBLE = struct.Struct("<8sIQ")  # Magic, version, bytes of the header.
_DIGEST_BYTES = 32
_ALIGNMENT = 64
_DTYPES = ("<f4", "<f8", "<i4", "<i8", "<u4", "<u8", "|u1", "|i1")
_MOST_HEADER_BYTES = 1 << 20


class IndexFileError(ValueError):
    """A file is no index, is damaged, or holds what an index of its class cannot hold."""


def pieces(kind: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """Yields the file's content, array by array, so that none is copied.

    Args:
        kind: names the class of the index.
        config: its settings.
        arrays: what it holds.
    """
    described: list[dict[str, Any]] = []
    at = 0
    for name, array in arrays.items():
        at += -at % _ALIGNMENT
        described.append(
            {"name": name, "dtype": array.dtype.newbyteorder("<").str, "shape": list(array.shape), "offset": at}
        )
        at += array.nbytes
    header = json.dumps({"class": kind, "config": dict(config), "arrays": described}).encode()
    digest, at = hashlib.sha256(), 0
    start = _PREAMBLE.pack(MAGIC, VERSION, len(header)) + header
    digest.update(start)
    yield start
    for entry, array in zip(described, arrays.values(), strict=True):
        stored = np.ascontiguousarray(array, dtype=entry["dtype"]).reshape(-1).view(np.uint8).data
        for piece in (bytes(entry["offset"] - at), stored):
            digest.update(piece)
            yield piece
        at = entry["offset"] + array.nbytes
    yield digest.digest()


def read(path: Path) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """Returns the class's name, the settings and the arrays of a file; none of them is checked but for its form.

    Raises:
        IndexFileError: it is no such file, or is damaged.
    """
    with path.open("rb") as file:
        size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
        start = file.read(_PREAMBLE.size)
        if size < _PREAMBLE.size + _DIGEST_BYTES or len(start) < _PREAMBLE.size or not start.startswith(MAGIC):
            raise IndexFileError("not an index that `save` wrote")
        _, version, header_bytes = _PREAMBLE.unpack(start)
        if version != VERSION:
            raise IndexFileError(f"version {version} of the format; this tfkit reads version {VERSION}")
        body_bytes = size - _PREAMBLE.size - _DIGEST_BYTES - header_bytes
        if body_bytes < 0 or header_bytes > _MOST_HEADER_BYTES:
            raise IndexFileError("damaged: its header is longer than the file")
        header = file.read(header_bytes)
        digest.update(start + header)
        try:
            content = json.loads(header)
            kind, config, described = content["class"], dict(content["config"]), list(content["arrays"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise IndexFileError("damaged: its header cannot be read") from None
        arrays: dict[str, np.ndarray] = {}
        at = 0
        for entry in described:
            name, dtype, shape, offset = _described(entry, body_bytes)
            length = math.prod(shape) * dtype.itemsize
            if name in arrays or not at <= offset < at + _ALIGNMENT:
                raise IndexFileError(f"damaged: its array '{name}' is there twice, or not behind the one before")
            if length > body_bytes - offset:
                raise IndexFileError(f"damaged: its array '{name}' reaches beyond the end")
            digest.update(file.read(offset - at))
            array = np.empty(shape, dtype)
            _fill(file, array)
            digest.update(array.reshape(-1).view(np.uint8).data)
            arrays[name] = array.astype(dtype.newbyteorder("="), copy=False)
            at = offset + length
        if at != body_bytes or file.read(_DIGEST_BYTES + 1) != digest.digest():
            raise IndexFileError("damaged: its length or its checksum does not fit")
    return kind, config, arrays


def _described(entry: Any, body_bytes: int) -> tuple[str, np.dtype[Any], list[int], int]:
    """Returns name, type, shape and offset of the array that an entry of the header speaks of."""
    try:
        name, dtype, shape, offset = entry["name"], entry["dtype"], entry["shape"], entry["offset"]
        valid = (
            isinstance(name, str)
            and dtype in _DTYPES
            and isinstance(shape, list)
            and len(shape) <= 4
            and all(type(length) is int and 0 <= length <= body_bytes for length in shape)
            and type(offset) is int
        )
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise IndexFileError("damaged: an array is described wrongly")
    return name, np.dtype(dtype), shape, offset


def _fill(file: BinaryIO, array: np.ndarray) -> None:
    if array.nbytes and file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
        raise IndexFileError("damaged: it became shorter while it was read")


def expect(
    arrays: Mapping[str, np.ndarray],
    name: str,
    dtype: Any,
    shape: Sequence[int | None],
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """Returns an array of a file if it is what an index needs.

    Args:
        arrays: of the file.
        name: of the one.
        dtype: that it must have.
        shape: that it must have; None: any length.
        low, high: bounds of its values, both included.

    Raises:
        IndexFileError: it is not there, or not so.
    """
    array = arrays.get(name)
    fits = (
        array is not None
        and array.dtype == np.dtype(dtype)
        and array.ndim == len(shape)
        and all(wanted is None or wanted == length for wanted, length in zip(shape, array.shape, strict=True))
    )
    if array is None or not fits:
        raise IndexFileError(f"damaged: its array '{name}' is missing or of another form")
    if array.size and ((low is not None and array.min() < low) or (high is not None and array.max() > high)):
        raise IndexFileError(f"damaged: its array '{name}' holds values out of range")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise IndexFileError(f"damaged: its array '{name}' is not finite")
    return array


def expect_permutation(arrays: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
    """Returns an int64 array of a file that must hold each of 0 … count - 1 once.

    Raises:
        IndexFileError: it is not there, or not so.
    """
    array = expect(arrays, name, np.int64, (count,), 0, count - 1)
    if np.bincount(array, minlength=count).max() > 1:
        raise IndexFileError(f"damaged: its array '{name}' holds a number twice")
    return array
