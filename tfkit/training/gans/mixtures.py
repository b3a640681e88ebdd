"""Mixtures with modes that can be counted: the ring and the grid of Gaussians, and stacked digits.

Paper: Srivastava et al. VEEGAN: reducing mode collapse in GANs using implicit variational learning. NIPS 2017,
https://arxiv.org/abs/1705.07761: a generated point is of high quality within three standard deviations of a mode, and a
mode is covered if such a point falls to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tfkit.internal import checks


class Coverage(NamedTuple):
    """What generated examples cover of a mixture.

    Attributes:
        modes: that were hit at least as often as asked.
        of: modes that there are.
        high_quality: share of examples that belong to a mode.
        divergence: Kullback-Leibler divergence from the hits, as shares, to equal shares, in nats; inf without a hit.
    """

    modes: int
    of: int
    high_quality: float
    divergence: float


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Equal Gaussians around given centres.

    Attributes:
        centres: (modes, dimensions).
        deviation: the standard deviation in each dimension.
    """

    centres: np.ndarray
    deviation: float

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Returns points (count, dimensions), float32."""
        rng = np.random.default_rng(seed)
        chosen = self.centres[rng.integers(0, len(self.centres), count)]
        return (chosen + self.deviation * rng.normal(size=chosen.shape)).astype("float32")

    def coverage(self, points: np.ndarray, within: float = 3.0, least: int = 1) -> Coverage:
        """Counts the modes that points fall to.

        Args:
            points: (count, dimensions).
            within: distance, in standard deviations, up to which a point belongs to the nearest mode.
            least: hits that a covered mode has.
        """
        points = np.asarray(points)
        if points.ndim != 2 or points.shape[1] != self.centres.shape[1]:
            raise checks.error("points", f"of shape (count, {self.centres.shape[1]})", points)
        distance = np.linalg.norm(points[:, None] - self.centres, axis=-1)
        near = distance.min(axis=1) <= within * self.deviation
        hits = np.bincount(distance.argmin(axis=1)[near], minlength=len(self.centres))
        return Coverage(int((hits >= least).sum()), len(hits), float(near.mean()), _divergence(hits))


def ring(modes: int = 8, radius: float = 2.0, deviation: float = 0.02) -> GaussianMixture:
    """Gaussians on a circle."""
    angle = 2 * np.pi * np.arange(checks.integer("modes", modes, 1)) / modes
    return GaussianMixture(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), deviation)


def grid(side: int = 5, spacing: float = 2.0, deviation: float = 0.05) -> GaussianMixture:
    """`side` times `side` Gaussians on a square grid around zero.

    >>> mixture = grid()
    >>> mixture.coverage(mixture.sample(2500)).modes
    25
    """
    line = (np.arange(checks.integer("side", side, 1)) - (side - 1) / 2) * spacing
    return GaussianMixture(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2), deviation)


def stacked_digits(x: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Returns images of three digits, one a colour channel: 1,000 modes, (count, height, width, 3).

    Args:
        x: images of one channel, (examples, height, width, 1).
        count: how many to make.
        seed: chooses the digits.
    """
    if x.ndim != 4 or x.shape[-1] != 1:
        raise checks.error("x", "of shape (examples, height, width, 1)", x)
    chosen = np.random.default_rng(seed).integers(0, len(x), (3, count))
    return np.concatenate([x[each] for each in chosen], axis=-1)


def stacked_coverage(classifier: Any, images: np.ndarray, classes: int = 10) -> Coverage:
    """Counts the modes of stacked digits by what a classifier sees in each channel.

    Args:
        classifier: images of one channel to logits; anything with Keras' `predict`.
        images: (count, height, width, 3).
        classes: that the classifier knows.
    """
    seen = [
        classifier.predict(images[..., channel, None], verbose=0).argmax(axis=-1) for channel in range(images.shape[-1])
    ]
    mode = sum(labels * classes**place for place, labels in enumerate(seen))
    hits = np.bincount(mode, minlength=classes ** len(seen))
    return Coverage(int((hits > 0).sum()), len(hits), 1.0, _divergence(hits))


def _divergence(hits: np.ndarray) -> float:
    if not hits.sum():
        return float("inf")
    share = hits / hits.sum()
    return float(np.sum(share[share > 0] * np.log(share[share > 0] * len(hits))))
