"""What all indexes share: checked input, work split over threads, and files that a stranger may have written.

An index finds, for each query q, the k items x with the largest inner products <q, x>. A method writes `_build`,
`_search`, `_arrays` and `_restore`; everything a user can get wrong is checked here.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import inspect
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from tfkit.internal import checks
from tfkit.internal.files import write_atomically
from tfkit.retrieval.blas import FEW, blas

MAGIC = b"TFKINDEX"
VERSION = 1
_PREAMBLE = struct.Struct("<8sIQ")  # Magic, version, bytes of the header.
_DIGEST_BYTES = 32
_ALIGNMENT = 64
_DTYPES = ("<f4", "<f8", "<i4", "<i8", "<u4", "<u8", "|u1", "|i1")
_MOST_HEADER_BYTES = 1 << 20
#: Rows looked at together when an array is checked, so that the check takes little memory.
_CHECKED_ROWS = 8192


class SearchResult(NamedTuple):
    """The best items of each query, the best first; of equal scores the lower id first.

    Attributes:
        scores: float32, (queries, k), or (k,) for a query that came as a vector. Inner products of the float32 vectors.
        ids: int64, of the same shape: positions in the array that was built from, and then added. Where an index
            found fewer than k items, -1 with a score of -inf.
        exact: bool, (queries,): whether these are proven to be the k best. None: the method proves nothing.
    """

    scores: np.ndarray
    ids: np.ndarray
    exact: np.ndarray | None = None


class IndexFileError(ValueError):
    """A file is no index, is damaged, or holds what an index of its class cannot hold."""


class Index(abc.ABC):
    """Base of all indexes.

    A method's settings are arguments of its constructor; what may be chosen for each search is a keyword-only argument
    of its `_search`, which `search` passes on.
    """

    _classes: ClassVar[dict[str, type[Index]]] = {}
    #: Whether many queries are searched by matrix products.
    _multiplies: ClassVar[bool] = False
    items: np.ndarray

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Index._classes[cls.__name__] = cls

    # What a method writes.

    @abc.abstractmethod
    def _build(self, threads: int) -> None:
        """Makes whatever the search needs from `self.items`, float32, (items, dimension)."""

    @abc.abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> SearchResult:
        """Searches float32 queries, (queries, dimension), on one thread; its keyword-only arguments are the effort."""

    def _arrays(self) -> dict[str, np.ndarray]:
        """Returns what a file of the index holds besides its items."""
        return {}

    def _kept(self) -> list[np.ndarray]:
        """Returns the arrays in memory besides the items, if they are others than those of a file."""
        return list(self._arrays().values())

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:  # noqa: B027
        """Takes back what `_arrays` gave; every integer that is used as a position is checked by `expect`."""

    def _extend(self, first: int, threads: int) -> None:
        """Takes in the items from position `first` on, which are in `self.items` already."""
        self._build(threads)

    def get_config(self) -> dict[str, Any]:
        """Returns each argument of the constructor."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self).__init__).parameters)[1:]}

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        """Returns keyword arguments for `search`, from little effort to much, to choose from; of an exact index one."""
        return [{}]

    # What a user calls.

    def build(self, items: Any, *, threads: int | None = None) -> Self:
        """Builds the index.

        Args:
            items: (items, dimension), numbers of any real type; taken as float32. The array is copied.
            threads: most threads to use; None: as many as the process may.

        Returns:
            The index itself.

        Raises:
            ValueError: there are no items, they are not a matrix, or not all finite in float32.
        """
        threads = thread_count(threads)
        self.items = np.array(as_vectors("items", items), order="C", copy=True)
        self._build(threads)
        return self

    def add(self, items: Any, *, threads: int | None = None) -> np.ndarray:
        """Adds items to a built index.

        Args:
            items: (items, dimension).
            threads: most threads to use; None: as many as the process may.

        Returns:
            int64, (items,): their ids. Methods whose structure cannot grow build it again.
        """
        self._check_built()
        new = as_vectors("items", items, self.dimension)
        first = len(self.items)
        self.items = np.concatenate([self.items, new])
        self._extend(first, thread_count(threads))
        return np.arange(first, len(self.items))

    def search(self, queries: Any, k: int = 10, *, threads: int | None = None, **effort: Any) -> SearchResult:
        """Finds the items of the largest inner products.

        Several threads of a program may search one index at once.

        Args:
            queries: (queries, dimension), or one vector (dimension,).
            k: how many items; at most as many as there are.
            threads: most threads to use; None: as many as the process may. A single query takes one.
            effort: how hard to look, as the class says.

        Raises:
            ValueError: the index is not built; the queries have another dimension or are not finite; k is out of
                range; the effort is unknown or out of range.
        """
        self._check_built()
        single = getattr(queries, "ndim", 2) == 1 or (isinstance(queries, (list, tuple)) and np.ndim(queries) == 1)
        rows = as_vectors("queries", np.asarray(queries)[None] if single else queries, self.dimension, least=0)
        k = checks.integer("k", k, 1, len(self.items))
        known = self.effort_names()
        for name in effort:
            if name not in known:
                raise checks.error(
                    "effort", f"one of {', '.join(known) or 'none at all'} for {type(self).__name__}", name
                )
        result = self._search_rows(
            rows, k, thread_count(threads) if len(rows) > 1 or threads is not None else 1, effort
        )
        if single:
            return SearchResult(result.scores[0], result.ids[0], None if result.exact is None else result.exact[0])
        return result

    @classmethod
    def effort_names(cls) -> tuple[str, ...]:
        """Returns the names of the efforts that `search` takes."""
        return _keywords_of(cls._search)

    @property
    def dimension(self) -> int:
        """Of the vectors."""
        return int(self.items.shape[1])

    def __len__(self) -> int:
        return len(self.items) if hasattr(self, "items") else 0

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    @property
    def memory_bytes(self) -> int:
        """Bytes of the items and of all that is kept beside them."""
        self._check_built()
        return self.items.nbytes + sum(array.nbytes for array in self._kept())

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes the index to a file.

        Args:
            path: of the file.
            force: overwrite an existing file.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        self._check_built()
        target = Path(path)
        if target.exists() and not force:
            raise FileExistsError(f"{target} exists. Choose another path, or pass force=True to overwrite it.")
        write_atomically(target, self._serialize())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads an index that `save` wrote. Nothing in the file is run, and everything is checked.

        Args:
            path: of the file.

        Raises:
            IndexFileError: it is not such a file, is damaged, or is of another class than the one this is called on.
            FileNotFoundError: there is none.
        """
        content = Path(path).read_bytes()
        try:
            return cls._deserialize(content)
        except IndexFileError as error:
            raise IndexFileError(f"{path}: {error}") from None

    # The rest is how.

    def _search_rows(self, rows: np.ndarray, k: int, threads: int, effort: Mapping[str, Any]) -> SearchResult:
        """Splits the queries over the threads."""

        def one(part: np.ndarray) -> SearchResult:
            return self._search(part, k, **effort)

        if not self._multiplies or len(rows) <= FEW:
            return joined(one, rows, threads)
        # One thread of BLAS in each of ours: theirs would wait for each other after every block.
        with blas().limit(limits=1):
            return joined(one, rows, threads)

    def _check_built(self) -> None:
        if not hasattr(self, "items"):
            raise ValueError(f"{type(self).__name__} holds no items yet. Call `build(items)` first.")

    def _serialize(self) -> bytes:
        arrays = {"items": self.items, **self._arrays()}
        described: list[dict[str, Any]] = []
        at = 0
        for name, array in arrays.items():
            at += -at % _ALIGNMENT
            dtype = array.dtype.newbyteorder("<").str
            described.append({"name": name, "dtype": dtype, "shape": list(array.shape), "offset": at})
            at += array.nbytes
        header = json.dumps({"class": type(self).__name__, "config": self.get_config(), "arrays": described}).encode()
        body = bytearray(at)
        for entry, array in zip(described, arrays.values(), strict=True):
            stored = np.ascontiguousarray(array, dtype=entry["dtype"])
            body[entry["offset"] : entry["offset"] + array.nbytes] = stored.tobytes()
        content = _PREAMBLE.pack(MAGIC, VERSION, len(header)) + header + bytes(body)
        return content + hashlib.sha256(content).digest()

    @classmethod
    def _deserialize(cls, content: bytes) -> Self:
        if len(content) < _PREAMBLE.size + _DIGEST_BYTES or content[: len(MAGIC)] != MAGIC:
            raise IndexFileError("not an index that `save` wrote")
        _, version, header_bytes = _PREAMBLE.unpack_from(content)
        if version != VERSION:
            raise IndexFileError(f"version {version} of the format; this tfkit reads version {VERSION}")
        if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
            raise IndexFileError("damaged: its checksum does not fit")
        if header_bytes > min(len(content) - _PREAMBLE.size - _DIGEST_BYTES, _MOST_HEADER_BYTES):
            raise IndexFileError("damaged: its header is longer than the file")
        try:
            header = json.loads(content[_PREAMBLE.size : _PREAMBLE.size + header_bytes])
            name, config, described = header["class"], dict(header["config"]), list(header["arrays"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise IndexFileError("damaged: its header cannot be read") from None
        made = Index._classes.get(name) if isinstance(name, str) else None
        if made is None or inspect.isabstract(made):
            raise IndexFileError(f"holds an index of the unknown class {name!r}")
        if not issubclass(made, cls):
            raise IndexFileError(f"holds an index of class {name}, not {cls.__name__}")
        body = memoryview(content)[_PREAMBLE.size + header_bytes : -_DIGEST_BYTES]
        arrays = dict(_array(entry, body) for entry in described)
        try:
            index = made(**config)
        except (TypeError, ValueError) as error:
            raise IndexFileError(f"settings that {name} does not take: {error}") from None
        items = expect(arrays, "items", np.float32, (None, None))
        if not items.size or not _finite(items):
            raise IndexFileError("its items are missing or not finite")
        index.items = items
        index._restore(arrays)
        return index


@functools.cache
def _keywords_of(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def joined(function: Callable[[np.ndarray], SearchResult], rows: np.ndarray, threads: int) -> SearchResult:
    """Runs a search over equal parts of the queries on so many threads, and puts the results together."""
    if threads == 1 or len(rows) <= 1:
        return function(rows)
    parts = np.array_split(rows, min(threads, len(rows)))
    with ThreadPoolExecutor(len(parts)) as pool:
        results = list(pool.map(function, parts))
    exact = None if results[0].exact is None else np.concatenate([result.exact for result in results])  # type: ignore[misc]
    return SearchResult(
        np.concatenate([result.scores for result in results]), np.concatenate([result.ids for result in results]), exact
    )


def thread_count(threads: int | None) -> int:
    """Returns how many threads to use: those asked for, or as many as the process may run on."""
    if threads is not None:
        return checks.integer("threads", threads, 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_vectors(name: str, value: Any, dimension: int | None = None, least: int = 1) -> np.ndarray:
    """Returns finite vectors as a C-contiguous float32 matrix, without a copy where that is what they are.

    Args:
        name: of the argument, for the error.
        value: (vectors, dimension).
        dimension: that they must have; None: any.
        least: how many there must be.

    Raises:
        ValueError: they break one of these rules.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise checks.error(name, "an array of real numbers", value, "Convert it to float32.")
    if array.ndim != 2 or not array.shape[1] or len(array) < least:
        raise checks.error(name, f"of shape ({'at least 1' if least else 'any number'}, dimension)", value)
    if dimension is not None and array.shape[1] != dimension:
        raise checks.error(name, f"of dimension {dimension}, which the index has", value)
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(array, dtype=np.float32)
    if not _finite(vectors):
        row = next(i for i, vector in enumerate(vectors) if not np.isfinite(vector).all())
        raise checks.error(name, "finite numbers in float32", array[row], f"Row {row} is the first that is not.")
    return vectors


def _finite(vectors: np.ndarray) -> bool:
    return all(
        np.isfinite(vectors[start : start + _CHECKED_ROWS]).all() for start in range(0, len(vectors), _CHECKED_ROWS)
    )


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


def _array(entry: Any, body: memoryview) -> tuple[str, np.ndarray]:
    """Returns the name and the array that an entry of the header speaks of."""
    try:
        name, dtype, shape, offset = entry["name"], entry["dtype"], entry["shape"], entry["offset"]
        valid = (
            isinstance(name, str)
            and dtype in _DTYPES
            and isinstance(shape, list)
            and len(shape) <= 4
            and all(type(length) is int and 0 <= length <= len(body) for length in shape)
            and type(offset) is int
            and 0 <= offset <= len(body)
        )
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise IndexFileError("damaged: an array is described wrongly")
    count = 1
    for length in shape:
        count *= length
    if count * np.dtype(dtype).itemsize > len(body) - offset:
        raise IndexFileError(f"damaged: its array '{name}' reaches beyond the end")
    array = np.frombuffer(body, dtype, count, offset).reshape(shape)
    return name, array.astype(array.dtype.newbyteorder("="))  # A copy: the file's bytes can go.
