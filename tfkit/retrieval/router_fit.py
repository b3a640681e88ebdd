"""How a router is fitted: every choice is measured on sample queries, models are learned, and the best way is taken."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import router_models, tuning
from tfkit.retrieval.base import SearchResult
from tfkit.retrieval.exact import Exact
from tfkit.retrieval.router_choice import Features, Plan, cheapest, costs_after, set_price
from tfkit.retrieval.router_report import Choice, RouterReport, Row, mixture_cost, single_cost

if TYPE_CHECKING:
    from tfkit.retrieval.router import Progress, Router

#: Choices routed between, at most; rounds of timing; efforts put between two of the grid around the target.
MOST_CHOICES, ROUNDS, REFINED = 8, 3, 2
#: Efforts beyond this many times the time of the fastest that suffices are not looked at.
HOPELESS = 8.0
#: First steps cost at most this share of the best single choice.
PROBE_SHARE = 0.5
#: Routing must gain this much, on the queries that set the price, to be worth it.
WORTH = 1.02
FINAL_ROUNDS = 7


class Fit:
    """One call of `Router.fit`."""

    def __init__(self, router: Router, queries: np.ndarray, progress: Progress | None) -> None:
        self.router, self.progress = router, progress
        self.target, self.k = router.target_recall, router.k
        order = np.random.default_rng(router.seed).permutation(len(queries))
        half, quarter = len(order) // 2, len(order) // 4
        self.learn, self.trade, self.held = order[:half], order[half : half + quarter], order[half + quarter :]
        self.queries = queries
        self.decided = order[: half + quarter]
        self.truth = Exact().build(router.items).search(queries, self.k)
        self.tried: list[tuple[str, dict[str, Any]]] = []
        self.recalls = np.empty((len(queries), 0))
        self.times = np.empty(0)

    def run(self) -> RouterReport:
        self._measure()
        single = self._best_single()
        kept = self._keep(single)
        self._tell("learning")
        plans, rows = self._learn(kept, single)
        chosen = max(plans, key=lambda name: plans[name][1])
        worth = plans[chosen][1] >= WORTH
        choices = tuple(self._choice(number) for number in kept)
        router = self.router
        router.use(choices, self._choice(single), plans[chosen][0] if worth else None, self.features)
        self._tell("timing the router")
        router_us, single_us, found = self._final()
        held_recall = self._recall_of(found)
        gain = single_us * self._single_at(held_recall) / self._single_at(self._mean(single, self.held)) / router_us
        probe = plans[chosen][0].probe if worth else None
        return RouterReport(
            rows=tuple(rows), chosen=chosen if worth else "single", worth_it=worth, choices=choices,
            single=self._choice(single), probe=None if probe is None else choices[probe], measured_us=router_us,
            measured_single_us=single_us, measured_gain=gain if worth else 1.0, target_recall=self.target, k=self.k,
            queries=(len(self.learn), len(self.trade), len(self.held)),
        )  # fmt: skip

    # Measuring the choices.

    def _measure(self) -> None:
        """Finds recall and time of every choice: those given, or each index's efforts and some between them."""
        router = self.router
        if router.given is not None:
            for name, effort in router.given:
                self._add(name, effort)
        else:
            for name, index in router.indexes.items():
                made: list[int] = []
                for effort in index.efforts(self.k):
                    made.append(self._add(name, effort))
                    least = min((self.times[c] for c in range(len(self.tried)) if self._enough(c)), default=np.inf)
                    if self._mean(made[-1], self.decided) > 0.9999 or self.times[made[-1]] > HOPELESS * least:
                        break
                for _ in range(REFINED):
                    place = next((i for i, choice in enumerate(made) if self._enough(choice)), 0)
                    pair = [self.tried[made[i]][1] for i in (place - 1, place)] if place else None
                    middle = None if pair is None else tuning.between(*pair)
                    if middle is None:
                        break
                    made.insert(place, self._add(name, middle))
        self._tell("timing the choices in turns")
        searches = [functools.partial(self._search, choice) for choice in range(len(self.tried))]
        timed = [[self._time(search) for search in searches] for _ in range(ROUNDS)]
        self.times = np.median(timed, axis=0) / len(self.decided)

    def _add(self, name: str, effort: dict[str, Any]) -> int:
        self._tell(f"{name}: {', '.join(f'{key}={value}' for key, value in effort.items()) or 'searching'}")
        self.tried.append((name, dict(effort)))
        choice = len(self.tried) - 1
        found = tuning.recalls(self.router.indexes[name].search(self.queries, self.k, threads=1, **effort), self.truth)
        self.recalls = np.concatenate([self.recalls, found[:, None]], axis=1)
        self.times = np.append(self.times, self._time(lambda: self._search(choice)) / len(self.decided))
        return choice

    def _search(self, choice: int) -> None:
        name, effort = self.tried[choice]
        self.router.indexes[name].search(self.queries[self.decided], self.k, threads=1, **effort)

    def _mean(self, choice: int, part: np.ndarray) -> float:
        return float(self.recalls[part, choice].mean())

    def _enough(self, choice: int) -> bool:
        return self._mean(choice, self.decided) >= self.target

    def _best_single(self) -> int:
        """Returns the fastest choice that finds enough of the queries that decide."""
        enough = [choice for choice in range(len(self.tried)) if self._enough(choice)]
        if not enough:
            most = self.recalls[self.decided].mean(axis=0).max()
            raise checks.error(
                "target_recall", "within reach of one of the choices", self.target,
                f"The best recall is {most:.3f}: give choices of more effort, or lower the target.",
            )  # fmt: skip
        return min(enough, key=lambda choice: self.times[choice])

    def _keep(self, single: int) -> list[int]:
        """Returns the choices to route between: the single one, and one by one those that help an oracle most."""
        recalls = self.recalls[self.learn]
        kept, best = [single], np.inf
        while len(kept) < MOST_CHOICES:
            left = [choice for choice in range(len(self.tried)) if choice not in kept]
            scored = []
            for choice in left:
                some = [*kept, choice]
                _, reached, cost = set_price(recalls[:, some], recalls[:, some], self.times[some], self.target)
                scored.append((cost if reached >= self.target else np.inf, choice))
            if not scored or min(scored)[0] >= 0.995 * best:
                break
            best, added = min(scored)
            kept.append(added)
        return sorted(kept, key=lambda choice: self.times[choice])

    # Learning.

    def _learn(self, kept: list[int], single: int) -> tuple[dict[str, tuple[Plan, float]], list[Row]]:
        """Returns for each model its plan and its gain on the queries that set the price, and the report's rows."""
        router, costs = self.router, self.times[kept]
        self.features = Features(router.items, router.seed)
        plain = self.features.of_queries(self.queries)
        spent: dict[int | None, float] = {
            None: self._time(lambda: self.features.of_queries(self.queries[self.decided])) / len(self.decided)
        }
        inputs: dict[int | None, np.ndarray] = {None: plain} if router.probe is not True else {}
        probe = self._probe(kept, single)
        if probe is not None:
            name, effort = self.tried[kept[probe]]
            found = router.indexes[name].search(self.queries, self.k, threads=1, **effort)
            inputs[probe] = np.concatenate([plain, self.features.of_results(self.queries, found)], axis=1)
            beside = self._time(lambda: self.features.of_results(self.queries, found)) / len(self.queries)
            spent[probe] = spent[None] + beside
        rows = self._baselines(kept, single)
        plans: dict[str, tuple[Plan, float]] = {}
        for name in router_models.MODELS if router.model == "auto" else (router.model,):
            for first, features in inputs.items():
                self._tell(f"learning: {name}")
                left = costs_after(costs, first)
                model = router_models.make(name)
                known = self.recalls[np.ix_(self.learn, np.array(kept))]
                model.fit(features[self.learn], known, left, self.target, router.seed)
                trade = features[self.trade]
                own = spent[first] + self._time(functools.partial(model.predict, features)) / len(features)
                extra = own + (0.0 if first is None else float(costs[first]))
                price, reached, cost = set_price(
                    model.predict(trade), self.recalls[np.ix_(self.trade, np.array(kept))], left, self.target
                )
                label = name if first is None else f"{name} + first steps"
                gain = self._single_at(reached, self.trade) / (cost + extra) if reached >= self.target else 0.0
                plans[label] = Plan(label, model, first, price), gain
                taken = cheapest(model.predict(features[self.held]), left, price)
                rows.append(self._row(label, kept, taken, left, extra, own, rows[2].query_us))
        return plans, rows

    def _probe(self, kept: list[int], single: int) -> int | None:
        """Returns which of the kept choices makes the first steps: of those cheap enough the one that finds most."""
        if self.router.probe is False or len(kept) < 2:
            return None
        most = PROBE_SHARE * self.times[single]
        cheap = [place for place, choice in enumerate(kept) if self.times[choice] <= most]
        if not cheap:
            return 0 if self.router.probe is True else None
        return max(cheap, key=lambda place: self._mean(kept[place], self.learn))

    def _baselines(self, kept: list[int], single: int) -> list[Row]:
        held, costs = self.held, self.times[kept]
        mixture = mixture_cost(self.target, self.recalls[held].mean(axis=0), self.times)
        truth = self.recalls[np.ix_(held, np.array(kept))]
        # The oracle knows the true recalls of these queries, and its price is that of these queries too.
        price, _, _ = set_price(truth, truth, costs, self.target)
        oracle = self._row("oracle", kept, cheapest(truth, costs, price), costs, 0.0, 0.0, 0.0)
        oracle = oracle._replace(regret_us=0.0)
        only = np.full(len(held), kept.index(single))
        first = self._row("single", kept, only, costs, 0.0, 0.0, oracle.query_us)
        gain = self._single_at(self.target) / mixture
        return [first, Row("mixture", self.target, mixture, 0.0, gain, 1.0, mixture - oracle.query_us), oracle]

    def _row(
        self, name: str, kept: list[int], taken: np.ndarray, costs: np.ndarray, extra: float, own: float, oracle: float
    ) -> Row:
        """Returns the row of a way of choosing, over the queries that decide nothing."""
        found = float(self.recalls[self.held, np.array(kept)[taken]].mean())
        spent = float(costs[taken].mean()) + extra
        mixture = mixture_cost(found, self.recalls[self.held].mean(axis=0), self.times)
        return Row(name, found, spent, own, self._single_at(found) / spent, mixture / spent, spent - oracle)

    def _single_at(self, recall: float, part: np.ndarray | None = None) -> float:
        """Returns the time of the best single choice at a recall, its effort interpolated."""
        part = self.held if part is None else part
        names = np.array([name for name, _ in self.tried])
        means = self.recalls[part].mean(axis=0)
        return single_cost(recall, {name: (means[names == name], self.times[names == name]) for name in set(names)})

    # The router itself, in turns with the best single choice.

    def _final(self) -> tuple[float, float, SearchResult]:
        rows, router = self.queries[self.held], self.router
        single = router.single
        index = router.indexes[single.name]
        found = router.search(rows, threads=1)
        times = [
            (
                self._time(lambda: router.search(rows, threads=1)),
                self._time(lambda: index.search(rows, self.k, threads=1, **single.effort)),
            )
            for _ in range(FINAL_ROUNDS)
        ]
        routed, alone = np.median(times, axis=0) / len(rows)
        return float(routed), float(alone), found

    def _recall_of(self, found: SearchResult) -> float:
        return tuning.recall(found, SearchResult(self.truth.scores[self.held], self.truth.ids[self.held]))

    def _choice(self, number: int) -> Choice:
        name, effort = self.tried[number]
        return Choice(name, effort, self._mean(number, self.decided), float(self.times[number]))

    @staticmethod
    def _time(work: Callable[[], Any]) -> float:
        """Returns processor time in microseconds, the least of two runs: the first may compile."""
        best = np.inf
        for _ in range(2):
            begun = time.process_time()
            work()
            best = min(best, 1e6 * (time.process_time() - begun))
        return max(best, 1e-3)

    def _tell(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text)
