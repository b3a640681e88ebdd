"""Full-ranking evaluation: every item is ranked, exactly, for every user with held-out items.

Metrics over a few sampled negatives order models otherwise than the full ranking does (Krichene, Rendle. On sampled
metrics for item recommendation. KDD 2020, https://doi.org/10.1145/3394486.3403226); they are here only as
`sampled_metrics`, under names that say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks
from tfkit.recommenders.interactions import Interactions
from tfkit.retrieval import kernels

METRICS = ("precision", "recall", "ndcg", "mrr", "map", "hit_rate")


@dataclass(frozen=True)
class Evaluation:
    """What a full ranking gave.

    Attributes:
        metrics: by name, such as "ndcg@10": the mean over users; and of the whole "coverage@k" (share of the items
            recommended to anyone), "novelty@k" (mean of -log2 of an item's share of the training events, in bits)
            and "popularity@k" (mean training events of a recommended item over the mean of an item).
        per_user: by name: float64, (users,), of the metrics that users have.
        users: int64, (users,): those with held-out items; the others take no part.
        skipped: users without held-out items.
    """

    metrics: dict[str, float]
    per_user: dict[str, np.ndarray]
    users: np.ndarray
    skipped: int

    def interval(self, name: str, level: float = 0.95, *, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Returns the bootstrap percentile interval of a mean over users; see `bootstrap_interval`."""
        checks.choice("name", name, tuple(self.per_user))
        return bootstrap_interval(self.per_user[name], level, samples=samples, seed=seed)


def evaluate(
    model: Any,
    training: Interactions,
    held_out: Interactions,
    k: int | Sequence[int] = 10,
    *,
    exclude_seen: bool = True,
    users: Any = None,
    candidates: Any = None,
) -> Evaluation:
    """Ranks all items for the users that have held-out items.

    Args:
        model: with `recommend(users, k, exclude_seen=)`.
        training: what the model was fitted to; its events are not recommended if `exclude_seen`.
        held_out: what it should find.
        k: lengths of the list.
        exclude_seen: leave the training items of a user out of his list.
        users: numbers of users to judge; None: all with held-out items.
        candidates: numbers of the items that are ranked, such as the cold ones; None: all, and nothing else is
            comparable with other full rankings.

    Raises:
        ValueError: the parts number their items differently, or nobody has held-out items.
    """
    lengths = [checks.integer("k", length, 1) for length in ([k] if np.ndim(k) == 0 else list(k))]  # type: ignore
    if training.num_items != held_out.num_items or training.num_users != held_out.num_users:
        raise checks.error("held_out", "a part of the same interactions as `training`", held_out.num_items)
    there = np.flatnonzero(np.diff(held_out.offsets))
    wanted = there if users is None else np.intersect1d(np.asarray(users), there)
    if not len(wanted):
        raise checks.error("held_out", "such that a user has events", len(held_out))
    most = min(max(lengths), training.num_items)
    options = {} if candidates is None else {"candidates": candidates}
    ids = np.ascontiguousarray(model.recommend(wanted, most, exclude_seen=exclude_seen, **options).ids)
    truth = held_out.seen[wanted]
    found: dict[str, float] = {}
    per_user: dict[str, np.ndarray] = {}
    for length in lengths:
        table = ranking_metrics(ids, truth, length)
        for name, values in table.items():
            per_user[f"{name}@{length}"] = values
            found[f"{name}@{length}"] = float(values.mean())
        for name, value in list_metrics(ids[:, :length], training.item_counts).items():
            found[f"{name}@{length}"] = value
    return Evaluation(found, per_user, wanted, held_out.num_users - len(wanted))


def ranking_metrics(ids: np.ndarray, truth: sp.csr_matrix, k: int) -> dict[str, np.ndarray]:
    """Returns the metrics of each user.

    With hits h_r in {0, 1} at the ranks r = 1 … k, and T relevant items: precision Σh/k; recall Σh/T; NDCG
    Σ h_r/log2(1+r) over the same sum for min(k, T) hits in front; MRR one over the first hit's rank, or 0; MAP
    Σ h_r precision@r / min(k, T); hit rate 1 if there is a hit.

    Args:
        ids: int64, (users, at least 1), the best first; -1 for none.
        truth: (users, items), nonzero where relevant.
        k: length of the list.
    """
    truth = truth.tocsr()
    truth.sort_indices()
    table = _ranking_metrics(ids[:, :k].astype(np.int64), truth.indptr, truth.indices, k)
    return dict(zip(METRICS, table.T, strict=True))


@kernels.kernel
def _ranking_metrics(ids, indptr, indices, k):  # type: ignore[no-untyped-def]
    table = np.zeros((ids.shape[0], 6))
    for user in range(ids.shape[0]):
        low, high = indptr[user], indptr[user + 1]
        relevant = high - low
        if relevant == 0:
            continue
        hits, gain, precisions, first = 0, 0.0, 0.0, 0
        for rank in range(ids.shape[1]):
            item = ids[user, rank]
            place = low + np.searchsorted(indices[low:high], item)
            if place < high and indices[place] == item:
                hits += 1
                gain += 1.0 / np.log2(rank + 2.0)
                precisions += hits / (rank + 1.0)
                if first == 0:
                    first = rank + 1
        best = min(k, relevant)
        ideal = 0.0
        for rank in range(best):
            ideal += 1.0 / np.log2(rank + 2.0)
        table[user, 0] = hits / k
        table[user, 1] = hits / relevant
        table[user, 2] = gain / ideal
        table[user, 3] = 1.0 / first if first else 0.0
        table[user, 4] = precisions / best
        table[user, 5] = 1.0 if hits else 0.0
    return table


def list_metrics(ids: np.ndarray, item_counts: np.ndarray) -> dict[str, float]:
    """Returns coverage, novelty and popularity of recommended lists; see `Evaluation`."""
    shown = ids[ids >= 0]
    if not len(shown):
        return {"coverage": 0.0, "novelty": 0.0, "popularity": 0.0}
    # One event is added to each, so that an item without any has a finite novelty.
    share = (item_counts + 1.0) / (item_counts.sum() + len(item_counts))
    return {
        "coverage": len(np.unique(shown)) / len(item_counts),
        "novelty": float(-np.log2(share[shown]).mean()),
        "popularity": float(item_counts[shown].mean() / max(item_counts.mean(), 1e-12)),
    }


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, *, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile interval of the mean, by drawing users with replacement.

    Args:
        values: (users,): a metric of each.
        level: of confidence, in (0, 1).
        samples: draws of all users.
        seed: of the draws.
    """
    values = np.asarray(values, np.float64)
    level = checks.number("level", level, 0, 1, open_high=True)
    generator = np.random.default_rng(seed)
    count = checks.integer("samples", samples, 1)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(count)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rating_metrics(predicted: Any, ratings: Any) -> dict[str, float]:
    """Returns RMSE and MAE of predicted ratings.

    >>> rating_metrics([3.0, 4.0], [3.0, 2.0])
    {'rmse': 1.414..., 'mae': 1.0}
    """
    difference = np.asarray(predicted, np.float64) - np.asarray(ratings, np.float64)
    return {"rmse": float(np.sqrt(np.mean(difference**2))), "mae": float(np.mean(np.abs(difference)))}


def sampled_metrics(
    model: Any, training: Interactions, held_out: Interactions, k: int = 10, *, negatives: int = 100, seed: int = 0
) -> dict[str, float]:
    """Returns NDCG and hit rate of each held-out item among sampled negatives.

    Never compare them with a full ranking.

    Args:
        model: with `scores(users)`.
        training, held_out: parts of the same interactions; negatives are in neither.
        k: length of the list.
        negatives: drawn uniformly, with replacement, for each held-out event.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    known = training.seen + held_out.seen
    hits, gains, events = 0, 0.0, 0
    for user in np.flatnonzero(np.diff(held_out.offsets)):
        free = np.setdiff1d(np.arange(training.num_items), known[user].indices)
        if not len(free):
            continue
        scores = np.asarray(model.scores(np.array([user])))[0]
        for item in held_out.items_of(int(user)):
            rank = int((scores[generator.choice(free, negatives)] >= scores[item]).sum())
            hits += rank < k
            gains += 1 / np.log2(rank + 2) if rank < k else 0.0
            events += 1
    name = f"sampled{negatives}"
    return {f"{name}_ndcg@{k}": gains / max(events, 1), f"{name}_hit_rate@{k}": hits / max(events, 1)}
