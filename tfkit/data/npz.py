"""Reading a NumPy archive from a stranger: no pickles, and nothing allocated on the word of a header."""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from tfkit.data.dataset import DataError

#: Bytes that the arrays of one archive may take in memory.
MAX_BYTES = 16 * 2**30


def read(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Reads every array of an `.npz` file.

    Args:
        path: the file.
        max_bytes: bytes that the arrays may take together.

    Raises:
        DataError: if the file is no such archive, is damaged, holds objects, or is larger than allowed.
        OSError: if it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            return _read_all(file, path, max_bytes)
        except DataError:
            raise
        except Exception as error:  # damage surfaces in zipfile, the decompressors and the header's parser as any type
            raise DataError(f"{path} is not a readable .npz file: {error or type(error).__name__}") from error


def _read_all(file: IO[bytes], path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key == member.filename or key in arrays:
                raise DataError(f"{path}: unexpected member {member.filename!r}; an .npz holds .npy files, each once.")
            with archive.open(member) as stream:
                arrays[key] = _read_array(stream, f"{path}: {key}", member.file_size, max_bytes)
            max_bytes -= arrays[key].nbytes
    return arrays


def _read_array(stream: IO[bytes], where: str, size_bytes: int, max_bytes: int) -> np.ndarray:
    version = npy.read_magic(stream)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise DataError(f"{where}: unknown .npy version {version}.")
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are never loaded. Save numbers or fixed-width strings.")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > min(size_bytes, max_bytes):
        raise DataError(
            f"{where}: the header speaks of {needed} bytes; the file holds {size_bytes}, and {max_bytes} are allowed."
        )
    data = stream.read(needed + 1)
    if len(data) != needed:
        more = "more" if len(data) > needed else "fewer"
        raise DataError(f"{where}: the header speaks of {needed} bytes, but {more} follow.")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed `.npz` file whole or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".npz", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **dict(arrays))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
