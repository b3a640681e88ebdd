"""The order in which a tensor's elements are coded, and classes of lines with tables of their own.

Pruned layers are uneven: a dead pixel empties a column, a busy neuron fills a row, a channel has its own scale. Lines
(rows, or columns when transposed) that look alike form a class; a class is coded as one piece with its own tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tfkit.export.packing.values import entropy_bits

MAX_CLASSES = 16
MAX_LINES = 1 << 16
_MAX_HISTOGRAM = 1 << 24


class Scan(NamedTuple):
    """An order over a tensor's elements.

    Attributes:
        rows: the tensor is seen as (rows, elements / rows).
        transposed: columns are the lines.
        classes: class of each line, uint8, shape (lines,), or None for a single class.
        class_count: number of classes.
    """

    rows: int
    transposed: bool
    classes: np.ndarray | None
    class_count: int

    def ordered(self, elements: np.ndarray) -> np.ndarray:
        """The elements (flat) in coding order, flat."""
        matrix = elements.reshape(self.rows, -1)
        lines = matrix.T if self.transposed else matrix
        if self.classes is not None:
            lines = lines[np.argsort(self.classes, kind="stable")]
        return np.ascontiguousarray(lines).ravel()

    def starts(self, elements: int) -> np.ndarray:
        """Where each class begins in coding order: int64, shape (class_count + 1,)."""
        if self.classes is None:
            return np.array([0, elements], np.int64)
        sizes = np.bincount(self.classes, minlength=self.class_count).astype(np.int64) * (elements // len(self.classes))
        return np.concatenate(([0], np.cumsum(sizes)))


def scans(symbols: np.ndarray, shape: tuple[int, ...], alphabet: int) -> Iterator[Scan]:
    """Orders worth trying.

    Args:
        symbols: the elements' value symbols, flat; 0 is the background of a sparse tensor.
        shape: the tensor's shape.
        alphabet: number of symbols.

    Yields:
        First the plain order, then transposed ones, then those with classes.
    """
    elements = len(symbols)
    yield Scan(1, False, None, 1)
    splits = sorted({int(np.prod(shape[:i])) for i in {1, len(shape) - 1}} - {1, elements}) if len(shape) > 1 else []
    for rows in splits:
        for transposed in (False, True):
            if transposed:
                yield Scan(rows, True, None, 1)
            lines = elements // rows if transposed else rows
            if 8 <= lines <= MAX_LINES and elements >= 4 * lines and lines * alphabet <= _MAX_HISTOGRAM:
                for classes in _line_classes(symbols.reshape(rows, -1), transposed, alphabet):
                    yield Scan(rows, transposed, classes, int(classes.max()) + 1)


def _line_classes(matrix: np.ndarray, transposed: bool, alphabet: int) -> Iterator[np.ndarray]:
    # Lloyd's rounds over code length: a line joins the class whose code is the shortest for it, a class's code fits
    # the counts of its lines.
    lines = matrix.T if transposed else matrix
    if alphabet > 256:
        return
    keys = np.arange(len(lines))[:, None] * alphabet + lines
    counts = np.bincount(keys.ravel(), minlength=len(lines) * alphabet).reshape(len(lines), alphabet).astype(np.float64)
    rank = np.argsort(np.argsort(counts[:, 0], kind="stable"), kind="stable")
    big = matrix.size > 1 << 20
    prior = counts.mean(axis=0) * 0.1 + 1e-3  # a class without a symbol yet may still take it in
    whole = entropy_bits(counts.sum(axis=0))
    for wanted in (4,) if big else (4, 2, 3, 6, 8, 12, 16):
        if len(lines) < 2 * wanted:
            continue
        classes = rank * wanted // len(lines)
        for _ in range(5 if big else 12):
            totals = np.stack([counts[classes == c].sum(axis=0) for c in range(wanted)]) + prior
            cost = counts @ -np.log2(totals / totals.sum(axis=1, keepdims=True)).T
            nearest = cost.argmin(axis=1)
            if np.array_equal(nearest, classes):
                break
            classes = nearest
        _, classes = np.unique(classes, return_inverse=True)
        used = int(classes.max()) + 1
        saved = whole - sum(entropy_bits(counts[classes == c].sum(axis=0)) for c in range(used))
        if used > 1 and saved > entropy_bits(np.bincount(classes)) + 8 * used:
            yield classes.astype(np.uint8)
        elif wanted == 2:
            return  # neither four nor two classes helped: the lines are alike
