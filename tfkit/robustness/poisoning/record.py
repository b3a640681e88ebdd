"""What every way of poisoning gives back, and how the examples are chosen and replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfkit.data import Dataset
from tfkit.internal import checks


@dataclasses.dataclass(frozen=True, eq=False)
class PoisonRecord:
    """What was changed in the training examples of a data set.

    Attributes:
        method: the function's name.
        changed: "labels", "inputs", or "inputs and labels".
        indices: int64, (poisoned,): rows of `x_train` that were changed, ascending.
        old_labels, new_labels: int64, (poisoned,): before and after; equal where only the input was changed.
        examples: how many training examples there are.
        seed: that the choice was made with.
        settings: the other arguments, and what the method found, as plain values.
    """

    method: str
    changed: str
    indices: np.ndarray
    old_labels: np.ndarray
    new_labels: np.ndarray
    examples: int
    seed: int
    settings: Mapping[str, Any]

    @property
    def rate(self) -> float:
        """The share of training examples that were changed."""
        return len(self.indices) / self.examples

    def mask(self) -> np.ndarray:
        """Returns bool, (examples,): which training examples were changed."""
        mask = np.zeros(self.examples, bool)
        mask[self.indices] = True
        return mask

    def __repr__(self) -> str:
        share = f"{len(self.indices)} of {self.examples} examples ({100 * self.rate:.2g} %)"
        return f"PoisonRecord({self.method}: {self.changed} of {share}, seed {self.seed})"


def count_of(rate: float, dataset: Dataset, candidates: np.ndarray) -> int:
    """Returns how many examples a rate asks for.

    Raises:
        ValueError: the rate asks for none, or for more than there are candidates.
    """
    count = round(checks.number("rate", rate, 0, 1) * len(dataset.y_train))
    if not 1 <= count <= len(candidates):
        raise checks.error(
            "rate", f"such that 1 to {len(candidates)} of the {len(dataset.y_train)} examples are changed", rate
        )
    return count


def checked_class(name: str, value: Any, dataset: Dataset) -> int:
    """Returns a class of the data set."""
    return checks.integer(name, value, 0, dataset.num_classes - 1)


def poisoned(
    dataset: Dataset,
    indices: np.ndarray,
    *,
    method: str,
    seed: int,
    inputs: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Dataset, PoisonRecord]:
    """Replaces training examples in a copy of a data set.

    Args:
        dataset: left as it is.
        indices: (poisoned,), rows of the training part.
        method, seed, settings: for the record.
        inputs: (poisoned, ...), or None where they stay.
        labels: (poisoned,), or None where they stay.
    """
    order = np.argsort(indices)
    indices = np.asarray(indices, np.int64)[order]
    changes: dict[str, Any] = {}
    old = dataset.y_train[indices]
    new = old if labels is None else np.asarray(labels, np.int64)[order]
    if inputs is not None:
        changes["x_train"] = dataset.x_train.copy()
        changes["x_train"][indices] = inputs[order]
    if labels is not None:
        changes["y_train"] = dataset.y_train.copy()
        changes["y_train"][indices] = new
    changed = " and ".join(name for name, value in (("inputs", inputs), ("labels", labels)) if value is not None)
    record = PoisonRecord(method, changed, indices, old.copy(), new.copy(), len(dataset.y_train), seed, settings or {})
    return dataclasses.replace(dataset, **changes), record
