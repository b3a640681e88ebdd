"""The sampled softmax loss and its correction.

A draw j stands for 1 / (m q_j) classes, m draws in all: log(m q_j) is taken off its logit (Bengio, Senécal 2008). A
class drawn twice counts twice, which keeps the sum's expectation. Draws that are positives are masked.
"""

from __future__ import annotations

import math

import keras
from keras import ops

from tfkit.internal import checks

PREDICTIONS = ("signed", "absolute")


def sampled_softmax_loss(positive, negative, log_probability, hits=None, prediction: str = "signed"):  # type: ignore[no-untyped-def]
    """Returns the loss -log p(positive) of each example.

    Args:
        positive: (batch,) or (batch, positives): logits; for several, the mean of their losses, each against the
            negatives alone; NaN-free padding is masked by who calls.
        negative: (batch, samples): logits of the draws.
        log_probability: (batch, samples): of one draw.
        hits: bool, (batch, samples): draws to leave out; None: none.
        prediction: "signed": p ∝ exp(o); "absolute": p ∝ exp|o|, which the quadratic kernel fits better.

    Returns:
        (batch,), or (batch, positives).
    """
    if checks.choice("prediction", prediction, PREDICTIONS) == "absolute":
        positive, negative = ops.abs(positive), ops.abs(negative)
    corrected = negative - log_probability - math.log(negative.shape[-1])
    if hits is not None:
        corrected = ops.where(hits, ops.full_like(corrected, -1e9), corrected)
    rest = ops.logsumexp(corrected, axis=-1)
    if len(positive.shape) == 2:
        rest = rest[:, None]
    return ops.softplus(rest - positive)


def in_batch_softmax(queries, items, log_frequency=None, ids=None):  # type: ignore[no-untyped-def]
    """Returns the loss of each query against the items of the batch, (batch,).

    Args:
        queries, items: (batch, dimension); row i belongs to row i.
        log_frequency: (batch,): logarithm of how often each item comes up in a batch, which is taken off (logQ); None:
            no correction, so that popular items are pushed down.
        ids: (batch,): numbers of the items, to leave out other rows' copies of the positive; None: keep them.
    """
    logits = ops.matmul(queries, ops.transpose(items))
    if log_frequency is not None:
        logits = logits - log_frequency[None, :]
    size = ops.shape(logits)[0]
    diagonal = ops.cast(ops.eye(size), "bool")
    if ids is not None:
        same = ops.logical_and(ids[:, None] == ids[None, :], ops.logical_not(diagonal))
        logits = ops.where(same, ops.full_like(logits, -1e9), logits)
    return keras.losses.sparse_categorical_crossentropy(ops.arange(size), logits, from_logits=True)
