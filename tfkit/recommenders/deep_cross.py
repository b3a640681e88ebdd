"""DeepCross (DCN-v2): layers that cross features with each other, beside or below a deep network.

Paper: Wang, Shivanna, Cheng, Jain, Lin, Hong, Chi. DCN V2: improved deep & cross network and practical lessons for
web-scale learning to rank systems. WWW 2021, https://arxiv.org/abs/2008.13535

Differs: trained on events and sampled unseen items; one low-rank expert at most. The crosses are Keras RS's.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tfkit.internal import checks
from tfkit.recommenders.feature_ranking import FeatureRanker, keras_rs_layers

STRUCTURES = ("parallel", "stacked")


class DeepCross(FeatureRanker):
    """x_{l+1} = x_0 ∘ (W x_l + b) + x_l over all fields' vectors, with a deep network: `fit(log, item_features)`.

    Args:
        dimension: of each field's vector.
        crosses: layers that cross.
        hidden: widths of the deep network.
        structure: "parallel": both see the fields; "stacked": the deep network sees what was crossed.
        rank: of W = U V; None: full.
        with_time: the hour and the weekday of an event are fields too.
        negatives, penalty, learning_rate, batch_size, epochs, seed: see `PointwiseRecommender`.
    """

    def __init__(
        self,
        dimension: int = 16,
        crosses: int = 2,
        hidden: Any = (64, 32),
        structure: str = "parallel",
        rank: int | None = None,
        with_time: bool = False,
        negatives: int = 4,
        penalty: float = 0.0,
        learning_rate: float = 1e-3,
        batch_size: int = 1024,
        epochs: int = 10,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.crosses = checks.integer("crosses", crosses, 1)
        self.hidden = [checks.integer("hidden", width, 1) for width in hidden]
        self.structure = checks.choice("structure", structure, STRUCTURES)
        self.rank = None if rank is None else checks.integer("rank", rank, 1)
        self.with_time = self._with_time = bool(with_time)
        self._settings(negatives, penalty, learning_rate, batch_size, epochs, seed)
        keras_rs_layers()

    def _sides(self) -> tuple[keras.Model, keras.Model]:
        return self._make_sides(self.dimension, [], self.with_time)

    def _top(self, user_width: int, item_width: int) -> keras.Model:
        user, item = keras.Input((user_width,)), keras.Input((item_width,))
        start = crossed = ops.concatenate([user, item], axis=-1)
        for _ in range(self.crosses):
            crossed = keras_rs_layers().FeatureCross(projection_dim=self.rank)(start, crossed)
        deep = crossed if self.structure == "stacked" else start
        for width in self.hidden:
            deep = keras.layers.Dense(width, activation="relu")(deep)
        whole = deep if self.structure == "stacked" else ops.concatenate([crossed, deep], axis=-1)
        return keras.Model([user, item], keras.layers.Dense(1)(whole))
