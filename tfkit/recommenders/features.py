"""Features of items or users: categories, words and numbers, as sparse fields that networks embed.

A field is a sparse matrix (rows, vocabulary); a row's vector is the sum of the vectors of its words, by weight. So one
genre, ten words of a title and the item's own number are the same thing to a network.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import keras
import numpy as np
import scipy.sparse as sp
from keras import ops

from tfkit.internal import checks

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Features:
    """What is known of each item (or user) before anyone took it. Make it with `from_frame` or of sparse matrices.

    Attributes:
        fields: by name: float32 CSR, (rows, vocabulary), with finite weights.
        numbers: float32, (rows, numbers), finite, better near zero mean and unit variance; None: none.
    """

    fields: Mapping[str, sp.csr_matrix] = field(default_factory=dict)
    numbers: np.ndarray | None = None

    def __post_init__(self) -> None:
        made = {}
        for name, matrix in self.fields.items():
            if not str(name).isidentifier() or not sp.issparse(matrix) or not np.isfinite(matrix.data).all():
                raise checks.error("fields", "finite sparse matrices by names that are identifiers", name)
            made[name] = matrix.tocsr().astype(np.float32)
        object.__setattr__(self, "fields", made)
        if self.numbers is not None:
            numbers = np.asarray(self.numbers, np.float32)
            if numbers.ndim != 2 or not np.isfinite(numbers).all():
                raise checks.error("numbers", "a finite matrix, one row an item", numbers)
            object.__setattr__(self, "numbers", numbers)
        rows = {matrix.shape[0] for matrix in made.values()}
        rows |= set() if self.numbers is None else {len(self.numbers)}
        if len(rows) != 1:
            raise checks.error("fields", "at least one, all of the same number of rows", sorted(rows))

    def __len__(self) -> int:
        first = self.numbers if self.numbers is not None else next(iter(self.fields.values()))
        return int(first.shape[0])

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        key: str,
        labels: Any,
        categories: Sequence[str] = (),
        words: Sequence[str] = (),
        numbers: Sequence[str] = (),
        separator: str = "|",
        least: int = 2,
    ) -> Self:
        """Reads features from columns of a pandas DataFrame.

        Args:
            frame: a row for each label, others too.
            key: the column of labels.
            labels: which rows, in this order, such as `interactions.item_labels`.
            categories: columns of categories, several parted by `separator`.
            words: columns of text; words are compared in lower case.
            numbers: columns of numbers, which are standardised; a missing one becomes the mean.
            separator: of categories.
            least: rows that a word must be in.

        Raises:
            ValueError: a column is missing, a label is missing, or there twice.
        """
        for column in (key, *categories, *words, *numbers):
            if column not in frame.columns:
                raise checks.error("column", f"one of {', '.join(map(repr, frame.columns))}", column)
        indexed = frame.set_index(key)
        if indexed.index.has_duplicates:
            raise checks.error("key", "a column of unique labels", key)
        missing = np.setdiff1d(np.asarray(labels), indexed.index.to_numpy())
        if len(missing):
            raise checks.error("labels", f"labels in the column {key!r}", missing[0])
        chosen = indexed.loc[labels]
        fields = {}
        for column in categories:
            parts = [_unique(str(text).split(separator)) if text == text else [] for text in chosen[column]]
            fields[column] = bag(parts, 1)
        for column in words:
            parts = [_unique(_WORD.findall(str(text).lower())) if text == text else [] for text in chosen[column]]
            fields[column] = bag(parts, least)
        columns = [_standardised(chosen[column].to_numpy(np.float64)) for column in numbers]
        return cls(fields, np.stack(columns, 1) if columns else None)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what a file holds of them."""
        made = {} if self.numbers is None else {"numbers": self.numbers}
        for name, matrix in self.fields.items():
            made |= {
                f"{name}.data": matrix.data, f"{name}.indices": matrix.indices.astype(np.int64),
                f"{name}.indptr": matrix.indptr.astype(np.int64),
                f"{name}.width": np.array([matrix.shape[1]], np.int64),
            }  # fmt: skip
        return made

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Makes features of what `arrays` gave; the arrays are taken for hostile."""
        fields = {}
        for name in sorted({key.partition(".")[0] for key in arrays if "." in key}):
            data, indices, indptr, width = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr", "width"))
            size = int(width[0])
            valid = (
                data.ndim == indices.ndim == indptr.ndim == 1
                and data.dtype == np.float32
                and indices.dtype == indptr.dtype == np.int64
                and len(indptr) > 0
                and indptr[0] == 0
                and indptr[-1] == len(indices) == len(data)
                and (np.diff(indptr) >= 0).all()
                and (not len(indices) or (indices.min() >= 0 and indices.max() < size))
            )
            if not valid:
                raise ValueError(f"the field {name!r} is inconsistent")
            fields[name] = sp.csr_matrix((data, indices, indptr), (len(indptr) - 1, size))
        return cls(fields, arrays.get("numbers"))


def bag(rows: Sequence[Sequence[str]], least: int = 1) -> sp.csr_matrix:
    """Returns words as a field, (rows, vocabulary); a row of n words has weights n^-1/2.

    >>> print(bag([["a", "b"], ["b"]]).toarray().round(2))
    [[0.71 0.71]
     [0.   1.  ]]
    """
    counts = Counter(word for row in rows for word in row)
    numbers = {word: i for i, word in enumerate(sorted(word for word, n in counts.items() if n >= least))}
    kept = [[numbers[word] for word in row if word in numbers] for row in rows]
    lengths = np.array([len(row) for row in kept], np.int64)
    indices = np.array([number for row in kept for number in row], np.int64)
    data = np.repeat(1 / np.sqrt(np.maximum(lengths, 1)), lengths).astype(np.float32)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sp.csr_matrix((data, indices, indptr), (len(rows), max(len(numbers), 1)))


def known_numbers(counts: np.ndarray) -> sp.csr_matrix:
    """Returns the number of each row as a field; a row without events has no word, and so the vector zero."""
    return sp.diags_array((np.asarray(counts) > 0).astype(np.float32)).tocsr()


class FieldEmbedding(keras.layers.Layer):
    """Gives the vectors of rows of a field, (batch, dimension), of the rows' numbers."""

    def __init__(self, matrix: sp.csr_matrix, dimension: int, scale: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dimension, self.vocabulary, self.scale = dimension, matrix.shape[1], scale
        self.ids, self.shares = _padded(matrix)

    def build(self, input_shape: Any) -> None:
        start = keras.initializers.RandomNormal(stddev=self.scale)
        self.table = self.add_weight((self.vocabulary, self.dimension), start, name="table")

    def call(self, numbers: Any) -> Any:
        ids, shares = (ops.take(ops.convert_to_tensor(part), numbers, axis=0) for part in (self.ids, self.shares))
        return ops.sum(ops.take(self.table, ids, axis=0) * shares[..., None], axis=-2)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape, self.dimension)


class NumberRows(keras.layers.Layer):
    """Gives rows of a constant matrix by their numbers."""

    def __init__(self, matrix: np.ndarray, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.matrix = matrix

    def call(self, numbers: Any) -> Any:
        return ops.take(ops.convert_to_tensor(self.matrix), numbers, axis=0)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape, self.matrix.shape[1])


def _padded(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Returns the words of each row, int32, and their weights, float32, (rows, most), with weight 0 behind."""
    lengths = np.diff(matrix.indptr)
    there = np.arange(max(int(lengths.max(initial=0)), 1))[None] < lengths[:, None]
    ids, shares = np.zeros(there.shape, np.int32), np.zeros(there.shape, np.float32)
    ids[there], shares[there] = matrix.indices, matrix.data
    return ids, shares


def _standardised(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    if not known.any():
        return np.zeros(len(values), np.float32)
    spread = values[known].std() or 1.0
    return np.where(known, (values - values[known].mean()) / spread, 0).astype(np.float32)


def _unique(words: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(words))
