"""Router: for each query the cheapest index and effort that will find enough.

Queries differ: what finds all of one query's best items may be wasted on another. From sample queries, whose true
answers an exact scan tells, a model learns to predict the recall P of every choice from features of the query; a query
then takes the choice of the least `time + price * (1 - P)`. The price of a miss is set on queries that the model has
not seen, so that the mean recall is the one asked for. A third part of the queries decides nothing and tells what is
gained: over the best single choice, with its effort interpolated, and over a random mixture of two, since a gain over
a coarse grid of efforts would be none.

Early termination inside one index is the case of one index with its efforts. With first steps, a cheap choice is run
first, and from what it found it is seen whether that is enough, or what to run next (Li, Zhang, Andersen, He. Improving
approximate nearest neighbor search through learned adaptive early termination. SIGMOD 2020,
https://doi.org/10.1145/3318464.3380600).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import router_models
from tfkit.retrieval.base import Index, SearchResult, as_vectors
from tfkit.retrieval.router_choice import Features, Plan, cheapest, costs_after
from tfkit.retrieval.router_fit import Fit
from tfkit.retrieval.router_report import Choice, RouterReport

#: `progress(text)`: what is being done.
Progress = Callable[[str], None]
LEAST_QUERIES = 100


class Router:
    """Sends each query to one of several indexes with one of its efforts.

    The router is not saved: the indexes are, and `fit` takes the same queries again.

    Args:
        indexes: built, over the same items; by name or not.
        k: items sought for each query.
        target_recall: share of the true k best to be found, in the mean over the queries, in (0, 1).
        model: `"trees"`, `"network"` (a Keras one; its training imports TensorFlow), `"bandit"`, or `"auto"`: the
            best of them.
        probe: whether first steps are taken before the choice; `"auto"`: whichever is faster.
        choices: index and effort pairs to choose from; None: those that `Index.efforts` names, and more between them
            around the target.
        seed: of the split of the queries and of the models.
    """

    def __init__(
        self,
        indexes: Mapping[str, Index] | Sequence[Index],
        *,
        k: int = 10,
        target_recall: float = 0.95,
        model: str = "auto",
        probe: bool | str = "auto",
        choices: Sequence[tuple[str, Mapping[str, Any]]] | None = None,
        seed: int = 0,
    ) -> None:
        named = indexes if isinstance(indexes, Mapping) else {repr(index): index for index in indexes}
        if not named or not all(isinstance(index, Index) for index in named.values()):
            raise checks.error("indexes", "a mapping or list of at least one index", indexes)
        self.indexes = dict(named)
        first = next(iter(self.indexes.values()))
        for name, index in self.indexes.items():
            if not len(index):
                raise checks.error("indexes", "built", name, "Call `build(items)` on each of them first.")
            if index.items.shape != first.items.shape or not np.array_equal(index.items, first.items):
                raise checks.error("indexes", "over the same items", name, "Build all from one array.")
        self.items = first.items
        self.k = checks.integer("k", k, 1, len(self.items))
        self.target_recall = checks.number("target_recall", target_recall, 0, 1, open_high=True)
        if not self.target_recall:
            raise checks.error("target_recall", "above 0", target_recall)
        self.model = checks.choice("model", model, ("auto", *router_models.MODELS))
        if probe not in (True, False, "auto"):
            raise checks.error("probe", 'True, False or "auto"', probe)
        self.probe = probe
        for name, _ in choices or ():
            checks.choice("choices", name, list(self.indexes))
        self.given = None if choices is None else [(name, dict(effort)) for name, effort in choices]
        self.seed = checks.integer("seed", seed, 0)

    def fit(self, queries: Any, progress: Progress | None = None) -> RouterReport:
        """Learns from sample queries: half of them teach, a quarter sets the trade-off, a quarter is reported on.

        Args:
            queries: (queries, dimension), at least 100, such as will be asked; a thousand and more teach well.
            progress: called as the work goes on.

        Returns:
            What was found; `search` then does what it says.

        Raises:
            ValueError: there are too few queries, they are no such vectors, or no choice reaches the target.
        """
        rows = as_vectors("queries", queries, self.items.shape[1], least=LEAST_QUERIES)
        self.report = Fit(self, rows, progress).run()
        return self.report

    def search(self, queries: Any, k: int | None = None, *, threads: int | None = None) -> SearchResult:
        """Finds the items of the largest inner products; each query by its own choice.

        Args:
            queries: (queries, dimension), or one vector (dimension,).
            k: how many items; None: as many as the router was made for. What it learned holds for that number.
            threads: most threads to use; None: as many as the process may.

        Raises:
            ValueError: `fit` was not called, or as for `Index.search`.
        """
        if not hasattr(self, "_plan"):
            raise ValueError("Router has learned nothing yet. Call `fit(queries)` first.")
        single = np.ndim(queries) == 1
        rows = as_vectors("queries", np.asarray(queries)[None] if single else queries, self.items.shape[1], least=0)
        k = self.k if k is None else checks.integer("k", k, 1, len(self.items))
        found = self._route(rows, k, threads)
        return SearchResult(found.scores[0], found.ids[0]) if single else found

    def route(self, queries: Any) -> np.ndarray:
        """Returns which of `report.choices` each query takes, int64, (queries,); first steps are run where needed."""
        if not hasattr(self, "_plan"):
            raise ValueError("Router has learned nothing yet. Call `fit(queries)` first.")
        rows = as_vectors("queries", queries, self.items.shape[1], least=0)
        if self._plan is None:
            return np.full(len(rows), self._choices.index(self.single))
        first = None if self._plan.probe is None else self._take(self._plan.probe, rows, self.k, None)
        return self._decide(rows, first)

    # The rest is how.

    _plan: Plan | None
    _features: Features
    _choices: tuple[Choice, ...]
    single: Choice

    def use(self, choices: tuple[Choice, ...], single: Choice, plan: Plan | None, features: Features) -> None:
        """Takes over what was learned; without a plan all queries go to the single choice."""
        self._choices, self.single, self._plan, self._features = choices, single, plan, features

    def _take(self, choice: int | Choice, rows: np.ndarray, k: int, threads: int | None) -> SearchResult:
        taken = choice if isinstance(choice, Choice) else self._choices[choice]
        return self.indexes[taken.name].search(rows, k, threads=threads, **taken.effort)

    def _decide(self, rows: np.ndarray, first: SearchResult | None) -> np.ndarray:
        assert self._plan is not None
        features = self._features.of_queries(rows)
        if first is not None:
            features = np.concatenate([features, self._features.of_results(rows, first)], axis=1)
        costs = costs_after(np.array([choice.query_us for choice in self._choices]), self._plan.probe)
        return cheapest(self._plan.model.predict(features), costs, self._plan.price)

    def _route(self, rows: np.ndarray, k: int, threads: int | None) -> SearchResult:
        """Searches: queries of one choice are searched at once, and the results put back in their order."""
        if self._plan is None or not len(rows):
            return self._take(self.single, rows, k, threads)._replace(exact=None)
        probe = self._plan.probe
        first = None if probe is None else self._take(probe, rows, k, threads)
        taken = self._decide(rows, first)
        scores = np.empty((len(rows), k), np.float32) if first is None else first.scores
        ids = np.empty((len(rows), k), np.int64) if first is None else first.ids
        for choice in range(len(self._choices)):
            group = np.flatnonzero(taken == choice)
            if len(group) and choice != probe:
                found = self._take(choice, rows[group], k, threads)
                scores[group], ids[group] = found.scores, found.ids
        return SearchResult(scores, ids)
