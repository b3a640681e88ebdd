"""Next-item recommendation: SASRec, gSASRec, GRU4Rec and BERT4Rec as Keras networks with one head.

Paper: Kang, McAuley. Self-attentive sequential recommendation. ICDM 2018, https://arxiv.org/abs/1808.09781 (SASRec);
Petrov, Macdonald. gSASRec: reducing overconfidence in sequential recommendation trained with negative sampling. RecSys
2023, https://arxiv.org/abs/2308.07192 (gBCE); Hidasi, Karatzoglou, Baltrunas, Tikk. Session-based recommendations with
recurrent neural networks. ICLR 2016, https://arxiv.org/abs/1511.06939 (GRU4Rec; its later losses are of
https://arxiv.org/abs/1706.03847); Sun et al. BERT4Rec. CIKM 2019,
https://arxiv.org/abs/1904.06690.

Differs: items' input embeddings are also the output's in every network; negatives of a position are uniform over all
items but the target, drawn for every sequence and shared by its positions for sampled softmax and gBCE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import scipy.sparse as sp
from keras import ops

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender, RecommenderFileError
from tfkit.recommenders.interactions import Interactions
from tfkit.recommenders.sequence_losses import LOSSES, position_loss

CELLS = ("gru", "lstm")


class SequenceNetwork(keras.Model):
    """Hidden states of the positions of a sequence, with a loss over items, for `fit(tokens, targets)`.

    Tokens are items plus 1, padded by 0 in front; `items + 1` is the mask of a masked model. Targets are tokens too,
    with 0 where there is nothing to predict.
    """

    def __init__(
        self,
        encoder: keras.Model,
        items: int,
        loss_name: str,
        negatives: int,
        calibration: float,
        seed: int,
        score_penalty: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.items, self.loss_name, self.negatives = encoder, items, loss_name, negatives
        self.calibration, self.score_penalty = calibration, score_penalty
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, tokens: Any, training: bool | None = None) -> Any:
        return self.encoder(tokens, training=training)

    @property
    def table(self) -> Any:
        """Returns the embeddings of all tokens, (items + 2, dimension)."""
        return self.encoder.get_layer("items").embeddings

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        targets = ops.cast(y, "int32")
        valid = ops.cast(targets > 0, "float32")
        known = ops.maximum(targets, 1)
        if self.loss_name == "softmax":
            logits = ops.matmul(y_pred, ops.transpose(self.table[1 : self.items + 1]))
            losses = keras.losses.sparse_categorical_crossentropy(known - 1, logits, from_logits=True)
        else:
            positive = ops.sum(y_pred * ops.take(self.table, known, axis=0), axis=-1)
            shape = ops.shape(targets)
            if self.loss_name == "bce":  # Its own negative for each position.
                drawn = keras.random.randint((*shape, 1), 1, self.items + 1, seed=self.generator)
                negative = ops.sum(y_pred[:, :, None] * ops.take(self.table, drawn, axis=0), axis=-1)
            else:
                drawn = keras.random.randint((shape[0], 1, self.negatives), 1, self.items + 1, seed=self.generator)
                negative = ops.einsum("bld,bnd->bln", y_pred, ops.take(self.table, drawn[:, 0], axis=0))
            negative = ops.where(drawn == known[:, :, None], ops.full_like(negative, -1e9), negative)
            losses = position_loss(positive, negative, self.loss_name, self.items, self.calibration, self.score_penalty)
        return ops.sum(losses * valid) / ops.maximum(ops.sum(valid), 1.0)


class SequentialRecommender(Recommender):
    """What the networks share: sequences, training by `fit`, and the next item by the last hidden state.

    Args:
        dimension: of embeddings and hidden states.
        length: items of a history that are looked at, the last ones.
        blocks: of attention, or recurrent layers.
        heads: of attention.
        dropout: rate.
        loss: of `sequence_losses.position_loss`, or "softmax" over all items.
        negatives: of a sequence; "bce" has one for each position.
        calibration: t of "gbce".
        learning_rate: of Adam.
        batch_size: sequences a step.
        epochs: over all sequences.
        seed: of the weights and the draws.
    """

    masked = False
    score_penalty = 1.0
    _threaded = False

    def __init__(
        self,
        dimension: int = 64,
        length: int = 50,
        blocks: int = 2,
        heads: int = 1,
        dropout: float = 0.2,
        loss: str = "bce",
        negatives: int = 128,
        calibration: float = 0.75,
        learning_rate: float = 1e-3,
        batch_size: int = 128,
        epochs: int = 20,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.length = checks.integer("length", length, 1)
        self.blocks = checks.integer("blocks", blocks, 1)
        self.heads = checks.integer("heads", heads, 1, dimension)
        self.dropout = checks.number("dropout", dropout, 0, 1, open_high=True)
        self.loss = checks.choice("loss", loss, LOSSES)
        self.negatives = checks.integer("negatives", negatives, 1)
        self.calibration = checks.number("calibration", calibration, 0, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.seed = checks.integer("seed", seed, 0)

    def _encode(self, tokens: Any) -> Any:
        """Returns the hidden states, (batch, length, dimension), of symbolic tokens."""
        raise NotImplementedError

    def _embed(self, tokens: Any, positions: bool) -> Any:
        table = keras.layers.Embedding(
            self._item_count + 2, self.dimension, embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="items",
        )  # fmt: skip
        x = table(tokens)
        if positions:
            numbers = ops.cumsum(ops.ones_like(tokens), axis=1) - 1
            x = x * float(self.dimension) ** 0.5 + keras.layers.Embedding(self.length, self.dimension)(numbers)
        return keras.layers.Dropout(self.dropout)(x)

    def _attention(self, x: Any, causal: bool, padding: Any) -> Any:
        for _ in range(self.blocks):
            attended = keras.layers.MultiHeadAttention(
                self.heads, self.dimension // self.heads, dropout=self.dropout
            )(keras.layers.LayerNormalization()(x), x, attention_mask=padding, use_causal_mask=causal)  # fmt: skip
            x = keras.layers.LayerNormalization()(x + attended)
            inner = keras.layers.Dense(self.dimension, activation="relu")(x)
            inner = keras.layers.Dense(self.dimension)(keras.layers.Dropout(self.dropout)(inner))
            x = x + keras.layers.Dropout(self.dropout)(inner)
        return keras.layers.LayerNormalization()(x)

    def make(self, items: int) -> SequenceNetwork:
        """Makes the network, compiled, for so many items."""
        self._item_count = items
        keras.utils.set_random_seed(self.seed)
        tokens = keras.Input((self.length,), dtype="int32", name="tokens")
        encoder = keras.Model(tokens, self._encode(tokens))
        network = SequenceNetwork(
            encoder, items, self.loss, self.negatives, self.calibration, self.seed, self.score_penalty
        )
        network.compile(keras.optimizers.Adam(self.learning_rate, beta_2=0.98))
        network(np.zeros((1, self.length), np.int32))
        return network

    def _fit(self, interactions: Interactions) -> None:
        self.network = self.make(interactions.num_items)
        self._histories = interactions.sequences()
        for epoch in range(self.epochs):
            self.train_epoch(epoch)

    def train_epoch(self, epoch: int) -> float:
        """Trains once over the histories in an order of its own; returns the mean loss."""
        generator = np.random.default_rng([self.seed, epoch])
        chosen = [history for history in self._histories if len(history) > 1]
        tokens = pad(chosen, self.length + 1)
        if self.masked:
            targets = tokens[:, 1:]
            hidden = (generator.random(targets.shape) < 0.2) & (targets > 0)
            hidden[:, -1] |= ~hidden.any(1)
            inputs, targets = np.where(hidden, self._item_count + 1, targets), np.where(hidden, targets, 0)
        else:
            inputs, targets = tokens[:, :-1], tokens[:, 1:] * (tokens[:, :-1] > 0)
        order = generator.permutation(len(inputs))
        done = self.network.fit(
            inputs[order], targets[order], batch_size=self.batch_size, epochs=1, shuffle=False, verbose=0
        )
        return float(done.history["loss"][-1])

    def query_vectors(self, histories: Sequence[Any]) -> np.ndarray:
        """Returns the last hidden states of histories in the order of time, (people, dimension)."""
        if self.masked:
            tokens = np.concatenate(
                [pad(histories, self.length - 1), np.full((len(histories), 1), self._item_count + 1, np.int32)], 1
            )
        else:
            tokens = pad(histories, self.length)
        made = [self._last(tokens[start : start + 256]) for start in range(0, len(tokens), 256)]
        return np.concatenate(made) if made else np.zeros((0, self.dimension), np.float32)

    def _last(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self.network.encoder(tokens, training=False))[:, -1]

    def user_vectors(self, users: np.ndarray) -> np.ndarray:
        return self.query_vectors([self._histories[user] for user in users])

    def item_vectors(self) -> np.ndarray:
        return np.asarray(self.network.table)[1 : self._item_count + 1]

    def recommend(self, users: Any, k: int = 10, **options: Any) -> Any:
        self._ordered = users if isinstance(users, (list, tuple)) and len(users) and np.ndim(users[0]) == 1 else None
        self._row = 0
        return super().recommend(users, k, **options)

    def _history_scores(self, histories: sp.csr_matrix) -> np.ndarray:
        ordered: Any = getattr(self, "_ordered", None)
        if ordered is None:
            raise checks.error("users", "histories as lists, in the order of time", histories)
        part = ordered[self._row : self._row + histories.shape[0]]
        self._row += histories.shape[0]
        return self.query_vectors(part) @ self.item_vectors().T

    def _arrays(self) -> dict[str, np.ndarray]:
        lengths = np.array([len(history) for history in self._histories], np.int64)
        weights = {f"weight{i}": np.asarray(w) for i, w in enumerate(self.network.encoder.get_weights())}
        flat = np.concatenate([*self._histories, np.zeros(0, np.int64)]).astype(np.int64)
        return {"lengths": lengths, "histories": flat, **weights}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        lengths, flat = arrays["lengths"], arrays["histories"]
        valid = lengths.shape == (self.num_users,) and flat.ndim == 1 and (lengths >= 0).all()
        if not valid or lengths.sum() != len(flat) or (len(flat) and (flat.min() < 0 or flat.max() >= self.num_items)):
            raise RecommenderFileError("damaged: its histories are inconsistent")
        self._histories = np.split(flat, np.cumsum(lengths)[:-1])
        self.network = self.make(self.num_items)
        weights = [arrays[f"weight{i}"] for i in range(len(self.network.encoder.weights))]
        if not all(np.isfinite(weight).all() for weight in weights if weight.dtype.kind == "f"):
            raise RecommenderFileError("damaged: its weights are not finite")
        self.network.encoder.set_weights(weights)


class SASRec(SequentialRecommender):
    """Causal self-attention; with `loss="gbce"` it is gSASRec."""

    def _encode(self, tokens: Any) -> Any:
        padding = ops.logical_or(ops.expand_dims(tokens > 0, 1), ops.cast(ops.eye(self.length), "bool")[None])
        return self._attention(self._embed(tokens, positions=True), True, padding)


class BERT4Rec(SequentialRecommender):
    """Attention in both directions; learns items under a mask, and predicts the one after the last."""

    masked = True

    def _encode(self, tokens: Any) -> Any:
        padding = ops.logical_or(ops.expand_dims(tokens > 0, 1), ops.cast(ops.eye(self.length), "bool")[None])
        return self._attention(self._embed(tokens, positions=True), False, padding)


class GRU4Rec(SequentialRecommender):
    """Gated recurrent units, or long short-term memory.

    Args:
        dimension, length, blocks, dropout: see `SequentialRecommender`.
        loss: "bpr_max", "top1_max", "bpr", "top1", or one of the others.
        negatives, learning_rate, batch_size, epochs, seed: see `SequentialRecommender`.
        cell: "gru" or "lstm".
        score_penalty: of the negatives' squared scores in "bpr_max".
    """

    def __init__(
        self,
        dimension: int = 64,
        length: int = 50,
        blocks: int = 1,
        dropout: float = 0.2,
        loss: str = "bpr_max",
        negatives: int = 256,
        learning_rate: float = 1e-3,
        batch_size: int = 128,
        epochs: int = 20,
        cell: str = "gru",
        score_penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dimension, length, blocks, dropout=dropout, loss=loss, negatives=negatives, learning_rate=learning_rate,
            batch_size=batch_size, epochs=epochs, seed=seed,
        )  # fmt: skip
        self.cell = checks.choice("cell", cell, CELLS)
        self.score_penalty = checks.number("score_penalty", score_penalty, 0)

    def _encode(self, tokens: Any) -> Any:
        x = self._embed(tokens, positions=False)
        layer = keras.layers.GRU if self.cell == "gru" else keras.layers.LSTM
        for _ in range(self.blocks):
            x = layer(self.dimension, return_sequences=True)(x)
        return x


def pad(histories: Sequence[Any], length: int) -> np.ndarray:
    """Returns tokens (items plus 1), int32, (people, length): the last items, with zeros in front.

    >>> pad([[4, 5, 6], [7]], 2).tolist()
    [[6, 7], [0, 8]]
    """
    tokens = np.zeros((len(histories), length), np.int32)
    for row, history in enumerate(histories):
        last = np.asarray(history, np.int32)[-length:] if length else np.zeros(0, np.int32)
        if len(last):
            tokens[row, -len(last) :] = last + 1
    return tokens
