"""Two towers: users and items each become a vector, of numbers or of features, and a score is their inner product.

Paper: Yi et al. Sampling-bias-corrected neural modeling for large corpus item recommendations. RecSys 2019,
https://doi.org/10.1145/3298689.3346996 (logQ); Yang et al. Mixed negative sampling for learning two-tower neural
networks in recommendations. WWW 2020, https://doi.org/10.1145/3366424.3386195; Volkovs, Yu, Poutanen. DropoutNet:
addressing cold start in recommender systems. NeurIPS 2017,
https://papers.nips.cc/paper/2017/hash/dbd22ba3bd0df8f385bdac3e9f8be207-Abstract.html (`number_dropout`).

Differs: an item's frequency is known from the training events, and not estimated as they stream by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from tfkit.internal import checks
from tfkit.recommenders.base import RecommenderFileError
from tfkit.recommenders.features import Features, FieldEmbedding, NumberRows, known_numbers
from tfkit.recommenders.interactions import Interactions
from tfkit.recommenders.pointwise import FeatureRecommender, feature_arrays, restore_features


class TwoTowerNetwork(keras.Model):
    """Two Keras models to vectors, trained by `fit((users, items))` on the softmax of a batch."""

    def __init__(
        self, user_tower: keras.Model, item_tower: keras.Model, shares: np.ndarray, mixed: int, hard: int, seed: int
    ):
        super().__init__()
        self.user_tower, self.item_tower = user_tower, item_tower
        self.log_shares = ops.convert_to_tensor(np.log(shares), "float32")
        self.mixed, self.hard = mixed, hard
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        users, items = inputs
        return self.user_tower(users, training=training), self.item_tower(items, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        (_, items), (queries, vectors) = x, y_pred
        items = ops.cast(items, "int32")
        size = ops.shape(items)[0]
        shares = ops.take(self.log_shares, items)
        if self.mixed:  # Of a batch and m uniform items, item i is a negative B q_i + m / n times.
            total = ops.shape(self.log_shares)[0]
            drawn = keras.random.randint((self.mixed,), 0, total, seed=self.generator)
            vectors = ops.concatenate([vectors, self.item_tower(drawn, training=True)])
            items = ops.concatenate([items, drawn])
            uniform = self.mixed / ops.cast(total, "float32")
            shares = ops.log(ops.cast(size, "float32") * ops.exp(ops.take(self.log_shares, items)) + uniform)
        logits = ops.matmul(queries, ops.transpose(vectors)) - shares[None]
        own = ops.arange(size)
        same = items[None, :] == items[:size, None]
        diagonal = ops.arange(ops.shape(items)[0])[None] == own[:, None]
        logits = ops.where(ops.logical_and(same, ops.logical_not(diagonal)), ops.full_like(logits, -1e9), logits)
        if self.hard:  # The positive and the hardest negatives.
            positive = ops.sum(ops.where(diagonal, logits, ops.zeros_like(logits)), axis=1, keepdims=True)
            hardest = ops.top_k(ops.where(diagonal, ops.full_like(logits, -1e9), logits), self.hard)[0]
            logits, own = ops.concatenate([positive, hardest], axis=1), ops.zeros_like(own)
        return ops.mean(keras.losses.sparse_categorical_crossentropy(own, logits, from_logits=True))


class TwoTower(FeatureRecommender):
    """A two-tower model over the numbers of users and items, and over their features: `fit(log, item_features)`.

    With features, a tower sums the vectors of the number and of all fields, or joins them where it has hidden layers. A
    number without events in training is no part of it, so that a new item is found by its features.

    Args:
        dimension: of the vectors.
        hidden: widths of each tower's hidden layers; none: embeddings alone.
        correction: take log q off the scores of a batch (logQ).
        mixed_negatives: uniform items beside the batch's.
        hard_negatives: keep only so many of the highest negatives; 0: all.
        number_dropout: share of examples that lack the number in training, so that the features learn to do without.
        learning_rate, batch_size, epochs: of Adam.
        seed: of weights, batches and draws.
    """

    _threaded = False

    def __init__(
        self,
        dimension: int = 64,
        hidden: Any = (),
        correction: bool = True,
        mixed_negatives: int = 0,
        hard_negatives: int = 0,
        number_dropout: float = 0.0,
        learning_rate: float = 1e-3,
        batch_size: int = 1024,
        epochs: int = 20,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.hidden = [checks.integer("hidden", width, 1) for width in hidden]
        self.correction = bool(correction)
        self.mixed_negatives = checks.integer("mixed_negatives", mixed_negatives, 0)
        self.hard_negatives = checks.integer("hard_negatives", hard_negatives, 0)
        self.number_dropout = checks.number("number_dropout", number_dropout, 0, 1, open_high=True)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.batch_size = checks.integer("batch_size", batch_size, 2)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.seed = checks.integer("seed", seed, 0)

    def _tower(self, counts: np.ndarray, known: Features | None, name: str) -> keras.Model:
        number = keras.Input((), dtype="int32", name=name)
        if known is None:
            start = keras.initializers.GlorotNormal()
            x = keras.layers.Embedding(len(counts), self.dimension, embeddings_initializer=start)(number)
        else:
            own = FieldEmbedding(known_numbers(counts), self.dimension)(number)
            parts = [keras.layers.Dropout(self.number_dropout, noise_shape=(None, 1))(own)]
            parts += [FieldEmbedding(matrix, self.dimension)(number) for matrix in known.fields.values()]
            if known.numbers is not None:
                parts.append(keras.layers.Dense(self.dimension)(NumberRows(known.numbers)(number)))
            x = keras.layers.Concatenate()(parts) if self.hidden else keras.layers.Add()(parts)
        for width in self.hidden:
            x = keras.layers.Dense(width, activation="relu")(x)
        if self.hidden:
            x = keras.layers.Dense(self.dimension)(x)
        return keras.Model(number, x, name=f"{name}_tower")

    def make(self, shares: np.ndarray) -> TwoTowerNetwork:
        """Makes the network, compiled; `shares`: of each item among the events."""
        keras.utils.set_random_seed(self.seed)
        shares = shares if self.correction else np.full(len(shares), 1 / len(shares))
        towers = (
            self._tower(np.diff(self.seen.indptr), self.user_features, "user"),
            self._tower(np.asarray(self.seen.sum(0)).ravel(), self.item_features, "item"),
        )
        network = TwoTowerNetwork(*towers, shares, self.mixed_negatives, self.hard_negatives, self.seed)
        network.compile(keras.optimizers.Adam(self.learning_rate))
        return network

    def _fit(self, interactions: Interactions) -> None:
        counts = interactions.item_counts + 1.0
        self.network = self.make(counts / counts.sum())
        pairs = interactions.users.astype(np.int32), interactions.items.astype(np.int32)
        self.network.fit(pairs, batch_size=self.batch_size, epochs=self.epochs, verbose=0)

    def user_vectors(self, users: np.ndarray) -> np.ndarray:
        return np.asarray(self.network.user_tower(np.asarray(users, np.int32)))

    def item_vectors(self) -> np.ndarray:
        return np.asarray(self.network.item_tower(np.arange(self.num_items, dtype=np.int32)))

    def _arrays(self) -> dict[str, np.ndarray]:
        towers = [*self.network.user_tower.get_weights(), *self.network.item_tower.get_weights()]
        return {f"weight{i}": weight for i, weight in enumerate(towers)} | feature_arrays(self)

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        restore_features(self, arrays)
        self.network = self.make(np.full(self.num_items, 1 / self.num_items))
        first = len(self.network.user_tower.weights)
        weights = [arrays[f"weight{i}"] for i in range(first + len(self.network.item_tower.weights))]
        if not all(weight.dtype.kind == "f" and np.isfinite(weight).all() for weight in weights):
            raise RecommenderFileError("damaged: its weights are not finite")
        self.network.user_tower.set_weights(weights[:first])
        self.network.item_tower.set_weights(weights[first:])
