"""What all recommenders share: checked input, the best items of every user, and files without pickles."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from tfkit.data import npz
from tfkit.data.dataset import DataError
from tfkit.internal import checks
from tfkit.recommenders.interactions import Interactions
from tfkit.retrieval import Exact, Index, SearchResult, blas, kernels
from tfkit.retrieval.base import thread_count

BATCH_USERS = 512


class RecommenderFileError(ValueError):
    """A file is no recommender, is damaged, or holds what one of its class cannot hold."""


class Recommender:
    """Base of all recommenders.

    A method writes `_fit`, and either `_scores` or the factors `_vectors`; `_history_scores` where it can serve people
    it has never seen.
    """

    _classes: ClassVar[dict[str, type[Recommender]]] = {}
    #: Names of the arrays that a file holds, all float32, and whether each counts users or items along its first axis.
    _saved: ClassVar[dict[str, str]] = {}
    seen: sp.csr_matrix
    #: What the numbers of users and items stand for, from the interactions; None: the numbers themselves.
    user_labels: np.ndarray | None = None
    item_labels: np.ndarray | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Recommender._classes[cls.__name__] = cls

    def _fit(self, interactions: Interactions) -> None:
        raise NotImplementedError

    def _scores(self, users: np.ndarray) -> np.ndarray:
        """Returns float32, (users, items)."""
        return self.user_vectors(users) @ self.item_vectors().T

    def _history_scores(self, histories: sp.csr_matrix) -> np.ndarray:
        raise checks.error(
            "users", f"numbers of fitted users for {type(self).__name__}", "histories", "IALS and EASE take histories."
        )

    def user_vectors(self, users: np.ndarray) -> np.ndarray:
        """Returns float32, (users, dimension), whose inner products with `item_vectors` are the scores."""
        raise NotImplementedError(f"{type(self).__name__} is not a product of two vectors.")

    def item_vectors(self) -> np.ndarray:
        """Returns float32, (items, dimension)."""
        raise NotImplementedError(f"{type(self).__name__} is not a product of two vectors.")

    def get_config(self) -> dict[str, Any]:
        """Returns each argument of the constructor."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self).__init__).parameters)[1:]}

    @property
    def num_users(self) -> int:
        """Users it was fitted to."""
        return int(self.seen.shape[0])

    @property
    def num_items(self) -> int:
        """Items it was fitted to."""
        return int(self.seen.shape[1])

    def fit(self, interactions: Interactions) -> Self:
        """Learns from interactions.

        Raises:
            ValueError: they are none, or lack what the method needs.
        """
        if not isinstance(interactions, Interactions) or not len(interactions):
            raise checks.error("interactions", "an `Interactions` with events", interactions)
        self.seen = interactions.seen
        self.user_labels, self.item_labels = interactions.user_labels, interactions.item_labels
        self._fit(interactions)
        return self

    def scores(self, users: Any) -> np.ndarray:
        """Returns the scores of all items.

        Args:
            users: numbers of users, or histories: a list of lists of items, or a sparse (people, items) matrix.

        Returns:
            float32, (users, items).
        """
        who, histories = self._asked(users)
        made = self._history_scores(histories) if who is None else self._scores(who)
        return np.asarray(made, np.float32)

    def recommend(
        self,
        users: Any,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Any = None,
        threads: int | None = None,
    ) -> SearchResult:
        """Finds the best items for users.

        Args:
            users: numbers of users, or histories of people, known or not: a list of lists of items in the order of
                time, or a sparse (people, items) matrix.
            k: how many items.
            exclude_seen: leave out what is in the user's history.
            candidates: numbers of the items that may be recommended, such as new ones; None: all.
            threads: most threads to use; None: as many as the process may.

        Returns:
            Scores and ids, (users, k); where fewer than k items are left, -inf and -1.

        Raises:
            ValueError: the model is not fitted, a user or item is unknown, or k is out of range.
        """
        who, histories = self._asked(users)
        k = checks.integer("k", k, 1, self.num_items)
        count = histories.shape[0]
        numbers = np.arange(self.num_items)
        barred = np.zeros(0, np.int64) if candidates is None else np.setdiff1d(numbers, self._items(candidates))

        def part(start: int) -> tuple[np.ndarray, np.ndarray]:
            rows = slice(start, min(start + BATCH_USERS, count))
            block = self._history_scores(histories[rows]) if who is None else self._scores(who[rows])
            block = np.array(block, np.float32, order="C")
            if exclude_seen:
                low, high = histories.indptr[rows.start], histories.indptr[rows.stop]
                mask_seen(block, histories.indptr[rows.start : rows.stop + 1] - low, histories.indices[low:high])
            block[:, barred] = -np.inf
            scores, ids, counts = kernels.empty_heaps(len(block), k)
            kernels.offer_block(block, numbers, np.arange(len(block)), scores, ids, counts)
            kernels.sort_heaps(scores, ids, counts)
            return scores, np.where(np.isneginf(scores), -1, ids)

        starts = range(0, count, BATCH_USERS)
        workers = min(thread_count(threads), max(len(starts), 1))
        if workers == 1 or not self._threaded:
            with blas.at_most(thread_count(threads)):
                parts = [part(start) for start in starts]
        else:
            with blas.at_most(1), ThreadPoolExecutor(workers) as pool:
                parts = list(pool.map(part, starts))
        if not parts:
            return SearchResult(np.zeros((0, k), np.float32), np.zeros((0, k), np.int64))
        return SearchResult(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))

    #: Whether blocks of users may be scored by several threads at once.
    _threaded: ClassVar[bool] = True

    def index(self, index: Index | None = None) -> Index:
        """Builds an index of the items for `user_vectors` to search; None: `Exact`."""
        return (Exact() if index is None else index).build(self.item_vectors())

    def _asked(self, users: Any) -> tuple[np.ndarray | None, sp.csr_matrix]:
        """Returns the numbers of the users, or None for histories, and what each has seen."""
        if getattr(self, "seen", None) is None:
            raise checks.error(type(self).__name__, "fitted before it recommends", "no call of `fit`", "Call `fit`.")
        if sp.issparse(users):
            histories = users.tocsr().astype(np.float32)
            if histories.shape[1] != self.num_items:
                raise checks.error("users", f"a sparse matrix of {self.num_items} items", users)
            histories.sort_indices()
            return None, histories
        if isinstance(users, (list, tuple)) and len(users) and np.ndim(users[0]) == 1:
            return None, history_matrix(users, self.num_items)
        who = np.atleast_1d(np.asarray(users))
        if who.ndim != 1 or (len(who) and who.dtype.kind not in "iu"):
            raise checks.error("users", "integers, a list of histories, or a sparse matrix", users)
        if len(who) and (who.min() < 0 or who.max() >= self.num_users):
            raise checks.error("users", f"numbers from 0 to {self.num_users - 1}", who, "Pass histories of new people.")
        return who.astype(np.int64), self.seen[who.astype(np.int64)]

    def _items(self, items: Any) -> np.ndarray:
        numbers = np.asarray(items)
        if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
            raise checks.error("candidates", "a vector of numbers of items", items)
        if numbers.min() < 0 or numbers.max() >= self.num_items:
            raise checks.error("candidates", f"numbers from 0 to {self.num_items - 1}", numbers)
        return numbers

    # Files.

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(self, name)) for name in self._saved}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, along in self._saved.items():
            array = arrays.get(name)
            length = {"users": self.num_users, "items": self.num_items}.get(along)
            if (
                array is None
                or array.dtype != np.float32
                or not np.isfinite(array).all()
                or (length is not None and (array.ndim == 0 or len(array) != length))
            ):
                raise RecommenderFileError(f"damaged: its array '{name}' is missing or of another form")
            setattr(self, name, array)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:  # type: ignore[override]
        """Writes the model, its settings, the labels and what users have seen to one `.npz` file without pickles.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        self._asked(np.zeros(0, np.int64))
        target = Path(path)
        if target.exists() and not force:
            raise FileExistsError(f"{target} exists. Choose another path, or pass force=True to overwrite it.")
        header = {"class": type(self).__name__, "config": self.get_config(), "shape": list(self.seen.shape)}
        arrays = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "seen_indptr": self.seen.indptr.astype(np.int64),
            "seen_indices": self.seen.indices.astype(np.int64),
        }
        for name in ("user_labels", "item_labels"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        npz.write(target, arrays | {f"model_{name}": array for name, array in self._arrays().items()})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a model that `save` wrote; the file is taken for hostile.

        Raises:
            RecommenderFileError: it is no such file, is damaged, or of another class.
        """
        try:
            arrays = npz.read(path)
            header = json.loads(bytes(arrays["header"]))
            name, config, shape = header["class"], dict(header["config"]), tuple(map(int, header["shape"]))
            made = Recommender._classes.get(name)
            if made is None or not issubclass(made, cls):
                raise RecommenderFileError(f"{path}: holds a recommender of class {name!r}, not {cls.__name__}")
            model = made(**config)
            model.seen = _checked_csr(arrays["seen_indptr"], arrays["seen_indices"], shape)
            for label, count in (("user_labels", shape[0]), ("item_labels", shape[1])):
                setattr(model, label, arrays.get(label))
                if label in arrays and (arrays[label].shape != (count,) or arrays[label].dtype.kind not in "iufbUS"):
                    raise RecommenderFileError(f"{path}: damaged: its array '{label}' is of another form")
            model._restore({k.removeprefix("model_"): v for k, v in arrays.items() if k.startswith("model_")})
        except (DataError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, RecommenderFileError):
                raise
            raise RecommenderFileError(f"{path}: not a recommender that `save` wrote, or damaged: {error}") from None
        return model  # type: ignore[return-value]


def history_matrix(histories: Any, num_items: int) -> sp.csr_matrix:
    """Returns float32, (people, items): 1 where the item is in the history.

    Raises:
        ValueError: an item is no number of one.
    """
    lengths = [len(history) for history in histories]
    items = (
        np.concatenate([np.asarray(history, np.int64) for history in histories]) if sum(lengths) else np.zeros(0, int)
    )
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise checks.error("users", f"histories of items from 0 to {num_items - 1}", items)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    made = sp.csr_matrix((np.ones(len(items), np.float32), (rows, items)), (len(lengths), num_items))
    made.data[:] = 1.0
    made.sort_indices()
    return made


@kernels.kernel
def mask_seen(block, indptr, indices):  # type: ignore[no-untyped-def]
    """Sets the scores of seen items to -inf."""
    for row in range(block.shape[0]):
        for place in range(indptr[row], indptr[row + 1]):
            block[row, indices[place]] = -np.inf


def _checked_csr(indptr: np.ndarray, indices: np.ndarray, shape: tuple[int, ...]) -> sp.csr_matrix:
    valid = (
        len(shape) == 2
        and indptr.shape == (shape[0] + 1,)
        and indices.ndim == 1
        and indptr.dtype == np.int64
        and indices.dtype == np.int64
        and indptr[0] == 0
        and indptr[-1] == len(indices)
        and (np.diff(indptr) >= 0).all()
        and (not len(indices) or (indices.min() >= 0 and indices.max() < shape[1]))
    )
    if not valid:
        raise RecommenderFileError("damaged: what users have seen is inconsistent")
    return sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape)
