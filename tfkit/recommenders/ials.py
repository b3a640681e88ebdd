"""iALS: implicit matrix factorisation by alternating least squares, every unseen item a weak zero.

Paper: Hu, Koren, Volinsky. Collaborative filtering for implicit feedback datasets. ICDM 2008,
https://doi.org/10.1109/ICDM.2008.22; Rendle, Krichene, Zhang, Koren. Revisiting the performance of iALS on item
recommendation benchmarks. RecSys 2022, https://arxiv.org/abs/2110.14037 (regularisation that grows with the events);
Takács, Pilászy, Tikk. Applications of the conjugate gradient method for implicit feedback collaborative filtering.
RecSys 2011, https://doi.org/10.1145/2043932.2043987 (the solver).

Differs: both conventions of the unobserved weight; the exact solver beside conjugate gradients.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender
from tfkit.recommenders.interactions import Interactions
from tfkit.recommenders.least_squares import solve_rows
from tfkit.retrieval import blas
from tfkit.retrieval.base import thread_count

FORMULATIONS = ("rendle", "hu")


class IALS(Recommender):
    """Minimises Σ_seen c (1 - <w, h>)² + α₀ Σ <w, h>² + Σ_u λ_u |w_u|² + Σ_i λ_i |h_i|².

    The second sum is over all pairs ("rendle"), or over those unseen ("hu", as the package implicit has it). With n_u
    events, λ_u = λ (n_u + α₀ items)^ν, and likewise λ_i: ν = 0 is one penalty for all, ν = 1 the penalty of the paper.

    Args:
        dimension: of the factors.
        unobserved_weight: α₀, at least 0.
        penalty: λ > 0.
        penalty_exponent: ν in [0, 1].
        confidence: c of an event, times its rating where there are ratings.
        formulation: "rendle" or "hu".
        epochs: rounds over users and items.
        solver_steps: of conjugate gradients; None: exact.
        init_scale: standard deviation of the factors at the start, times the square root of the dimension.
        threads: None: as many as the process may. The result is the same.
        seed: of the start.
    """

    _saved = {"user_factors": "users", "item_factors": "items"}

    def __init__(
        self,
        dimension: int = 64,
        unobserved_weight: float = 0.1,
        penalty: float = 0.01,
        penalty_exponent: float = 1.0,
        confidence: float = 1.0,
        formulation: str = "rendle",
        epochs: int = 15,
        solver_steps: int | None = 3,
        init_scale: float = 0.1,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.unobserved_weight = checks.number("unobserved_weight", unobserved_weight, 0)
        self.penalty = checks.number("penalty", penalty, 1e-12)
        self.penalty_exponent = checks.number("penalty_exponent", penalty_exponent, 0, 1)
        self.confidence = checks.number("confidence", confidence, 1e-12)
        self.formulation = checks.choice("formulation", formulation, FORMULATIONS)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.solver_steps = None if solver_steps is None else checks.integer("solver_steps", solver_steps, 1)
        self.init_scale = checks.number("init_scale", init_scale, 1e-12)
        self.threads = None if threads is None else checks.integer("threads", threads, 1)
        self.seed = checks.integer("seed", seed, 0)

    def _fit(self, interactions: Interactions) -> None:
        self.start(interactions)
        for _ in range(self.epochs):
            self.epoch()

    def start(self, interactions: Interactions) -> None:
        """Draws the factors; `epoch` then improves them, for who wants to look between."""
        matrix = interactions.matrix
        if (matrix.data <= 0).any():
            raise checks.error("interactions", "with positive ratings as weights", matrix.data.min().item())
        self.seen = interactions.seen
        generator = np.random.default_rng(self.seed)
        scale = self.init_scale / np.sqrt(self.dimension)
        self.user_factors, self.item_factors = (
            generator.normal(0, scale, (count, self.dimension)).astype(np.float32) for count in matrix.shape
        )
        columns = matrix.T.tocsr()
        columns.sort_indices()
        self._sides = matrix, columns

    def epoch(self) -> None:
        """Solves for all users, then for all items."""
        by_user, by_item = self._sides
        self._half(by_user, self.user_factors, self.item_factors)
        self._half(by_item, self.item_factors, self.user_factors)

    def _half(self, matrix: sp.csr_matrix, rows: np.ndarray, others: np.ndarray) -> None:
        alpha = np.float32(self.unobserved_weight)
        targets = np.float32(self.confidence) * matrix.data
        weights = targets if self.formulation == "rendle" else targets - alpha
        counts = np.diff(matrix.indptr)
        penalties = self.penalty * (counts + self.unobserved_weight * len(others)) ** self.penalty_exponent
        with blas.at_most(thread_count(self.threads)):
            gram = alpha * (others.T @ others)
        solve_rows(
            matrix.indptr, matrix.indices, weights, targets, gram, penalties.astype(np.float32), others, rows,
            self.solver_steps, thread_count(self.threads),
        )  # fmt: skip

    def user_vectors(self, users: np.ndarray) -> np.ndarray:
        return self.user_factors[users]

    def item_vectors(self) -> np.ndarray:
        return self.item_factors

    def fold_in(self, histories: sp.csr_matrix) -> np.ndarray:
        """Returns the factors of people by their histories, (people, items), the items fixed; solved exactly."""
        made = np.zeros((histories.shape[0], self.dimension), np.float32)
        steps, self.solver_steps = self.solver_steps, None
        try:
            self._half(histories, made, self.item_factors)
        finally:
            self.solver_steps = steps
        return made

    def _history_scores(self, histories: sp.csr_matrix) -> np.ndarray:
        return np.asarray(self.fold_in(histories) @ self.item_factors.T)
