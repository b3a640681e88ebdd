"""Interactions: who took what, when, and how it was liked, as an immutable table with its sparse views.

Rows are held in the order of users, then of time, then of arrival. Users and items are numbered from 0; the labels that
they had in the file are kept beside. Parts of a split share the labels, so that a number means the same in all of them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks

DUPLICATES = ("error", "last", "first", "sum", "keep")


@dataclass(frozen=True, eq=False)
class Interactions:
    """Events of users with items. Make it with `from_arrays`, `from_frame` or `from_file`, which check what goes in.

    Attributes:
        users: int64, (events,): numbers of users, ascending.
        items: int64, (events,): numbers of items.
        ratings: float32, (events,): ratings, or weights of implicit events; None: an event is an event.
        times: float64, (events,): ascending for each user; None: the order of arrival.
        user_labels, item_labels: what the numbers stand for.
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray | None
    times: np.ndarray | None
    user_labels: np.ndarray
    item_labels: np.ndarray

    @classmethod
    def from_arrays(
        cls,
        users: Any,
        items: Any,
        ratings: Any = None,
        times: Any = None,
        *,
        user_labels: Any = None,
        item_labels: Any = None,
        duplicates: str = "error",
    ) -> Self:
        """Makes interactions of labels of any kind.

        Args:
            users, items: (events,): labels; integers or strings.
            ratings: (events,): numbers; None: none.
            times: (events,): numbers, in any order; None: the order given is the order in time.
            user_labels, item_labels: all labels there are, in the order of their numbers; None: those that occur,
                sorted. An unknown label is an error.
            duplicates: of one user and item: "error"; "last" and "first" in time keep one event; "sum" keeps the last,
                with the sum of the ratings (the count of events, if there are none); "keep" keeps all, for sequences.

        Raises:
            ValueError: lengths differ, there is no event, a rating or time is not finite, a label is unknown or
                missing, or there are duplicates that may not be.

        >>> log = Interactions.from_arrays(["ann", "bob", "ann"], [7, 7, 3], times=[2, 1, 1])
        >>> log.items_of(0).tolist(), log.item_labels.tolist()
        ([0, 1], [3, 7])
        """
        checks.choice("duplicates", duplicates, DUPLICATES)
        columns = {"users": np.asarray(users), "items": np.asarray(items)}
        for name, column in columns.items():
            if column.ndim != 1 or not len(column) or len(column) != len(columns["users"]):
                raise checks.error(name, "a vector with one entry an event, and at least one", column)
        count = len(columns["users"])
        rating = _numbers("ratings", ratings, count, np.float32)
        time = _numbers("times", times, count, np.float64)
        user_codes, user_names = _encode("users", columns["users"], user_labels)
        item_codes, item_names = _encode("items", columns["items"], item_labels)
        order = np.lexsort((np.arange(count), np.zeros(count) if time is None else time, user_codes))
        user_codes, item_codes = user_codes[order], item_codes[order]
        rating, time = _take(rating, order), _take(time, order)
        made = cls(user_codes, item_codes, rating, time, user_names, item_names)
        return made if duplicates == "keep" else made._without_duplicates(duplicates)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        user: str = "user",
        item: str = "item",
        rating: str | None = None,
        time: str | None = None,
        **options: Any,
    ) -> Self:
        """Makes interactions of a pandas DataFrame.

        Args:
            frame: the table.
            user, item, rating, time: names of its columns; None: there is none.
            options: as `from_arrays` takes them.
        """
        for name, column in (("user", user), ("item", item), ("rating", rating), ("time", time)):
            if column is not None and column not in frame.columns:
                raise checks.error(name, f"one of the columns {', '.join(map(repr, frame.columns))}", column)
        for column in (user, item):
            if frame[column].isna().any():
                raise checks.error(column, "a column without missing labels", frame[column].isna().sum())
        wanted = [None if column is None else _plain(frame[column]) for column in (user, item, rating, time)]
        return cls.from_arrays(*wanted, **options)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **columns: Any) -> Self:
        """Reads a `.csv`, `.csv.gz`, `.tsv` or `.parquet` file with a header; `columns` as `from_frame` takes them.

        Raises:
            ValueError: the file is of another kind, or a column is missing.
            ImportError: a parquet file without the package pyarrow.
        """
        import pandas as pd

        name = Path(path).name.lower()
        if name.endswith(".parquet"):
            return cls.from_frame(pd.read_parquet(path), **columns)
        if not name.removesuffix(".gz").endswith((".csv", ".tsv")):
            raise checks.error("path", "a .csv, .tsv (either may be .gz) or .parquet file", str(path))
        separator = "\t" if ".tsv" in name else ","
        return cls.from_frame(pd.read_csv(path, sep=separator), **columns)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_users(self) -> int:
        """Users there are, with or without events."""
        return len(self.user_labels)

    @property
    def num_items(self) -> int:
        """Items there are, with or without events."""
        return len(self.item_labels)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64, (users + 1,): the events of user u are those from `offsets[u]` to `offsets[u + 1]`."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.users, minlength=self.num_users))]).astype(np.int64)

    @functools.cached_property
    def matrix(self) -> sp.csr_matrix:
        """float32, (users, items), rows sorted by item: ratings, or 1 for each event; duplicates are summed."""
        values = np.ones(len(self), np.float32) if self.ratings is None else self.ratings
        made = sp.coo_matrix((values, (self.users, self.items)), (self.num_users, self.num_items)).tocsr()
        made.sort_indices()
        return made

    @functools.cached_property
    def seen(self) -> sp.csr_matrix:
        """float32, (users, items): 1 where there is an event, whatever its rating."""
        made = self.matrix.copy()
        made.data = np.ones_like(made.data)
        return made

    @functools.cached_property
    def item_counts(self) -> np.ndarray:
        """int64, (items,): events of each item."""
        return np.bincount(self.items, minlength=self.num_items)

    def items_of(self, user: int) -> np.ndarray:
        """Returns the items of a user in the order of time."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def sequences(self) -> list[np.ndarray]:
        """Returns the items of every user in the order of time; empty where there are none."""
        return np.split(self.items, self.offsets[1:-1])

    def select(self, chosen: np.ndarray) -> Interactions:
        """Returns the events that a mask or positions choose, with all labels; there may be none."""
        kept = np.flatnonzero(chosen) if np.asarray(chosen).dtype == bool else np.sort(chosen)
        return Interactions(
            self.users[kept],
            self.items[kept],
            _take(self.ratings, kept),
            _take(self.times, kept),
            self.user_labels,
            self.item_labels,
        )

    def at_least(self, rating: float) -> Interactions:
        """Returns the events of at least this rating, as implicit ones: without their ratings."""
        if self.ratings is None:
            raise checks.error("rating", "left out where there are no ratings", rating)
        kept = self.select(self.ratings >= rating)
        return Interactions(kept.users, kept.items, None, kept.times, kept.user_labels, kept.item_labels)

    def user_numbers(self, labels: Sequence[Any]) -> np.ndarray:
        """Returns the numbers of users by label; an unknown one is an error."""
        return _encode("labels", np.asarray(labels), self.user_labels)[0]

    def item_numbers(self, labels: Sequence[Any]) -> np.ndarray:
        """Returns the numbers of items by label; an unknown one is an error."""
        return _encode("labels", np.asarray(labels), self.item_labels)[0]

    def _without_duplicates(self, how: str) -> Self:
        key = self.users * self.num_items + self.items
        _, first, inverse, counts = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        if len(first) == len(key):
            return self
        if how == "error":
            row = first[np.argmax(counts > 1)]
            pair = (self.user_labels[self.users[row]].item(), self.item_labels[self.items[row]].item())
            remedy = "Pass duplicates='last', 'first', 'sum' or 'keep'."
            raise checks.error("items", "there once for each user", pair, remedy)
        if how == "first":
            return self.select(first)  # type: ignore[return-value]
        last = np.zeros(len(first), np.int64)
        np.maximum.at(last, inverse, np.arange(len(key)))
        ratings = self.ratings
        if how == "sum":
            weights = np.ones(len(key)) if ratings is None else ratings
            ratings = np.bincount(inverse, weights)[inverse].astype(np.float32)
        made = type(self)(self.users, self.items, ratings, self.times, self.user_labels, self.item_labels)
        return made.select(last)  # type: ignore[return-value]


def _plain(column: Any) -> np.ndarray:
    """Returns a column as numbers or as strings of fixed width, never as objects, which files could not hold."""
    values = column.to_numpy()
    return values if values.dtype.kind in "fiub" else np.asarray(column.astype(str).tolist())


def _numbers(name: str, values: Any, count: int, dtype: Any) -> np.ndarray | None:
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (count,) or array.dtype.kind not in "fiub":
        raise checks.error(name, f"{count} numbers, one an event", array)
    array = array.astype(dtype)
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array)))
        raise checks.error(name, "finite", array[row].item(), f"Event {row} is the first; leave such events out.")
    return array


def _encode(name: str, values: np.ndarray, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    if values.dtype.kind == "O":
        values = np.asarray([str(value) for value in values])
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        raise checks.error(name, "labels: integers or strings", values, "Missing labels make a column of floats.")
    if labels is None:
        names, codes = np.unique(values, return_inverse=True)
        return codes.astype(np.int64), names
    names = np.asarray(labels)
    order = np.argsort(names, kind="stable")
    if len(names) and (names[order][1:] == names[order][:-1]).any():
        raise checks.error(f"{name} labels", "unique", names)
    place = np.minimum(np.searchsorted(names[order], values), max(len(names) - 1, 0))
    codes = order[place]
    unknown = names[codes] != values
    if unknown.any():
        raise checks.error(name, "known labels", values[np.argmax(unknown)].item(), "Leave unknown ones out.")
    return codes.astype(np.int64), names


def _take(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[rows]
