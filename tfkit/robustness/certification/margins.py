"""What is to be proven of an output: that the right class stays ahead of the others.

A margin is one linear function of the output, row e_y - e_j, and is bounded as such, back through the last layer. The
difference of a lower bound of the right class and an upper bound of the other would be looser: the two bounds are met
at different points of the ball.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks


def margin_rows(labels: np.ndarray, outputs: int, targets: np.ndarray | None = None) -> np.ndarray:
    """Rows e_y - e_j for each class j but y, or for one target class.

    Args:
        labels: y, (examples,).
        outputs: number of classes.
        targets: j, (examples,); None: all others.

    Returns:
        (examples, classes - 1 or 1, classes).

    >>> margin_rows(np.array([1]), 3).tolist()
    [[[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]]
    """
    unit = np.eye(outputs)
    if targets is not None:
        return (unit[labels] - unit[targets])[:, None]
    others = np.arange(outputs - 1)[None] + (np.arange(outputs - 1)[None] >= labels[:, None])
    return unit[labels][:, None] - unit[others]


def check_examples(x: Any, shape: tuple[int, ...], clip: tuple[float, float] | None) -> np.ndarray:
    """Returns examples as a finite array (examples, *shape) inside of the clip range.

    Raises:
        ValueError: they are not.
    """
    array = np.asarray(x)
    if array.dtype.kind not in "fiu" or array.shape[1:] != shape or not len(array):
        raise checks.error("x", f"an array of numbers of shape (examples, {', '.join(map(str, shape))})", x)
    if not np.isfinite(array).all():
        raise checks.error("x", "finite", x, "It holds NaN or infinite numbers.")
    if clip is not None and (array.min() < clip[0] or array.max() > clip[1]):
        raise checks.error(
            "x", f"inside of `clip`, [{clip[0]:g}, {clip[1]:g}]",
            f"values from {array.min():g} to {array.max():g}", "Rescale the inputs, or pass clip=None.",
        )  # fmt: skip
    return array


def check_classes(name: str, value: Any, count: int, outputs: int) -> np.ndarray:
    """Returns class indices, (examples,).

    Raises:
        ValueError: they are not integers of the classes, one for each example.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise checks.error(name, f"integers of shape ({count},), one class for each example", value)
    if array.size and (array.min() < 0 or array.max() >= outputs):
        raise checks.error(name, f"classes from 0 to {outputs - 1}", f"from {array.min()} to {array.max()}")
    return array.astype(np.int64)
