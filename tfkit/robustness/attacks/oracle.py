"""Oracle: a model behind a counter, that answers with scores, its top classes or a label.

A black-box attack sees a model through an oracle and in no other way. Arrays go in and come out, so no gradient can
pass. Every row asked is a query.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks

OUTPUTS = ("scores", "top-k", "labels")
_LEAST = 1e-30
_SUM_TOLERANCE = 0.05


class BudgetExhaustedError(RuntimeError):
    """More rows were asked than the budget has left. None of them was answered."""


class TopK(NamedTuple):
    """What an oracle of the top classes answers.

    Attributes:
        labels: int64, (batch, k): classes, likeliest first.
        scores: float32, (batch, k): their log-probabilities.
    """

    labels: np.ndarray
    scores: np.ndarray


class Oracle:
    """Answers about points, and counts them.

    Scores are log-probabilities, (batch, classes), whether the model gives logits or probabilities: a softmax is
    recognised by its sums on the first call. With `output="labels"` the model may itself return integer classes,
    (batch,); `classes` then says how many there are.

    Args:
        model: a Keras model, a callable from float32 arrays, the path of a `.tflite` file, or its `Runner`.
        output: what is answered: "scores", "top-k" or "labels".
        budget: queries an example; None for no limit.
        total: queries of all examples and all attacks together; None for no limit.
        k: how many classes "top-k" answers.
        classes: how many there are, where the model returns labels.
        batch_size: rows the model gets at once.
    """

    def __init__(
        self,
        model: Any,
        output: str = "scores",
        *,
        budget: int | None = None,
        total: int | None = None,
        k: int = 3,
        classes: int | None = None,
        batch_size: int = 1024,
    ) -> None:
        self.output = checks.choice("output", output, OUTPUTS)
        self.budget = None if budget is None else checks.integer("budget", budget, 1)
        self.total = None if total is None else checks.integer("total", total, 1)
        self.k = checks.integer("k", k, 1)
        self.classes = None if classes is None else checks.integer("classes", classes, 2)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self._model = _as_function(model)
        self._probabilities: bool | None = None
        self.queries = 0
        self.counts = np.zeros(0, np.int64)

    def start(self, examples: int) -> None:
        """Begins the counts of so many new examples; the total goes on."""
        self.counts = np.zeros(examples, np.int64)

    def allowance(self, examples: int) -> int | None:
        """Returns the queries that each of so many new examples may make; None if nothing limits them."""
        limits = [] if self.budget is None else [self.budget]
        if self.total is not None:
            limits.append((self.total - self.queries) // examples)
        return min(limits, default=None)

    def __call__(self, points: Any, examples: Any = None) -> Any:
        """Asks about each row of `points`.

        Args:
            points: (rows, ...).
            examples: int, (rows,): the example for which each row is asked; by default the row of the same number.

        Returns:
            Log-probabilities, float32, (rows, classes); a `TopK`; or labels, int64, (rows,).

        Raises:
            BudgetExhaustedError: the rows are more than the budget has left.
            ValueError: the model returns no finite scores.
        """
        points = np.asarray(points, np.float32)
        examples = np.arange(len(points)) if examples is None else np.asarray(examples)
        if examples.shape != (len(points),) or examples.dtype.kind not in "iu" or (examples < 0).any():
            raise checks.error("examples", f"the number of an example for each row, ({len(points)},)", examples)
        if not len(points):
            raise checks.error("points", "at least one row", points)
        asked = np.bincount(examples, minlength=len(self.counts))
        counts = asked + np.pad(self.counts, (0, len(asked) - len(self.counts)))
        if self.budget is not None and (counts > self.budget).any():
            over = int(np.argmax(counts > self.budget))
            left = self.budget - int(counts[over] - asked[over])
            raise BudgetExhaustedError(
                f"Example {over} has {left} of its {self.budget} queries left, "
                f"and {int(asked[over])} were asked. Raise `budget`, or ask less."
            )
        if self.total is not None and self.queries + len(points) > self.total:
            raise BudgetExhaustedError(
                f"{self.total - self.queries} of {self.total} queries are left, and {len(points)} were asked. "
                "Raise `total`, or ask less."
            )
        self.counts = counts
        self.queries += len(points)
        return self._answer(self.inspect(points))

    def inspect(self, points: Any) -> np.ndarray:
        """Returns log-probabilities, (rows, classes), uncounted: for who evaluates an attack, not for the attack.

        Where the model returns labels their rows are 0 at the label and less elsewhere.
        """
        points = np.asarray(points, np.float32)
        parts = [
            np.asarray(self._model(points[at : at + self.batch_size])) for at in range(0, len(points), self.batch_size)
        ]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if values.ndim == 1 and values.dtype.kind in "iu" and self.output == "labels":
            return self._one_hot(values, len(points))
        if values.ndim != 2 or len(values) != len(points) or values.shape[1] < 2:
            raise checks.error("model", f"a function to scores, ({len(points)}, two classes or more)", values)
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise checks.error("model", "a function to finite scores", values, "Look for overflow in the model.")
        if self._probabilities is None:
            # Probabilities of eight bits do not sum to 1 exactly.
            self._probabilities = bool((values >= 0).all() and (np.abs(values.sum(axis=1) - 1) < _SUM_TOLERANCE).all())
        return log_probabilities(values, self._probabilities)

    def _one_hot(self, labels: np.ndarray, rows: int) -> np.ndarray:
        if self.classes is None:
            raise checks.error("classes", "given where the model returns labels", self.classes)
        if len(labels) != rows or labels.min() < 0 or labels.max() >= self.classes:
            raise checks.error("model", f"a function to labels, ({rows},), below {self.classes}", labels)
        return np.where(labels[:, None] == np.arange(self.classes), 0.0, -1.0).astype(np.float32)

    def _answer(self, scores: np.ndarray) -> Any:
        if self.output == "scores":
            return scores
        if self.output == "labels":
            return np.argmax(scores, axis=1)
        labels = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        return TopK(labels, np.take_along_axis(scores, labels, axis=1))


def log_probabilities(values: np.ndarray, probabilities: bool) -> np.ndarray:
    """Returns the logarithms of probabilities, (batch, classes), that are given as such or as logits."""
    if probabilities:
        return np.log(np.maximum(values, _LEAST))
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _as_function(model: Any) -> Callable[[np.ndarray], Any]:
    if isinstance(model, Oracle):
        raise checks.error("model", "a model, not an oracle", model, "Pass the oracle itself.")
    if isinstance(model, (str, os.PathLike)):
        if Path(model).suffix != ".tflite":
            raise checks.error("model", "the path of a .tflite file", model)
        from tfkit.export import Runner

        return Runner(model)
    if isinstance(model, keras.Model):
        # One graph for all batch sizes: a search asks for another number of rows at each step.
        return tf.function(lambda points: model(points, training=False), reduce_retracing=True)
    if not callable(model):
        raise checks.error("model", "a Keras model, a callable or the path of a .tflite file", model)
    return lambda points: model(points)
