"""DLRM: inner products of all pairs of fields' vectors, under a network.

Paper: Naumov et al. Deep learning recommendation model for personalization and recommendation systems. 2019,
https://arxiv.org/abs/1906.00091

Differs: trained on events and sampled unseen items; users' and items' numbers each have a bottom network of their own.
The products are Keras RS's.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfkit.internal import checks
from tfkit.recommenders.feature_ranking import FeatureRanker, keras_rs_layers


class DLRM(FeatureRanker):
    """A network over the fields' pairwise products and the bottom networks' outputs: `fit(log, item_features)`.

    Args:
        dimension: of each field's vector.
        bottom: widths of the networks over numbers, before the last of width `dimension`.
        hidden: widths of the network on top.
        with_time: the hour and the weekday of an event are fields too.
        negatives, penalty, learning_rate, batch_size, epochs, seed: see `PointwiseRecommender`.
    """

    def __init__(
        self,
        dimension: int = 16,
        bottom: Any = (32,),
        hidden: Any = (64, 32),
        with_time: bool = False,
        negatives: int = 4,
        penalty: float = 0.0,
        learning_rate: float = 1e-3,
        batch_size: int = 1024,
        epochs: int = 10,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.bottom = [checks.integer("bottom", width, 1) for width in bottom]
        if not self.bottom:
            raise checks.error("bottom", "at least one width", bottom)
        self.hidden = [checks.integer("hidden", width, 1) for width in hidden]
        self.with_time = self._with_time = bool(with_time)
        self._settings(negatives, penalty, learning_rate, batch_size, epochs, seed)
        keras_rs_layers()

    def _sides(self) -> tuple[keras.Model, keras.Model]:
        return self._make_sides(self.dimension, self.bottom, self.with_time)

    def _top(self, user_width: int, item_width: int) -> keras.Model:
        user, item = keras.Input((user_width,)), keras.Input((item_width,))
        size = self.dimension
        vectors = [side[:, at : at + size] for side in (user, item) for at in range(0, side.shape[-1], size)]
        dense = [
            side[:, -size:]
            for side, known in ((user, self.user_features), (item, self.item_features))
            if known is not None and known.numbers is not None
        ]
        x = ops.concatenate([keras_rs_layers().DotInteraction()(vectors), *dense], axis=-1)
        for width in self.hidden:
            x = keras.layers.Dense(width, activation="relu")(x)
        return keras.Model([user, item], keras.layers.Dense(1)(x))
