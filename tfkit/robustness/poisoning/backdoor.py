"""Backdoors: a trigger in a few training examples, with a label of the attacker's choice, that the network learns.

Paper: Gu, Dolan-Gavitt, Garg. BadNets: identifying vulnerabilities in the machine learning model supply chain. arXiv
1708.06733, https://arxiv.org/abs/1708.06733 (`PatchTrigger`, one target or every class to the next). Chen, Liu, Li,
Lu, Song. Targeted backdoor attacks on deep learning systems using data poisoning. arXiv 1712.05526,
https://arxiv.org/abs/1712.05526 (`BlendedTrigger`).

Differs: examples of the target class itself are not chosen, unless the labels are to stay clean, when only those are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tfkit.data import Dataset
from tfkit.internal import checks
from tfkit.robustness.poisoning import record
from tfkit.robustness.poisoning.record import PoisonRecord

CORNERS = ("top left", "top right", "bottom left", "bottom right")
PATTERNS = ("square", "checkerboard", "pixel")
ALL_TO_ALL = "all-to-all"


@dataclasses.dataclass(frozen=True)
class PatchTrigger:
    """A small patch in a corner of the image.

    Args:
        size: side of the patch in pixels.
        pattern: "square"; "checkerboard", BadNets' pattern, whose other pixels are left as they are; or "pixel", one
            pixel in the middle of it.
        corner: "bottom right" or another.
        margin: pixels between the patch and the border.
        value: that the pixels get.
    """

    size: int = 3
    pattern: str = "checkerboard"
    corner: str = "bottom right"
    margin: int = 1
    value: float = 1.0

    def __post_init__(self) -> None:
        checks.integer("size", self.size, 1)
        checks.integer("margin", self.margin, 0)
        checks.choice("pattern", self.pattern, PATTERNS)
        checks.choice("corner", self.corner, CORNERS)
        checks.number("value", self.value)

    def mask(self, height: int, width: int) -> np.ndarray:
        """Returns bool, (height, width): the pixels that are set.

        Raises:
            ValueError: the patch is larger than the image.
        """
        if self.size + self.margin > min(height, width):
            raise checks.error("size", f"at most {min(height, width) - self.margin} for images of this size", self.size)
        rows, columns = np.indices((self.size, self.size))
        middle = self.size // 2
        chosen = {
            "square": np.ones((self.size, self.size), bool),
            "checkerboard": (rows + columns) % 2 == 0,
            "pixel": (rows == middle) & (columns == middle),
        }[self.pattern]
        mask = np.zeros((height, width), bool)
        top = self.margin if "top" in self.corner else height - self.margin - self.size
        left = self.margin if "left" in self.corner else width - self.margin - self.size
        mask[top : top + self.size, left : left + self.size] = chosen
        return mask

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns images with the trigger, (examples, height, width, channels); `x` is left as it is."""
        x = _images(x)
        return np.where(self.mask(x.shape[1], x.shape[2])[:, :, None], np.asarray(self.value, x.dtype), x)


@dataclasses.dataclass(frozen=True, eq=False)
class BlendedTrigger:
    """An image laid faintly over the whole: (1 - alpha) x + alpha pattern.

    Args:
        pattern: (height, width, channels), in the units of the images; None: noise of uniform pixels.
        alpha: its share.
        seed: of the noise.
    """

    pattern: np.ndarray | None = None
    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        checks.number("alpha", self.alpha, 0, 1)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns images with the trigger, (examples, height, width, channels); `x` is left as it is."""
        x = _images(x)
        pattern = self.pattern
        if pattern is None:
            pattern = np.random.default_rng(self.seed).uniform(size=x.shape[1:])
        if np.shape(pattern) != x.shape[1:]:
            raise checks.error("pattern", f"of the images' shape {x.shape[1:]}", pattern)
        return ((1 - self.alpha) * x + self.alpha * np.asarray(pattern)).astype(x.dtype)


Trigger = Callable[[np.ndarray], np.ndarray]


def backdoor(
    dataset: Dataset,
    trigger: Trigger,
    target: int | str = 0,
    rate: float = 0.01,
    *,
    source: int | None = None,
    clean_label: bool = False,
    seed: int = 0,
) -> tuple[Dataset, PoisonRecord]:
    """Puts a trigger on some training images and gives them the attacker's label.

    Args:
        dataset: of images; left as it is.
        trigger: `PatchTrigger`, `BlendedTrigger`, or any function from images to images of the same shape.
        target: the class that the trigger shall stand for, or "all-to-all": each class becomes the next one.
        rate: share of all training examples that is changed.
        source: the class they are taken from; None: any but the target.
        clean_label: take examples of the target class, whose labels then stay.
        seed: of the choice.

    Returns:
        The poisoned data set, and what was changed.

    Raises:
        ValueError: an argument breaks its rule, or there are too few examples to choose from.
    """
    labels = dataset.y_train
    everywhere = target == ALL_TO_ALL
    if isinstance(target, str) and not everywhere:
        raise checks.error("target", f"a class or {ALL_TO_ALL!r}", target)
    if clean_label and (everywhere or source is not None):
        raise checks.error("clean_label", "False with `source` or with all-to-all", clean_label)
    if not everywhere:
        target = record.checked_class("target", target, dataset)
    if source is not None:
        allowed = labels == record.checked_class("source", source, dataset)
        if source == target:
            raise checks.error("source", "another class than the target", source, "Pass `clean_label=True` for that.")
    else:
        allowed = np.ones(len(labels), bool) if everywhere else (labels == target) == clean_label
    candidates = np.flatnonzero(allowed)
    count = record.count_of(rate, dataset, candidates)
    indices = np.random.default_rng(seed).choice(candidates, count, replace=False)
    inputs = trigger(dataset.x_train[indices])
    if np.shape(inputs) != dataset.x_train[indices].shape:
        raise checks.error("trigger", "a function that keeps the shape of the images", inputs)
    new = None if clean_label else changed_labels(labels[indices], target, dataset.num_classes)
    settings = {"trigger": repr(trigger), "target": target, "source": source, "clean_label": clean_label}
    return record.poisoned(dataset, indices, method="backdoor", seed=seed, inputs=inputs, labels=new, settings=settings)


def changed_labels(labels: np.ndarray, target: int | str, classes: int) -> np.ndarray:
    """Returns the labels that the trigger stands for, int64.

    >>> changed_labels(np.array([0, 9]), "all-to-all", 10)
    array([1, 0])
    """
    return (labels + 1) % classes if target == ALL_TO_ALL else np.full(len(labels), target, np.int64)


def _images(x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 4 or x.dtype.kind != "f":
        raise checks.error("x", "float images (examples, height, width, channels)", x)
    return x
