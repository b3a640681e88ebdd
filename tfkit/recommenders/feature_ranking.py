"""What rankers over features share: fields of users and items and the time of an event, each a vector."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfkit.internal import checks
from tfkit.recommenders.features import Features, FieldEmbedding, NumberRows, known_numbers
from tfkit.recommenders.pointwise import CONTEXT, FeatureRecommender, PointwiseRecommender


class FeatureRanker(FeatureRecommender, PointwiseRecommender):
    """Scores a user's fields, an item's fields and the time of the event together.

    The numbers of users and items are fields like others; one without events in training has the vector zero there, and
    is known by its features alone. `at` asks for a time other than the last of each user.
    """

    def _make_sides(self, dimension: int, bottom: list[int], with_time: bool) -> tuple[keras.Model, keras.Model]:
        user, hour, weekday, item = (
            keras.Input((), dtype="int32", name=name) for name in ("user", "hour", "weekday", "item")
        )
        users = _vectors(user, self.user_features, np.diff(self.seen.indptr), dimension, bottom)
        if with_time:
            users[:0] = [keras.layers.Embedding(n, dimension)(x) for n, x in zip(CONTEXT, (hour, weekday), strict=True)]
        items = _vectors(item, self.item_features, np.asarray(self.seen.sum(0)).ravel(), dimension, bottom)
        joined = [parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1) for parts in (users, items)]
        return keras.Model([user, hour, weekday], joined[0]), keras.Model(item, joined[1])

    def at(self, times: Any) -> Any:
        """Returns this model as it recommends at these moments, seconds since 1970: one, or one a user."""
        moments = np.broadcast_to(np.asarray(times, np.float64), (self.num_users,))
        if not np.isfinite(moments).all():
            raise checks.error("times", "finite seconds", times)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._moments = moments
        return other


def keras_rs_layers() -> Any:
    """Returns the layers of Keras RS.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from keras_rs import layers
    except ImportError as error:
        raise ImportError("this model needs keras-rs: pip install 'tfkit-keras[recommend]'") from error
    return layers


def _vectors(number: Any, known: Features | None, counts: np.ndarray, dimension: int, bottom: list[int]) -> list[Any]:
    """Returns the vectors of fields; last the raw numbers, or what the network `bottom` makes of them."""
    fields = {"number": known_numbers(counts)} | ({} if known is None else dict(known.fields))
    made = [FieldEmbedding(matrix, dimension)(number) for matrix in fields.values()]
    if known is not None and known.numbers is not None:
        x = NumberRows(known.numbers)(number)
        if bottom:
            for width in bottom:
                x = keras.layers.Dense(width, activation="relu")(x)
            x = keras.layers.Dense(dimension)(x)
        made.append(x)
    return made
