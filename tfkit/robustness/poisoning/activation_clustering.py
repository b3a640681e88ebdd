"""Activation clustering: a poisoned class falls into two clusters, of which the small one is the poison.

Paper: Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava. Detecting backdoor attacks on deep neural
networks by activation clustering. arXiv 1811.03728, https://arxiv.org/abs/1811.03728: the activations of each class are
reduced to ten dimensions and split by 2-means; relative size and silhouette say whether the split means anything.

Differs: reduced by robust whitening of the largest directions in place of independent components, so that the clean
examples' own spread does not decide the split; the clusters are split again along the line on which they differ most,
until they stay. A cluster is flagged only if it is small, the silhouette is high and
there is a gap; taking the smaller cluster of every class flags a third of the clean data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from tfkit.internal import checks
from tfkit.robustness.poisoning import detection
from tfkit.robustness.poisoning.detection import (
    ClassFinding,
    Detection,
    checked_features,
    principal,
    robustly_whitened,
    sharpened,
)


@detection.single_threaded
def activation_clustering(
    features: Any,
    labels: Any,
    *,
    components: int = 32,
    silhouette: float = 0.3,
    separation: float = 6.1,
    largest_share: float = 0.35,
    seed: int = 0,
) -> Detection:
    """Looks for poison in the features of a network that was trained on it.

    Args:
        features: (examples, features), such as `poisoning.features` gives.
        labels: (examples,), as trained with.
        components: largest directions of a class that are looked at.
        silhouette: least mean silhouette of the two clusters, in [-1, 1].
        separation: least Ashman's D of the two clusters along the line on which they differ most: a tail has a high
            silhouette too, but no gap.
        largest_share: of a class that may be poison.
        seed: of the clustering, and of the at most 2,000 examples a class that the silhouette is measured on.

    Returns:
        What is flagged; scores are distances to the larger cluster's centre less those to the smaller one's;
        `separation` in the findings is the silhouette.
    """
    features, labels = checked_features(features, labels)
    checks.integer("components", components, 1)
    checks.number("silhouette", silhouette, -1, 1)
    checks.number("separation", separation, 0)
    checks.number("largest_share", largest_share, 0, 0.5)
    flagged, scores = np.zeros(len(labels), bool), np.zeros(len(labels))
    classes: dict[int, ClassFinding] = {}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rows = features[members]
        if len(members) < 4 * components or not np.ptp(rows, axis=0).any():
            classes[int(label)] = ClassFinding(len(members), 0.0, 0.0, False)
            continue
        white = robustly_whitened(principal(rows, components))
        found = KMeans(2, n_init=10, random_state=seed).fit(white)
        clear = float(silhouette_score(white, found.labels_, sample_size=min(2000, len(white)), random_state=seed))
        smaller = int(np.bincount(found.labels_, minlength=2).argmin())
        inside = found.labels_ == smaller
        distance = found.transform(white)
        scores[members] = distance[:, 1 - smaller] - distance[:, smaller]
        inside, gap = sharpened(white, inside)
        share = float(inside.mean())
        suspicious = share <= largest_share and clear >= silhouette and gap >= separation
        classes[int(label)] = ClassFinding(len(members), share, clear, suspicious)
        if suspicious:
            flagged[members[inside]] = True
    return Detection(flagged, scores, classes)
