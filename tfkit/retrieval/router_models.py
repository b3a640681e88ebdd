"""Predictors for the router: from features of a query, the recall that each choice would have.

Boosted trees and a small network learn from the recall of every choice on every sample query. The bandit sees, as one
would in service, only that of the choice it took: a ridge regression for each choice, with a bonus for what is little
known (Li, Chu, Langford, Schapire. A contextual-bandit approach to personalized news article recommendation. WWW 2010,
https://arxiv.org/abs/1003.0146), where the bonus goes to the recall and the cost of a choice is known.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tfkit.retrieval import kernels

MODELS = ("trees", "network", "bandit")
#: Of the trees, for each choice: a leaf is found in three comparisons.
TREES, DEPTH, RATE, LEAF_QUERIES, SUBSAMPLE = 50, 3, 0.08, 10, 0.5
#: Of the network.
UNITS, PASSES_OVER, BATCH, STEP, DECAY = 32, 60, 64, 1e-2, 1e-4
#: Of the bandit: ridge, deviations of the bonus, passes over the queries.
RIDGE, BONUS, PASSES = 1.0, 0.3, 2


class Model(Protocol):
    """What predicts recall."""

    def fit(self, features: np.ndarray, recalls: np.ndarray, costs: np.ndarray, target: float, seed: int) -> None:
        """Learns.

        Args:
            features: float32, (queries, features).
            recalls: (queries, choices), in [0, 1].
            costs: (choices,), microseconds.
            target: mean recall that will be asked for.
            seed: of all that is random.
        """

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns the expected recall, float32, (queries, choices)."""


class Trees:
    """Gradient-boosted trees for each choice, laid out so that a kernel walks them without branching."""

    def fit(self, features: np.ndarray, recalls: np.ndarray, costs: np.ndarray, target: float, seed: int) -> None:
        from sklearn.ensemble import GradientBoostingRegressor

        self.base = recalls.mean(axis=0).astype(np.float32)
        self.columns = np.zeros((recalls.shape[1], TREES, 2**DEPTH - 1), np.int64)
        self.thresholds = np.full(self.columns.shape, np.inf, np.float32)
        self.leaves = np.zeros((recalls.shape[1], TREES, 2**DEPTH), np.float32)
        self.used = np.zeros(recalls.shape[1], np.int64)
        for choice in range(recalls.shape[1]):
            if np.ptp(recalls[:, choice]) == 0:
                continue
            boosted = GradientBoostingRegressor(
                n_estimators=TREES, learning_rate=RATE, max_depth=DEPTH, min_samples_leaf=LEAF_QUERIES,
                subsample=SUBSAMPLE, max_features=0.5, random_state=seed,
            )  # fmt: skip
            boosted.fit(features, recalls[:, choice])
            self.used[choice] = TREES
            for number, tree in enumerate(boosted.estimators_[:, 0]):
                self._lay_out(tree.tree_, choice, number)

    def _lay_out(self, tree: object, choice: int, number: int) -> None:
        """Copies a tree into a complete one: below an early leaf everything goes left."""
        waiting = [(0, 0)]
        while waiting:
            node, place = waiting.pop()
            left, right = tree.children_left[node], tree.children_right[node]  # type: ignore[attr-defined]
            if place >= 2**DEPTH - 1:
                value = tree.value[node, 0, 0]  # type: ignore[attr-defined]
                self.leaves[choice, number, place - 2**DEPTH + 1] = RATE * value
            elif left < 0:
                waiting.append((node, 2 * place + 1))
            else:
                self.columns[choice, number, place] = tree.feature[node]  # type: ignore[attr-defined]
                # Sklearn compares float32 features with float64 thresholds; rounded down, none changes sides.
                threshold = np.float32(tree.threshold[node])  # type: ignore[attr-defined]
                if threshold > tree.threshold[node]:  # type: ignore[attr-defined]
                    threshold = np.nextafter(threshold, np.float32(-np.inf))
                self.thresholds[choice, number, place] = threshold
                waiting += [(left, 2 * place + 1), (right, 2 * place + 2)]

    def predict(self, features: np.ndarray) -> np.ndarray:
        found = np.tile(self.base, (len(features), 1))
        walk_trees(features, self.columns, self.thresholds, self.leaves, self.used, found)
        return found


@kernels.kernel
def walk_trees(features, columns, thresholds, leaves, used, found):  # type: ignore[no-untyped-def]
    """Adds to `found`, (queries, choices), the leaves that the queries fall into."""
    inner = columns.shape[2]
    for query in range(features.shape[0]):
        row = features[query]
        for choice in range(columns.shape[0]):
            total = np.float32(0.0)
            for tree in range(used[choice]):
                node = np.int64(0)
                while node < inner:
                    right = row[columns[choice, tree, node]] > thresholds[choice, tree, node]
                    node = 2 * node + 1 + np.int64(right)
                total += leaves[choice, tree, node - inner]
            found[query, choice] += total


class Network:
    """A Keras network of one hidden layer; its weights are then used by NumPy."""

    def fit(self, features: np.ndarray, recalls: np.ndarray, costs: np.ndarray, target: float, seed: int) -> None:
        import keras  # Only here: the package searches without TensorFlow.

        self.mean, self.scale = _standard(features)
        inputs = (features - self.mean) / self.scale
        start = keras.initializers.GlorotUniform
        layers = [
            keras.layers.Input((inputs.shape[1],)),
            keras.layers.Dense(UNITS, "relu", kernel_initializer=start(seed)),
            keras.layers.Dense(recalls.shape[1], "sigmoid", kernel_initializer=start(seed + 1)),
        ]
        network = keras.Sequential(layers)
        rng = np.random.default_rng(seed)
        # All passes as one epoch: what `fit` does at the end of an epoch takes longer than so small a pass.
        order = np.concatenate([rng.permutation(len(inputs)) for _ in range(PASSES_OVER)])
        order = order[: max(BATCH, len(order) // BATCH * BATCH)]
        rate = keras.optimizers.schedules.CosineDecay(STEP, max(1, len(order) // BATCH))
        network.compile(keras.optimizers.AdamW(rate, weight_decay=DECAY), "mse", steps_per_execution=8)
        network.fit(inputs[order], recalls[order].astype(np.float32), batch_size=BATCH, shuffle=False, verbose=0)
        self.weights = [np.asarray(weight, np.float32) for weight in network.get_weights()]

    def predict(self, features: np.ndarray) -> np.ndarray:
        first, bias, second, shift = self.weights
        hidden = np.maximum((features - self.mean) / self.scale @ first + bias, 0)
        return np.asarray(1 / (1 + np.exp(-(hidden @ second + shift))), np.float32)


class Bandit:
    """A ridge regression for each choice, learned from the choices taken."""

    def fit(self, features: np.ndarray, recalls: np.ndarray, costs: np.ndarray, target: float, seed: int) -> None:
        self.mean, self.scale = _standard(features)
        inputs = _with_one((features - self.mean) / self.scale).astype(np.float64)
        choices, width = recalls.shape[1], inputs.shape[1]
        inverse = np.tile(np.eye(width) / RIDGE, (choices, 1, 1))
        sums, weights = np.zeros((choices, width)), np.zeros((choices, width))
        rng = np.random.default_rng(seed)
        price = float(costs.max())  # Of a miss; raised while too little is found, and lowered while too much.
        for query in np.concatenate([rng.permutation(len(inputs)) for _ in range(PASSES)]):
            x = inputs[query]
            known = inverse @ x  # (choices, width)
            bonus = BONUS * np.sqrt(np.maximum(known @ x, 0))
            hoped = np.clip(weights @ x + bonus, 0, 1)
            taken = int(np.argmin(costs + price * (1 - hoped)))
            found = recalls[query, taken]
            price *= float(np.exp(0.2 * (target - found)))
            step = known[taken]
            inverse[taken] -= np.outer(step, step) / (1 + step @ x)
            sums[taken] += found * x
            weights[taken] = inverse[taken] @ sums[taken]
        self.weights = weights.T.astype(np.float32)

    def predict(self, features: np.ndarray) -> np.ndarray:
        found = _with_one((features - self.mean) / self.scale) @ self.weights
        return np.asarray(np.clip(found, 0, 1), np.float32)


def make(name: str) -> Model:
    """Returns a new model of that name."""
    kinds: dict[str, type[Trees] | type[Network] | type[Bandit]] = {
        "trees": Trees, "network": Network, "bandit": Bandit,
    }  # fmt: skip
    return kinds[name]()


def _standard(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and deviation of each feature; of one that never changes, 1."""
    scale = features.std(axis=0)
    return features.mean(axis=0), np.where(scale > 0, scale, 1).astype(np.float32)


def _with_one(inputs: np.ndarray) -> np.ndarray:
    return np.concatenate([inputs, np.ones((len(inputs), 1), inputs.dtype)], axis=1)
