"""Biased matrix factorisation: ratings by stochastic gradients, by least squares, and with implicit feedback (SVD++).

Paper: Koren, Bell, Volinsky. Matrix factorization techniques for recommender systems. IEEE Computer 42(8), 2009,
https://doi.org/10.1109/MC.2009.263; Koren. Factorization meets the neighborhood. KDD 2008,
https://doi.org/10.1145/1401890.1401944 (SVD++).

Differs: in ALS the bias is one more coordinate, solved with the factors; a rating counts the same in all of them.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender
from tfkit.recommenders.interactions import Interactions
from tfkit.recommenders.least_squares import solve_rows
from tfkit.retrieval import kernels
from tfkit.retrieval.base import thread_count


class RatingModel(Recommender):
    """Predicts r(u, i) = μ + b_u + b_i + <p_u, q_i>; factors hold the biases in their last two columns.

    A user or item without ratings in training has zero factors and bias: it is predicted from what is known.
    """

    _saved = {"user_factors": "users", "item_factors": "items", "mean": "", "bounds": ""}
    dimension: int
    epochs: int
    seed: int
    init_scale = 0.1

    def _fit(self, interactions: Interactions) -> None:
        self.start(interactions)
        for _ in range(self.epochs):
            self.epoch()
        self._finish()

    def start(self, interactions: Interactions) -> None:
        """Draws the factors."""
        if interactions.ratings is None:
            raise checks.error("interactions", "with ratings", None, "Implicit events are for IALS, BPR or EASE.")
        self.seen = interactions.seen
        self._ratings = interactions
        self.mean = np.array([interactions.ratings.mean()], np.float32)
        self.bounds = np.array([interactions.ratings.min(), interactions.ratings.max()], np.float32)
        generator = np.random.default_rng(self.seed)
        scale = self.init_scale / np.sqrt(self.dimension)
        self.user_factors, self.item_factors = (
            np.concatenate([generator.normal(0, scale, (count, self.dimension)), np.zeros((count, 2))], 1).astype(
                np.float32
            )
            for count in self.seen.shape
        )
        # The product of the last two columns is b_u * 1 + 1 * b_i.
        self.user_factors[:, -1], self.item_factors[:, -2] = 1, 1
        self.user_factors[np.diff(interactions.offsets) == 0, :-1] = 0
        empty = interactions.item_counts == 0
        self.item_factors[empty, :-2] = 0
        self.item_factors[empty, -1] = 0
        self._order = generator

    def epoch(self) -> None:
        """Goes over the ratings once."""
        raise NotImplementedError

    def _finish(self) -> None:
        pass

    def user_vectors(self, users: np.ndarray) -> np.ndarray:
        return self.user_factors[users]

    def item_vectors(self) -> np.ndarray:
        return self.item_factors

    def predict_ratings(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Returns the predicted ratings of pairs, float32, (pairs,), cut to the range of those in training."""
        who, _ = self._asked(np.asarray(users))
        made = self.mean[0] + np.einsum("ij,ij->i", self.user_vectors(who), self.item_vectors()[items])  # type: ignore
        return np.clip(made, *self.bounds)


class BiasedMF(RatingModel):
    """Minimises Σ (r - μ - b_u - b_i - <p_u, q_i>)² + λ(b_u² + b_i² + |p_u|² + |q_i|²) for each rating, by SGD.

    Args:
        dimension: of the factors.
        learning_rate: of SGD, at the first epoch; it is multiplied by `decay` after each.
        penalty: λ of factors.
        bias_penalty: λ of biases.
        epochs: over all ratings, in a new order each.
        decay: in (0, 1].
        seed: of the start and the orders.
    """

    def __init__(
        self,
        dimension: int = 100,
        learning_rate: float = 0.01,
        penalty: float = 0.1,
        bias_penalty: float = 0.05,
        epochs: int = 60,
        decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.penalty = checks.number("penalty", penalty, 0)
        self.bias_penalty = checks.number("bias_penalty", bias_penalty, 0)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.decay = checks.number("decay", decay, 1e-6, 1)
        self.seed = checks.integer("seed", seed, 0)

    def start(self, interactions: Interactions) -> None:
        super().start(interactions)
        self._rate = self.learning_rate

    def epoch(self) -> None:
        ratings = self._ratings
        _sgd_epoch(
            self._order.permutation(len(ratings)), ratings.users, ratings.items, ratings.ratings, self.mean[0],
            self.user_factors, self.item_factors, np.float32(self._rate), np.float32(self.penalty),
            np.float32(self.bias_penalty),
        )  # fmt: skip
        self._rate *= self.decay


class RatingALS(RatingModel):
    """The model of `BiasedMF` by alternating least squares, compiled and sparse.

    A user's bias is solved with his factors, an item's with its own. A side's penalty is λ n^ν for n ratings.

    Args:
        dimension: of the factors.
        penalty: λ.
        penalty_exponent: ν; 1 is the penalty for each rating, as in `BiasedMF`.
        epochs: rounds over users and items.
        threads: None: as many as the process may. The result is the same.
        seed: of the start.
    """

    def __init__(
        self,
        dimension: int = 100,
        penalty: float = 0.15,
        penalty_exponent: float = 1.0,
        epochs: int = 10,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.penalty = checks.number("penalty", penalty, 1e-12)
        self.penalty_exponent = checks.number("penalty_exponent", penalty_exponent, 0, 1)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.threads = None if threads is None else checks.integer("threads", threads, 1)
        self.seed = checks.integer("seed", seed, 0)

    def start(self, interactions: Interactions) -> None:
        super().start(interactions)
        triples = (interactions.ratings - self.mean[0], (interactions.users, interactions.items))
        matrix = sp.csr_matrix(triples, self.seen.shape, np.float32)
        self._sides = matrix, matrix.T.tocsr()

    def epoch(self) -> None:
        # Of (p, b_u, 1) and (q, 1, b_i), a half step solves the free coordinates; the fixed 1 takes the other bias off.
        self._half(self._sides[0], self.user_factors, self.item_factors, fixed=-1)
        self._half(self._sides[1], self.item_factors, self.user_factors, fixed=-2)

    def _half(self, matrix: sp.csr_matrix, rows: np.ndarray, others: np.ndarray, fixed: int) -> None:
        free = np.delete(np.arange(rows.shape[1]), fixed)
        targets = matrix.data - others[matrix.indices, fixed]
        penalties = self.penalty * np.maximum(np.diff(matrix.indptr), 1).astype(np.float32) ** self.penalty_exponent
        solved, known = np.ascontiguousarray(rows[:, free]), np.ascontiguousarray(others[:, free])
        gram = np.zeros((len(free), len(free)), np.float32)
        solve_rows(
            matrix.indptr, matrix.indices, np.ones_like(targets), targets, gram, penalties, known, solved, None,
            thread_count(self.threads),
        )  # fmt: skip
        rows[:, free] = solved


class SVDPlusPlus(BiasedMF):
    """`BiasedMF` with p_u + |N(u)|^-1/2 Σ_{j in N(u)} y_j for p_u, N(u) being what the user rated in training.

    The penalty of y_j is λ for each rating too. Arguments as for `BiasedMF`.
    """

    def start(self, interactions: Interactions) -> None:
        super().start(interactions)
        scale = self.init_scale / np.sqrt(self.dimension)
        shape = (self.num_items, self.dimension)
        self._feedback = self._order.normal(0, scale, shape).astype(np.float32)

    def epoch(self) -> None:
        ratings = self._ratings
        _svdpp_epoch(
            self._order.permutation(self.num_users), ratings.offsets, ratings.items, ratings.ratings, self.mean[0],
            self.user_factors, self.item_factors, self._feedback, np.float32(self._rate), np.float32(self.penalty),
            np.float32(self.bias_penalty),
        )  # fmt: skip
        self._rate *= self.decay

    def _finish(self) -> None:
        counts = np.maximum(np.asarray(self.seen.sum(1)), 1)
        self.user_factors[:, :-2] += np.asarray(self.seen @ self._feedback) / np.sqrt(counts)


@kernels.kernel
def _sgd_epoch(order, users, items, ratings, mean, p_all, q_all, rate, penalty, bias_penalty):  # type: ignore[no-untyped-def]
    size = p_all.shape[1] - 2
    for event in order:
        p, q = p_all[users[event]], q_all[items[event]]
        error = ratings[event] - mean - kernels.dot(p, q)
        for f in range(size):
            a, b = p[f], q[f]
            p[f] += rate * (error * b - penalty * a)
            q[f] += rate * (error * a - penalty * b)
        p[size] += rate * (error - bias_penalty * p[size])
        q[size + 1] += rate * (error - bias_penalty * q[size + 1])


@kernels.kernel
def _svdpp_epoch(  # type: ignore[no-untyped-def]
    order, offsets, items, ratings, mean, p_all, q_all, feedback, rate, penalty, bias_penalty
):
    """A user's ratings follow each other, so that the sum over N(u) is made once and its change is shared out after."""
    size = p_all.shape[1] - 2
    total, before = np.empty(size, np.float32), np.empty(size, np.float32)
    for user in order:
        low, high = offsets[user], offsets[user + 1]
        if low == high:
            continue
        root = np.float32(1 / np.sqrt(high - low))
        total[:] = 0
        for event in range(low, high):
            total += feedback[items[event]]
        total *= root
        before[:] = total
        p = p_all[user]
        for event in range(low, high):
            q = q_all[items[event]]
            predicted = mean + p[size] + q[size + 1]
            for f in range(size):
                predicted += (p[f] + total[f]) * q[f]
            error = ratings[event] - predicted
            p[size] += rate * (error - bias_penalty * p[size])
            q[size + 1] += rate * (error - bias_penalty * q[size + 1])
            for f in range(size):
                a, b, z = p[f], q[f], total[f]
                p[f] += rate * (error * b - penalty * a)
                q[f] += rate * (error * (a + z) - penalty * b)
                # Each y_j moves by rate (error root q - λ y_j): their scaled sum by rate (error q - λ z).
                total[f] += rate * (error * b - penalty * z)
        # What each y_j decays by over the events; the rest of the sum's change is the same for all of them.
        decay = np.float32((1 - rate * penalty) ** (high - low))
        for f in range(size):
            shift = (total[f] - decay * before[f]) * root
            for event in range(low, high):
                feedback[items[event], f] = decay * feedback[items[event], f] + shift
