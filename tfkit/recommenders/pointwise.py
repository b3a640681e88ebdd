"""Networks that score one pair at a time, trained by cross-entropy against sampled unseen items.

A network has three parts: what it knows of users, what it knows of items, and a top that scores the two together. To
rank, the first two run once for each user and item, and only the top for each pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender, RecommenderFileError
from tfkit.recommenders.bpr import is_seen
from tfkit.recommenders.features import Features
from tfkit.recommenders.interactions import Interactions
from tfkit.recommenders.random_numbers import below
from tfkit.retrieval import kernels

_ATTEMPTS = 50
#: Hours of the day and days of the week, what an event's time gives.
CONTEXT = (24, 7)


class PointwiseRecommender(Recommender):
    """Minimises the cross-entropy of σ(score) over events (1) and, for each, `negatives` unseen items (0).

    A method writes `_sides` and `_top`. Arguments that all of them have:

    Args:
        negatives: for each event, uniform over the items that the user has not seen, drawn anew each epoch.
        penalty: λ of λ |x|² for an example's vectors of user and item.
        learning_rate, batch_size, epochs: of Adam.
        seed: of weights, batches and draws.
    """

    _threaded = False
    _with_time = False
    item_features: Features | None = None
    user_features: Features | None = None

    def _settings(
        self, negatives: int, penalty: float, learning_rate: float, batch_size: int, epochs: int, seed: int
    ) -> None:
        self.negatives = checks.integer("negatives", negatives, 1)
        self.penalty = checks.number("penalty", penalty, 0)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.seed = checks.integer("seed", seed, 0)

    def _sides(self) -> tuple[keras.Model, keras.Model]:
        """Returns networks from (user, hour, weekday) and from the item to vectors, (batch, width)."""
        raise NotImplementedError

    def _top(self, user_width: int, item_width: int) -> keras.Model:
        """Returns a network from both vectors to scores, (batch, 1)."""
        raise NotImplementedError

    def make(self) -> None:
        """Makes the network, compiled."""
        keras.utils.set_random_seed(self.seed)
        self.user_side, self.item_side = self._sides()
        self.top = self._top(self.user_side.output_shape[-1], self.item_side.output_shape[-1])
        asked = [keras.Input((), dtype="int32", name=name) for name in ("user", "hour", "weekday", "item")]
        sides = self.user_side(asked[:3]), self.item_side(asked[3])
        logits = self.top([Penalty(self.penalty)(side) for side in sides] if self.penalty else list(sides))
        self.network = keras.Model(asked, logits)
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        self.network.compile(keras.optimizers.Adam(self.learning_rate), loss, jit_compile=False)
        self._score = tf.function(self._score_user, reduce_retracing=True)

    def _fit(self, interactions: Interactions) -> None:
        self.start(interactions)
        for epoch in range(self.epochs):
            self.train_epoch(epoch)

    def start(self, interactions: Interactions) -> None:
        """Makes the network for these interactions; `train_epoch` then trains it."""
        self.seen = interactions.seen
        if self._with_time and interactions.times is None:
            raise checks.error("interactions", "with times, in seconds since 1970", None, "Pass with_time=False.")
        self._log = interactions
        ends = np.maximum(interactions.offsets[1:] - 1, 0)
        times = np.zeros(len(interactions)) if interactions.times is None else interactions.times
        self._moments = np.where(np.diff(interactions.offsets) > 0, times[ends], times.max())
        self._times = times
        self.make()

    def train_epoch(self, epoch: int) -> float:
        """Trains once over the events with negatives of their own; returns the mean loss."""
        log, seen = self._log, self.seen
        drawn = draw_unseen(
            log.users, seen.indptr, seen.indices, self.negatives, self.num_items,
            np.array([self.seed * 1_000_003 + epoch], np.uint64),
        )  # fmt: skip
        items = np.concatenate([log.items[:, None], drawn], 1).ravel()
        labels = np.tile(np.arange(self.negatives + 1) == 0, len(log))
        kept = np.random.default_rng([self.seed, epoch]).permutation(np.flatnonzero(items >= 0))
        events = kept // (self.negatives + 1)
        given = [log.users[events], *context(self._times[events]), items[kept]]
        done = self.network.fit(
            [part.astype(np.int32) for part in given], labels[kept].astype(np.float32), batch_size=self.batch_size,
            epochs=1, shuffle=False, verbose=0,
        )  # fmt: skip
        return float(done.history["loss"][-1])

    def _score_user(self, user_vector: Any, item_vectors: Any) -> Any:
        return self.top([tf.repeat(user_vector[None], tf.shape(item_vectors)[0], 0), item_vectors], training=False)[
            :, 0
        ]

    def _item_side(self) -> np.ndarray:
        return np.asarray(self.item_side(np.arange(self.num_items, dtype=np.int32), training=False))

    def _user_side(self, users: np.ndarray) -> np.ndarray:
        given = [users, *context(self._moments[users])]
        return np.asarray(self.user_side([np.asarray(part, np.int32) for part in given], training=False))

    def _scores(self, users: np.ndarray) -> np.ndarray:
        items = tf.convert_to_tensor(self._item_side())
        made = np.empty((len(users), self.num_items), np.float32)
        for row, vector in enumerate(self._user_side(users)):
            made[row] = self._score(tf.convert_to_tensor(vector), items)
        return made

    def _arrays(self) -> dict[str, np.ndarray]:
        made: dict[str, np.ndarray] = {f"weight{i}": w for i, w in enumerate(self.network.get_weights())}
        made["moments"] = self._moments
        return made | feature_arrays(self)

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        restore_features(self, arrays)
        self._moments = arrays["moments"]
        if self._moments.shape != (self.num_users,) or not np.isfinite(self._moments).all():
            raise RecommenderFileError("damaged: its users' last moments are of another form")
        self.make()
        weights = [arrays[f"weight{i}"] for i in range(len(self.network.weights))]
        if not all(weight.dtype.kind == "f" and np.isfinite(weight).all() for weight in weights):
            raise RecommenderFileError("damaged: its weights are not finite")
        self.network.set_weights(weights)


class FeatureRecommender(Recommender):
    """A recommender that takes features of items and users beside the events."""

    item_features: Features | None = None
    user_features: Features | None = None

    def fit(
        self, interactions: Interactions, item_features: Features | None = None, user_features: Features | None = None
    ) -> Self:
        """Learns from interactions and features.

        Args:
            interactions: the events.
            item_features, user_features: a row for each item and user, those without events too; None: none.

        Raises:
            ValueError: features have another number of rows than there are items or users.
        """
        for name, given, count in (
            ("item_features", item_features, getattr(interactions, "num_items", None)),
            ("user_features", user_features, getattr(interactions, "num_users", None)),
        ):
            if given is not None and (not isinstance(given, Features) or len(given) != count):
                raise checks.error(name, f"`Features` of {count} rows", given)
        self.item_features, self.user_features = item_features, user_features
        return super().fit(interactions)


class Penalty(keras.layers.Layer):
    """Adds λ times the mean squared length of a batch's vectors to the loss."""

    def __init__(self, penalty: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty

    def call(self, vectors: Any) -> Any:
        self.add_loss(self.penalty * ops.mean(ops.sum(ops.square(vectors), axis=-1)))
        return vectors

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


def context(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hour of the day and the day of the week (0: Monday), in UTC, of seconds since 1970.

    >>> [part.tolist() for part in context(np.array([0.0, 3600.0 * 25]))]
    [[0, 1], [3, 4]]
    """
    hours = np.floor(np.asarray(times, np.float64) / 3600).astype(np.int64)
    return hours % 24, (hours // 24 + 3) % 7


def feature_arrays(model: Any) -> dict[str, np.ndarray]:
    """Returns the features of a model for its file."""
    made: dict[str, np.ndarray] = {}
    for side in ("item", "user"):
        known = getattr(model, f"{side}_features")
        made |= {} if known is None else {f"{side}:{name}": array for name, array in known.arrays().items()}
    return made


def restore_features(model: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Gives a model the features of its file."""
    for side, count in (("item", model.num_items), ("user", model.num_users)):
        own = {name.partition(":")[2]: array for name, array in arrays.items() if name.startswith(f"{side}:")}
        if own:
            known = Features.from_arrays(own)
            if len(known) != count:
                raise RecommenderFileError("damaged: its features have another number of rows")
            setattr(model, f"{side}_features", known)


@kernels.kernel
def draw_unseen(users, indptr, indices, count, items, state):  # type: ignore[no-untyped-def]
    """Returns unseen items, int64, (events, count), uniform; -1 where none turned up in so many draws."""
    drawn = np.full((users.shape[0], count), -1, np.int64)
    for event in range(users.shape[0]):
        low, high = indptr[users[event]], indptr[users[event] + 1]
        for place in range(count):
            for _ in range(_ATTEMPTS):
                item = below(state, items)
                if not is_seen(indices, low, high, item):
                    drawn[event, place] = item
                    break
    return drawn
