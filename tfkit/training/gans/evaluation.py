"""How good generated examples are: Frechet and kernel distances, precision and recall, duplicates.

Paper: Heusel et al. GANs trained by a two time-scale update rule converge to a local Nash equilibrium. NIPS 2017,
https://arxiv.org/abs/1706.08500 (FID); Binkowski et al., https://arxiv.org/abs/1801.01401 (KID); Kynkaanniemi et al.,
https://arxiv.org/abs/1904.06991 (precision and recall).

Differs: features are those of a classifier trained on the same data set, not of Inception on ImageNet, and the names
say so; figures compare with each other only on one data set and one classifier.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np

from tfkit.internal import checks


class PrecisionRecall(NamedTuple):
    """Shares of generated examples within the real ones' manifold, and of real within the generated ones'."""

    precision: float
    recall: float


def features(classifier: keras.Model, images: np.ndarray, layer: str | None = None) -> np.ndarray:
    """Returns what a classifier's layer says of images, (count, features), float64.

    Args:
        classifier: a functional model.
        images: (count, ...).
        layer: its name; None: the one before the last.
    """
    chosen = classifier.layers[-2] if layer is None else classifier.get_layer(layer)
    found = keras.Model(classifier.inputs, chosen.output).predict(images, batch_size=500, verbose=0)
    return found.reshape(len(found), -1).astype(np.float64)


def classifier_fid(real: np.ndarray, made: np.ndarray) -> float:
    """Returns |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)) of features (count, features); 0 for equal Gaussians.

    >>> x = np.random.default_rng(0).normal(size=(500, 3))
    >>> round(classifier_fid(x, x + [1.0, 0.0, 2.0]), 6)
    5.0
    """
    _check(real, made)
    first, second = (np.cov(each, rowvar=False).reshape(each.shape[1], -1) for each in (real, made))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # The eigenvalues of C1 C2 are those of C1^(1/2) C2 C1^(1/2), which is symmetric.
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    away = np.square(real.mean(axis=0) - made.mean(axis=0)).sum()
    return float(away + np.trace(first) + np.trace(second) - 2 * cross)


def classifier_kid(
    real: np.ndarray, made: np.ndarray, *, subset: int = 1000, subsets: int = 10, seed: int = 0
) -> float:
    """Returns the unbiased squared maximum mean discrepancy under the kernel (x y / features + 1)^3.

    Args:
        real, made: features, (count, features).
        subset: examples of a block; the mean over blocks is returned.
        subsets: how many blocks.
        seed: chooses them.
    """
    _check(real, made)
    rng = np.random.default_rng(seed)
    size = min(checks.integer("subset", subset, 2), len(real), len(made))
    found = []
    for _ in range(checks.integer("subsets", subsets, 1)):
        x = real[rng.choice(len(real), size, replace=False)]
        y = made[rng.choice(len(made), size, replace=False)]
        within_x, within_y, across = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
        same = (within_x.sum() - np.trace(within_x) + within_y.sum() - np.trace(within_y)) / (size * (size - 1))
        found.append(same - 2 * across.mean())
    return float(np.mean(found))


def precision_recall(real: np.ndarray, made: np.ndarray, neighbours: int = 3) -> PrecisionRecall:
    """Returns shares within the other set's balls, each reaching to its centre's k-th nearest neighbour.

    Args:
        real, made: features, (count, features).
        neighbours: k.
    """
    _check(real, made)
    checks.integer("neighbours", neighbours, 1, min(len(real), len(made)) - 1)
    across = _distances(real, made)
    reach_real, reach_made = (np.partition(_distances(each, each), neighbours, axis=1)[:, neighbours]
                              for each in (real, made))  # fmt: skip
    precision = (across <= reach_real[:, None]).any(axis=0).mean()
    recall = (across <= reach_made[None, :]).any(axis=1).mean()
    return PrecisionRecall(float(precision), float(recall))


def duplicates(real: np.ndarray, made: np.ndarray, quantile: float = 0.01) -> float:
    """Returns the share of generated examples that lie closer to another than all but a `quantile` of real ones do.

    About `quantile` for as many real examples, up to 1 for a collapsed generator.
    """
    _check(real, made)
    count = min(len(real), len(made))
    nearest = []
    for each in (real[:count], made[:count]):
        distance = _distances(each, each)
        np.fill_diagonal(distance, np.inf)
        nearest.append(distance.min(axis=1))
    return float(np.mean(nearest[1] < np.quantile(nearest[0], checks.number("quantile", quantile, 0, 1))))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squared, 0))


def _check(real: Any, made: Any) -> None:
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1] or min(len(real), len(made)) < 2:
        raise checks.error("made", f"features such as `real` has, of shape (count, {real.shape[-1]})", made)
    if not (np.isfinite(real).all() and np.isfinite(made).all()):
        raise checks.error("made", "finite", made, "A generator that diverged cannot be compared.")
