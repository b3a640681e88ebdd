"""NeuMF: a product of factors and a network over factors, fused; beside it the plain inner product.

Paper: He, Liao, Zhang, Nie, Hu, Chua. Neural collaborative filtering. WWW 2017, https://arxiv.org/abs/1708.05031;
Rendle, Krichene, Zhang, Anderson. Neural collaborative filtering vs. matrix factorization revisited. RecSys 2020,
https://arxiv.org/abs/2005.09683 (an inner product, trained as well, is the better similarity).

Differs: the fused model is trained from the start, without the parts' training before; a penalty on an example's
vectors in place of one on all weights.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender
from tfkit.recommenders.pointwise import PointwiseRecommender

SIMILARITIES = ("neumf", "gmf", "mlp", "dot")


class NeuMF(PointwiseRecommender):
    """Scores hᵀ[p_u ∘ q_i ; MLP(p'_u ; q'_i)], the generalised product beside the network.

    Args:
        dimension: of the product's factors.
        hidden: widths of the network; its factors have half the first width each.
        similarity: "neumf"; "gmf", its product alone; "mlp", its network alone; "dot": <p_u, q_i> + b_u + b_i.
        negatives, penalty, learning_rate, batch_size, epochs, seed: see `PointwiseRecommender`.
    """

    def __init__(
        self,
        dimension: int = 32,
        hidden: Any = (64, 32, 16),
        similarity: str = "neumf",
        negatives: int = 4,
        penalty: float = 0.0,
        learning_rate: float = 1e-3,
        batch_size: int = 1024,
        epochs: int = 20,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.hidden = [checks.integer("hidden", width, 2) for width in hidden]
        self.similarity = checks.choice("similarity", similarity, SIMILARITIES)
        if not self.hidden and similarity in ("neumf", "mlp"):
            raise checks.error("hidden", f"at least one width for similarity={similarity!r}", hidden)
        self._settings(negatives, penalty, learning_rate, batch_size, epochs, seed)

    def _parts(self) -> tuple[int, int]:
        """Returns the widths of the product's and of the network's factors."""
        if self.similarity == "dot":
            return self.dimension + 1, 0
        product = self.dimension if self.similarity != "mlp" else 0
        return product, self.hidden[0] // 2 if self.similarity != "gmf" else 0

    def _sides(self) -> tuple[keras.Model, keras.Model]:
        width = sum(self._parts())
        names = [keras.Input((), dtype="int32", name=name) for name in ("user", "hour", "weekday")]
        item = keras.Input((), dtype="int32", name="item")
        users, items = (
            keras.layers.Embedding(count, width, embeddings_initializer=keras.initializers.RandomNormal(stddev=0.05))(x)
            for count, x in ((self.num_users, names[0]), (self.num_items, item))
        )
        return keras.Model(names, users), keras.Model(item, items)

    def _top(self, user_width: int, item_width: int) -> keras.Model:
        user, item = keras.Input((user_width,)), keras.Input((item_width,))
        product, network = self._parts()
        if self.similarity == "dot":
            both = ops.sum(user[:, :-1] * item[:, :-1], axis=-1, keepdims=True) + user[:, -1:] + item[:, -1:]
            return keras.Model([user, item], both)
        parts = [user[:, :product] * item[:, :product]] if product else []
        if network:
            x = ops.concatenate([user[:, product:], item[:, product:]], axis=-1)
            for width in self.hidden[1:] if len(self.hidden) > 1 else self.hidden:
                x = keras.layers.Dense(width, activation="relu")(x)
            parts.append(x)
        whole = parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1)
        return keras.Model([user, item], keras.layers.Dense(1)(whole))

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return Recommender._scores(self, users) if self.similarity == "dot" else super()._scores(users)

    def user_vectors(self, users: np.ndarray) -> np.ndarray:
        """Returns the vectors of "dot": (p_u, b_u, 1)."""
        if self.similarity != "dot":
            return super().user_vectors(users)
        vectors = self._user_side(users)
        return np.concatenate([vectors, np.ones((len(vectors), 1), np.float32)], 1)

    def item_vectors(self) -> np.ndarray:
        """Returns the vectors of "dot": (q_i, 1, b_i)."""
        if self.similarity != "dot":
            return super().item_vectors()
        vectors = self._item_side()
        return np.concatenate([vectors[:, :-1], np.ones((len(vectors), 1), np.float32), vectors[:, -1:]], 1)
