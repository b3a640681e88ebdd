"""What all indexes share: checked input, work split over threads, and files that a stranger may have written.

An index finds, for each query q, the k items x with the largest inner products <q, x>. A method writes `_build`,
`_search`, `_arrays` and `_restore`; everything a user can get wrong is checked here.
"""

from __future__ import annotations

import abc
import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self
from weakref import WeakKeyDictionary

import numpy as np

from tfkit.internal import checks
from tfkit.internal.files import write_atomically
from tfkit.retrieval import blas, index_file
from tfkit.retrieval.index_file import IndexFileError, expect, expect_permutation
from tfkit.retrieval.vectors import (
    ITEMS_RANGE,
    as_matrix,
    as_vectors,
    exponent_of,
    moderate,
    norms_of,
    plain_query,
    scaled,
)

__all__ = [
    "Index",
    "IndexFileError",
    "SearchResult",
    "as_vectors",
    "expect",
    "expect_permutation",
    "joined",
    "thread_count",
]

#: More threads than this are never used, whatever is asked for.
MOST_THREADS = 256


class SearchResult(NamedTuple):
    """The best items of each query, the best first; of equal scores the lower id first.

    Attributes:
        scores: float32, (queries, k), or (k,) for a query that came as a vector. Inner products of the float32 vectors;
            infinite where float32 cannot hold them, and in the right order all the same.
        ids: int64, of the same shape: positions in the array that was built from, and then added. Where an index
            found fewer than k items, -1 with a score of -inf.
        exact: bool, (queries,), or one for a query that came as a vector: whether these are proven to be the k best.
            None: the method proves nothing.
    """

    scores: np.ndarray
    ids: np.ndarray
    exact: np.ndarray | None = None


class Index(abc.ABC):
    """Base of all indexes.

    A method's settings are arguments of its constructor; what may be chosen for each search is a keyword-only argument
    of its `_search`, which `search` passes on.

    What is built is never changed. `build` and `add` make a new state aside and swap it in at the end, so that a search
    in another thread sees the one or the other, and what fails or is interrupted changes nothing.

    Attributes:
        items: float32, (items, dimension): those given, over 2^e where their largest norm calls for it.
    """

    _classes: ClassVar[dict[str, type[Index]]] = {}
    #: Whether many queries are searched by matrix products.
    _multiplies: ClassVar[bool] = False
    items: np.ndarray
    #: e of `items`.
    _exponent: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Index._classes[_name_of(cls)] = cls

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
        """Takes in the items from position `first` on, which are in `self.items`; arrays there were before are kept."""
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
        vectors = as_vectors("items", items, copy=True)
        with _writing(self):
            fresh = type(self)(**self.get_config())
            fresh._hold(vectors)
            with blas.at_most(threads):
                fresh._build(threads)
            self.__dict__ = fresh.__dict__
        return self

    def add(self, items: Any, *, threads: int | None = None) -> np.ndarray:
        """Adds items to a built index.

        Args:
            items: (items, dimension).
            threads: most threads to use; None: as many as the process may.

        Returns:
            int64, (items,): their ids. Methods whose structure cannot grow build it again, and so do all where the new
            items are so long that the scale of the old ones does not fit.
        """
        threads = thread_count(threads)
        new = as_vectors("items", items, self._held().dimension)
        with _writing(self):
            held = self._held()
            first, exponent = len(held.items), held._exponent
            largest = max(float(norms_of(held.items).max()) * 2.0**exponent, float(norms_of(new).max()))
            fits = exponent_of(largest, ITEMS_RANGE) == exponent
            if fits:
                fresh = object.__new__(type(self))
                fresh.__dict__ = dict(held.__dict__)
                fresh.items = np.concatenate([held.items, scaled(new, -exponent) if exponent else new])
            else:
                fresh = type(self)(**self.get_config())
                fresh._hold(np.concatenate([scaled(held.items, exponent), new]))
            with blas.at_most(threads):
                if fits:
                    fresh._extend(first, threads)
                else:
                    fresh._build(threads)
            self.__dict__ = fresh.__dict__
        return np.arange(first, first + len(new), dtype=np.int64)

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
        held = self._held()
        rows, exponents, single = held._asked("queries", queries)
        k = checks.integer("k", k, 1, len(held.items))
        if effort:
            known = self.effort_names()
            for name in effort:
                if name not in known:
                    raise checks.error(
                        "effort", f"one of {', '.join(known) or 'none at all'} for {type(self).__name__}", name
                    )
        several = len(rows) > 1 or threads is not None
        result = held._search_rows(rows, k, thread_count(threads) if several else 1, effort)
        if exponents is not None or held._exponent:
            powers = held._exponent + (0 if exponents is None else exponents[:, None])
            result = result._replace(scores=scaled(result.scores, powers))
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
        return self._held()._memory_bytes()

    def _memory_bytes(self) -> int:
        return self.items.nbytes + sum(array.nbytes for array in self._kept())

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes the index to a file.

        Args:
            path: of the file.
            force: overwrite an existing file.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        held, target = self._held(), Path(path)
        if target.exists() and not force:
            raise FileExistsError(f"{target} exists. Choose another path, or pass force=True to overwrite it.")
        items = scaled(held.items, held._exponent) if held._exponent else held.items
        arrays = {"items": items, **held._arrays()}
        write_atomically(target, index_file.pieces(_name_of(type(self)), self.get_config(), arrays))
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
        try:
            return cls._loaded(*index_file.read(Path(path)))
        except IndexFileError as error:
            raise IndexFileError(f"{path}: {error}") from None

    # The rest is how.

    def _search_rows(self, rows: np.ndarray, k: int, threads: int, effort: Mapping[str, Any]) -> SearchResult:
        """Splits the queries over the threads."""

        if len(rows) == 1:
            return self._search(rows, k, **effort)

        def one(part: np.ndarray) -> SearchResult:
            return self._search(part, k, **effort)

        if not self._multiplies or len(rows) <= blas.FEW:
            return joined(one, rows, threads)
        # One thread of BLAS in each of ours: theirs would wait for each other after every block.
        with blas.at_most(1):
            return joined(one, rows, threads)

    def _held(self) -> Self:
        """Returns a view of the index as it is now, which builds and additions in other threads leave as it is."""
        view = object.__new__(type(self))
        view.__dict__ = self.__dict__
        if not hasattr(view, "items"):
            raise ValueError(f"{type(self).__name__} holds no items yet. Call `build(items)` first.")
        return view

    def _hold(self, vectors: np.ndarray) -> None:
        """Takes the items, at norms whose products float32 can hold."""
        self._exponent = exponent_of(float(norms_of(vectors).max()), ITEMS_RANGE)
        self.items = scaled(vectors, -self._exponent) if self._exponent else vectors

    def _asked(self, name: str, queries: Any) -> tuple[np.ndarray, np.ndarray | None, bool]:
        """Returns queries at moderate norms, the exponents of what they were divided by, and whether it was a vector.

        An empty list, or array of one dimension, is no query.
        """
        if plain_query(queries, self.items.shape[1]):
            return queries[None], None, True
        single = getattr(queries, "ndim", 2) == 1
        if isinstance(queries, (list, tuple)):
            single = not queries or getattr(queries[0], "ndim", 0) == 0 and not hasattr(queries[0], "__len__")
        if single and not len(queries):
            return np.empty((0, self.dimension), np.float32), None, False
        value = np.asanyarray(queries)[None] if single else queries
        rows = as_matrix(name, value, self.dimension, least=0)
        return *moderate(name, rows), single

    def _one(self, name: str, query: Any) -> tuple[np.ndarray, int]:
        """Returns a query at a moderate norm, (dimension,), and the exponent of what it was divided by."""
        rows, exponents, single = self._asked(name, query)
        if not single:
            raise checks.error(name, f"one vector, of shape ({self.dimension},)", query)
        return rows[0], 0 if exponents is None else int(exponents[0])

    @classmethod
    def _loaded(cls, kind: Any, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Self:
        """Returns the index that a file describes."""
        made = Index._classes.get(kind) if isinstance(kind, str) else None
        if made is None or inspect.isabstract(made):
            raise IndexFileError(f"holds an index of the unknown class {kind!r}")
        if not issubclass(made, cls):
            raise IndexFileError(f"holds an index of class {kind}, not {cls.__name__}")
        try:
            index = made(**config)
        except (TypeError, ValueError) as error:
            raise IndexFileError(f"settings that {kind} does not take: {error}") from None
        items = expect(arrays, "items", np.float32, (None, None))
        if not items.size:
            raise IndexFileError("its items are missing")
        index._hold(items)
        index._restore(arrays)
        return index


_WRITERS: WeakKeyDictionary[Index, threading.RLock] = WeakKeyDictionary()
_WRITERS_LOCK = threading.Lock()


def _writing(index: Index) -> Any:
    """Returns the lock of what changes an index, so that of two additions at once none is lost."""
    with _WRITERS_LOCK:
        return _WRITERS.setdefault(index, threading.RLock())


def _name_of(kind: type[Index]) -> str:
    """Returns the name of a class in files: a user's class may be called like one of ours."""
    return kind.__name__ if kind.__module__.startswith("tfkit.") else f"{kind.__module__}.{kind.__qualname__}"


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
        return min(checks.integer("threads", threads, 1), MOST_THREADS)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
