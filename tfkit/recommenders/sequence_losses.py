"""Losses over the items of a position: what SASRec, gSASRec and GRU4Rec learn by.

gBCE is of Petrov and Macdonald (https://arxiv.org/abs/2308.07192); TOP1, BPR and their maxima are of Hidasi and
Karatzoglou (Recurrent neural networks with top-k gains for session-based recommendations. CIKM 2018,
https://arxiv.org/abs/1706.03847).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tfkit.internal import checks

#: Against sampled negatives.
SAMPLED = ("bce", "gbce", "sampled_softmax", "bpr", "top1", "bpr_max", "top1_max")
LOSSES = (*SAMPLED, "softmax")


def position_loss(
    positive: Any, negative: Any, name: str, items: int, calibration: float = 0.75, score_penalty: float = 1.0
) -> Any:
    """Returns the loss of each position.

    bce: -log σ(s⁺) - Σ log(1 - σ(s⁻)). gbce: the first term times β = α (t (1 - 1/α) + 1/α), α = m / (items - 1) the
    share of the negatives that is drawn, so that t = 1 calibrates as all negatives would and t = 0 is bce.
    sampled_softmax: the log sum of the positive and of the negatives, each less log(m q), q = 1 / (items - 1).
    bpr: the mean of -log σ(s⁺ - s⁻). top1: the mean of σ(s⁻ - s⁺) + σ(s⁻²). With p the softmax over the negatives,
    bpr_max: -log Σ p σ(s⁺ - s⁻) + λ Σ p s⁻², and top1_max: Σ p (σ(s⁻ - s⁺) + σ(s⁻²)).

    Args:
        positive: (...,): scores of the targets.
        negative: (..., m): of the negatives; one of -1e9 is none.
        name: one of `SAMPLED`.
        items: how many there are.
        calibration: t in [0, 1].
        score_penalty: λ of "bpr_max".

    Returns:
        (...,).
    """
    checks.choice("name", name, SAMPLED)
    count = negative.shape[-1]
    if name in ("bpr", "top1", "bpr_max", "top1_max"):
        return _ranking_loss(positive, negative, name, score_penalty)
    if name == "sampled_softmax":
        correction = float(np.log(count / (items - 1)))
        return ops.softplus(ops.logsumexp(negative - correction, axis=-1) - positive)
    share = count / (items - 1)
    power = 1.0 if name == "bce" else share * (calibration * (1 - 1 / share) + 1 / share)
    return power * ops.softplus(-positive) + ops.sum(ops.softplus(negative), axis=-1)


def _ranking_loss(positive: Any, negative: Any, name: str, score_penalty: float) -> Any:
    there = ops.cast(negative > -1e8, negative.dtype)
    shares = ops.softmax(negative, axis=-1) * there
    negative = negative * there
    ahead = positive[..., None] - negative
    number = ops.maximum(ops.sum(there, axis=-1), 1.0)
    if name == "bpr":
        return ops.sum(there * ops.softplus(-ahead), axis=-1) / number
    if name == "bpr_max":
        # The logarithm of the sum as one of exponentials, so that it holds where all of them vanish.
        tiny = 1e-24
        logarithm = ops.logsumexp(ops.log(shares + tiny) - ops.softplus(-ahead), axis=-1)
        losses = score_penalty * ops.sum(shares * ops.square(negative), axis=-1) - logarithm
        return losses * ops.max(there, axis=-1)
    losses = ops.sigmoid(-ahead) + ops.sigmoid(ops.square(negative))
    return ops.sum((shares if name == "top1_max" else there / number[..., None]) * losses, axis=-1)
