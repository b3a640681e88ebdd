"""Label flipping: some training labels are changed, at random or where the loss on other examples rises most.

Paper: Biggio, Nelson, Laskov. Support vector machines under adversarial label noise. ACML 2011,
https://proceedings.mlr.press/v20/biggio11.html (random and adversarial flips). Koh, Liang. Understanding black-box
predictions via influence functions. ICML 2017, https://arxiv.org/abs/1703.04730 (the estimate: equation 5, for a
changed example in place of a moved one).

Differs: the influence is that on a softmax regression over the features of a trained network, which is convex. There
the estimate needs no approximation of the Hessian: the system is solved to the tolerance of conjugate gradients. All
flips are chosen at once, by the sum of their single influences.
"""

from __future__ import annotations

import keras
import numpy as np

from tfkit.data import Dataset
from tfkit.internal import checks
from tfkit.robustness.poisoning import record, softmax_head
from tfkit.robustness.poisoning.features import features
from tfkit.robustness.poisoning.record import PoisonRecord


def flip_labels(
    dataset: Dataset, rate: float, *, source: int | None = None, target: int | None = None, seed: int = 0
) -> tuple[Dataset, PoisonRecord]:
    """Changes labels at random, each to another class than it was.

    Args:
        dataset: left as it is.
        rate: share of all training labels that is changed.
        source: change only labels of this class; None: any.
        target: to this class; None: to a random other one.
        seed: of the choices.

    Returns:
        The poisoned data set, and what was changed.

    Raises:
        ValueError: an argument breaks its rule, or there are too few examples to choose from.
    """
    labels = dataset.y_train
    if dataset.num_classes < 2:
        raise checks.error("dataset", "of at least two classes", dataset.num_classes)
    allowed = np.ones(len(labels), bool)
    if source is not None:
        allowed &= labels == record.checked_class("source", source, dataset)
    if target is not None:
        allowed &= labels != record.checked_class("target", target, dataset)
    candidates = np.flatnonzero(allowed)
    rng = np.random.default_rng(seed)
    indices = rng.choice(candidates, record.count_of(rate, dataset, candidates), replace=False)
    if target is not None:
        new = np.full(len(indices), target, np.int64)
    else:
        new = (labels[indices] + rng.integers(1, dataset.num_classes, len(indices))) % dataset.num_classes
    settings = {"source": source, "target": target}
    return record.poisoned(dataset, indices, method="flip_labels", seed=seed, labels=new, settings=settings)


def flip_influences(
    inputs: np.ndarray, labels: np.ndarray, reference: np.ndarray, reference_labels: np.ndarray, decay: float = 1e-3
) -> np.ndarray:
    """Estimates what each changed label does to the loss of a softmax regression on other examples.

    With theta minimising L = mean loss + decay |theta|^2 / 2 over n examples, H its Hessian and v the gradient of the
    mean loss on the reference, putting class k in place of y_i changes that loss by -(1/n) v' H^-1 (g(x_i, k) - g(x_i,
    y_i)), where the difference of the gradients is (e_y - e_k) for the logits.

    Args:
        inputs: (examples, features).
        labels: (examples,).
        reference: (others, features), examples whose loss shall rise.
        reference_labels: (others,).
        decay: of the regression's squared weights.

    Returns:
        float64, (examples, classes): change of the mean loss on the reference; 0 for the class an example has.
    """
    classes = int(max(labels.max(), reference_labels.max())) + 1
    weights = softmax_head.fit(inputs, labels, classes, decay)
    extended = softmax_head.with_one(inputs)
    gradient = softmax_head.gradient(weights, reference, reference_labels)
    solved = softmax_head.solve_hessian(weights, inputs, gradient, decay)
    alike = extended @ solved  # (examples, classes)
    return (alike - np.take_along_axis(alike, labels[:, None], axis=1)) / len(labels)


def flip_labels_by_influence(
    dataset: Dataset, rate: float, model: keras.Model, *, layer: str | None = None, decay: float = 1e-3, seed: int = 0
) -> tuple[Dataset, PoisonRecord]:
    """Changes the labels that raise the loss on the validation examples most, as `flip_influences` estimates it.

    Args:
        dataset: with validation examples; left as it is.
        rate: share of all training labels that is changed.
        model: a trained network whose features are used.
        layer: whose output they are; None: what the last layer with weights receives.
        decay: of the regression's squared weights.
        seed: for the record; nothing is random.

    Returns:
        The poisoned data set, and what was changed; the sum of the estimates is in `settings`.
    """
    if not len(dataset.y_validation):
        raise checks.error("dataset", "one with validation examples", dataset, "Load it with `validation=0.1`.")
    checks.number("decay", decay, 1e-12)
    count = record.count_of(rate, dataset, dataset.y_train)
    of_training = features(model, dataset.x_train, layer)
    scale = np.sqrt(np.mean(of_training**2)) or 1.0
    of_validation = features(model, dataset.x_validation, layer)
    influence = flip_influences(
        of_training / scale, dataset.y_train, of_validation / scale, dataset.y_validation, decay
    )
    best = influence.argmax(axis=1)
    value = influence.max(axis=1)
    indices = np.argsort(-value, kind="stable")[:count]
    settings = {"layer": layer, "decay": decay, "estimated_rise_of_the_loss": float(value[indices].sum())}
    return record.poisoned(
        dataset, indices, method="flip_labels_by_influence", seed=seed, labels=best[indices], settings=settings
    )
