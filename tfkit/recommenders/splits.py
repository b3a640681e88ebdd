"""Splits: parts of interactions to learn from, to choose by, and to judge by.

Each takes events out of the whole and gives (training, held out); split the training part again for validation. All
parts share the numbers of users and items.
"""

from __future__ import annotations

import numpy as np

from tfkit.internal import checks
from tfkit.recommenders.interactions import Interactions


def random_split(
    interactions: Interactions, fraction: float = 0.25, *, seed: int = 0
) -> tuple[Interactions, Interactions]:
    """Holds out a random fraction of the events.

    Args:
        interactions: the whole.
        fraction: held out, in (0, 1); rounded down to whole events.
        seed: chooses them.

    Returns:
        Training and held-out events.
    """
    fraction = checks.number("fraction", fraction, 0, 1)
    chosen = np.zeros(len(interactions), bool)
    order = np.random.default_rng(seed).permutation(len(interactions))
    chosen[order[: int(fraction * len(interactions))]] = True
    return _parts(interactions, chosen)


def k_fold(interactions: Interactions, folds: int = 5, *, seed: int = 0) -> list[tuple[Interactions, Interactions]]:
    """Returns (training, held-out) events of each fold; every event is held out once."""
    folds = checks.integer("folds", folds, 2, len(interactions))
    fold = np.random.default_rng(seed).permutation(len(interactions)) % folds
    return [_parts(interactions, fold == number) for number in range(folds)]


def leave_one_out(interactions: Interactions, last: int = 1) -> tuple[Interactions, Interactions]:
    """Holds out the last events of each user; a user with no more events than that keeps all.

    Args:
        interactions: the whole.
        last: how many events to hold out.
    """
    last = checks.integer("last", last, 1)
    position = np.arange(len(interactions)) - interactions.offsets[interactions.users]
    length = np.diff(interactions.offsets)[interactions.users]
    return _parts(interactions, (length > last) & (position >= length - last))


def temporal_split(
    interactions: Interactions, fraction: float = 0.2, *, per_user: bool = False
) -> tuple[Interactions, Interactions]:
    """Holds out the latest fraction of the events: nothing that is learned from is later than what is judged by.

    Args:
        interactions: the whole.
        fraction: held out, in (0, 1).
        per_user: each user's latest events; else all events from one moment on, and those of that very moment.

    Raises:
        ValueError: one moment for all is asked for, and there are no times.
    """
    fraction = checks.number("fraction", fraction, 0, 1)
    if per_user:
        position = np.arange(len(interactions)) - interactions.offsets[interactions.users]
        length = np.diff(interactions.offsets)[interactions.users]
        return _parts(interactions, position >= length - np.floor(fraction * length))
    if interactions.times is None:
        raise checks.error("interactions", "with times", None, "Pass per_user=True to go by the order of events.")
    moment = np.quantile(interactions.times, 1 - fraction, method="higher")
    return _parts(interactions, interactions.times >= moment)


def cold_start_split(
    interactions: Interactions, fraction: float = 0.1, *, of: str = "items", seed: int = 0
) -> tuple[Interactions, Interactions]:
    """Holds out all events of some items (or users): training never sees them.

    Args:
        interactions: the whole.
        fraction: of the items (or users), in (0, 1).
        of: "items" or "users".
        seed: chooses them.
    """
    checks.choice("of", of, ("items", "users"))
    fraction = checks.number("fraction", fraction, 0, 1)
    count = interactions.num_items if of == "items" else interactions.num_users
    cold = np.zeros(count, bool)
    cold[np.random.default_rng(seed).permutation(count)[: int(fraction * count)]] = True
    return _parts(interactions, cold[interactions.items if of == "items" else interactions.users])


def _parts(interactions: Interactions, held: np.ndarray) -> tuple[Interactions, Interactions]:
    if held.all() or not held.any():
        rule = "such that both parts hold events"
        raise checks.error("fraction", rule, f"{int(held.sum())} of {len(held)} events held out")
    return interactions.select(~held), interactions.select(held)
