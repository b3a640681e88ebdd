"""The `Dataset` record, the checks that every source passes through, and the seeded split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tfkit.internal import checks

#: More classes than this is a mistake in the labels (an id or a pixel column), not a classification problem.
MAX_CLASSES = 100_000


class DataError(ValueError):
    """Data that is absent, damaged, or not of the form that is asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A classification data set in memory.

    Attributes:
        name: the name or path it was loaded by.
        x_train, x_validation, x_test: inputs, (examples, ...). Images are float32 in [0, 1] with a channel axis,
            (examples, height, width, channels).
        y_train, y_validation, y_test: int64 labels from 0, (examples,).
        class_names: one name a class.
        source: where the arrays came from, in words.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    source: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.x_train.shape[1:])

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}: {len(self.x_train)} train, {len(self.x_validation)} validation, "
            f"{len(self.x_test)} test, input {self.input_shape}, {self.num_classes} classes; {self.source})"
        )

    def subset(
        self, train: int | None = None, validation: int | None = None, test: int | None = None, *, seed: int = 0
    ) -> Dataset:
        """Returns a data set with fewer examples, each class kept in proportion.

        Args:
            train, validation, test: examples to keep in each part; None keeps all.
            seed: chooses the examples.

        Raises:
            ValueError: if a part has fewer examples than asked for.
        """
        changed: dict[str, Any] = {}
        for offset, (part, count) in enumerate((("train", train), ("validation", validation), ("test", test))):
            if count is None:
                continue
            labels = getattr(self, f"y_{part}")
            count = checks.integer(part, count, 0, len(labels))
            chosen = stratified(labels, count, np.random.default_rng((seed, offset)))
            changed[f"x_{part}"] = getattr(self, f"x_{part}")[chosen]
            changed[f"y_{part}"] = labels[chosen]
        return replace(self, **changed)


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `count` distinct positions in random order, each class represented in proportion to within one example.

    The positions are shuffled, brought together by class, and taken at equal steps.
    """
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    steps = ((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(np.int64)
    return rng.permutation(order[steps])


def from_arrays(
    name: str,
    arrays: Mapping[str, np.ndarray],
    *,
    source: str,
    validation: float = 0.1,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Checks arrays hard and makes a `Dataset` of them.

    Inputs of dtype uint8 are taken as pixels: divided by 255, and given a channel axis if they are (examples, height,
    width). Floating-point inputs are taken as they are, as float32; other integers (token ids) as int32.

    Args:
        name: what the data set is called.
        arrays: x_train, y_train, x_test, y_test, and x_validation, y_validation or neither.
        source: where the arrays came from, in words.
        validation: fraction of the training examples set aside for validation, in [0, 1), each class in proportion;
            of no effect where `arrays` has a validation part.
        seed: chooses the validation examples, and the order of the training examples.
        class_names: one name a class; the numbers if None, and then every class must occur in y_train.

    Raises:
        DataError: naming the array, the rule and what arrived.
    """
    validation = checks.number("validation", validation, 0, 1, open_high=True)
    parts = ["train", "test"]
    given = [key for key in ("x_validation", "y_validation") if key in arrays]
    if given:
        parts.append("validation")
    absent = [key for part in parts for key in (f"x_{part}", f"y_{part}") if key not in arrays]
    if absent:
        raise DataError(
            f"{name}: missing {', '.join(absent)}. Needed: x_train, y_train, x_test, y_test; x_validation and "
            f"y_validation come together or not at all. Found: {', '.join(arrays) or 'nothing'}."
        )
    x = {part: _inputs(name, f"x_{part}", np.asarray(arrays[f"x_{part}"])) for part in parts}
    y = {part: _labels(name, f"y_{part}", np.asarray(arrays[f"y_{part}"])) for part in parts}
    for part in parts:
        if len(x[part]) != len(y[part]):
            raise DataError(f"{name}: x_{part} has {len(x[part])} examples but y_{part} has {len(y[part])}.")
        if x[part].shape[1:] != x["train"].shape[1:] or x[part].dtype != x["train"].dtype:
            raise DataError(
                f"{name}: x_{part} and x_train must be alike but for their number of examples. Found "
                f"{x[part].shape} {x[part].dtype} and {x['train'].shape} {x['train'].dtype} after conversion."
            )
    names = _class_names(name, y, class_names)

    if "validation" not in parts:
        rng = np.random.default_rng(seed)
        total = len(y["train"])
        held_out = min(max(1, round(total * validation)), total - 1) if validation else 0
        chosen = stratified(y["train"], held_out, rng)
        kept = rng.permutation(np.setdiff1d(np.arange(total), chosen))
        x["validation"], y["validation"] = x["train"][chosen], y["train"][chosen]
        x["train"], y["train"] = x["train"][kept], y["train"][kept]
    return Dataset(
        name,
        x["train"],
        y["train"],
        x["validation"],
        y["validation"],
        x["test"],
        y["test"],
        names,
        source,
    )


def _inputs(name: str, key: str, x: np.ndarray) -> np.ndarray:
    if x.dtype.kind not in "fiu":
        raise DataError(f"{name}: {key} must be an array of numbers. Received dtype {x.dtype}.")
    if x.ndim < 2 or 0 in x.shape:
        raise DataError(f"{name}: {key} must have shape (examples, ...) and not be empty. Received shape {x.shape}.")
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / np.float32(255)
        return x[..., np.newaxis] if x.ndim == 3 else x
    if x.dtype.kind in "iu":
        if x.max() > np.iinfo(np.int32).max or x.min() < np.iinfo(np.int32).min:
            raise DataError(
                f"{name}: {key} holds integers beyond 32 bits. Pixels are uint8 or floats; token ids int32."
            )
        return x.astype(np.int32)
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        bad = int(np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1)))
        raise DataError(f"{name}: {key} holds NaN or infinity (as float32) in {bad} of {len(x)} examples.")
    return x


def _labels(name: str, key: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(
            f"{name}: {key} must have shape (examples,). Received shape {y.shape}. "
            "One-hot labels: np.argmax(y, axis=1)."
        )
    if y.dtype.kind not in "iu":
        raise DataError(f"{name}: {key} must be integers. Received dtype {y.dtype}. Whole floats: y.astype('int64').")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES):
        raise DataError(f"{name}: {key} must lie in 0..{MAX_CLASSES - 1}. Received {y.min()}..{y.max()}.")
    return y.astype(np.int64)


def _class_names(name: str, y: Mapping[str, np.ndarray], class_names: Sequence[str] | None) -> tuple[str, ...]:
    if class_names is None:
        present = np.unique(y["train"])
        missing = np.setdiff1d(np.arange(present[-1] + 1), present)
        if len(missing):
            raise DataError(
                f"{name}: labels must be numbered from 0 without gaps, but y_train has no label "
                f"{', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}. Renumber them "
                "(np.unique(y, return_inverse=True)), or give class_names to say that the class exists."
            )
        class_names = [str(label) for label in present]
    for part, labels in y.items():
        if labels.max() >= len(class_names):
            raise DataError(f"{name}: y_{part} has label {labels.max()}, but there are {len(class_names)} classes.")
    return tuple(str(item) for item in class_names)
