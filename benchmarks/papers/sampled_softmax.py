"""Blanc and Rendle 2018: the bias of sampled softmax against the number of samples, and the cost against the classes.

    python benchmarks/papers/sampled_softmax.py --cache build/sampled_softmax   # about 20 minutes on one core
    python benchmarks/papers/sampled_softmax.py --quick      # does it run?

Bias: half the absolute difference between the softmax and the mean over draws of the sampled softmax's probabilities,
on scores of normal factors (norms of classes log-normal) and on those of iALS (films of MovieLens small). A million
samples go into each mean; what is left of sampling by the softmax itself, which has no bias, is the noise of that.
Quality: cross-entropy, on held-out pairs, of a model of the next film given the last on MovieLens-1M, and of the next
word given the last on a part of WikiText-2, after the same steps with each number of samples. Cost: processor time a
draw, one sample for each of 200 queries.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit.recommenders import IALS, Interactions, random_split
from tfkit.training.sampled_softmax import (
    FourierSampler,
    KernelSampler,
    Sampler,
    SoftmaxSampler,
    UniformSampler,
    UnigramSampler,
)

DIMENSION, ALPHA = 32, 100.0
PLOT = common.RESULTS.parents[1] / "docs" / "sampled_softmax.png"
Table = dict[str, dict[int, float]]
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "quadratic kernel": lambda: KernelSampler(ALPHA),
    "uniform": UniformSampler,
    "Fourier features": FourierSampler,
    "softmax": lambda: SoftmaxSampler(absolute=True),
}


def bias(sampler: Sampler, weights: np.ndarray, queries: np.ndarray, count: int, draws: int) -> float:
    """Returns the total variation between the softmax of |o| and the mean sampled softmax of |o|, over queries."""
    total = 0.0
    for number, query in enumerate(queries):
        logits = np.abs(weights.astype(float) @ query)
        full = np.exp(logits - logits.max())
        full /= full.sum()
        positive = int(np.random.default_rng(number).choice(len(full), p=full))
        mean = np.zeros(len(full))
        for seed, start in enumerate(range(0, draws, 4000)):
            size = min(4000, draws - start)
            drawn = sampler.sample(
                np.tile(query, (size, 1)), count, positives=np.full(size, positive), seed=1000 * number + seed
            )
            corrected = logits[drawn.ids] - drawn.log_probability - np.log(count)
            top = np.maximum(corrected.max(1), logits[positive])[:, None]
            chances, own = np.exp(corrected - top), np.exp(logits[positive] - top[:, 0])
            whole = chances.sum(1) + own
            mean += np.bincount(drawn.ids.ravel(), (chances / whole[:, None]).ravel(), len(full)) / draws
            mean[positive] += (own / whole).sum() / draws
        total += np.abs(mean - full).sum() / 2
    return total / len(queries)


def scores_like_factorisation(classes: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(classes, DIMENSION)) * generator.lognormal(0, 0.5, (classes, 1))
    asked = generator.normal(size=(queries, DIMENSION)) * 0.5
    return weights.astype(np.float32), asked.astype(np.float32)


def scores_of_ials(queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors of the films of MovieLens small, and of users times the temperature that fits held-out events.

    iALS learns no softmax: its scores become logits by the factor that makes held-out events most likely.
    """
    path = Path(os.environ["TFKIT_DATA"]) / "movielens_small_ratings.csv.gz"
    log = Interactions.from_file(path, user="userId", item="movieId", duplicates="last")
    training, held = random_split(log, 0.25, seed=0)
    model = IALS(DIMENSION, 0.1, 0.01, epochs=10, threads=1).fit(training)
    users, items = held.users[:4000], held.items[:4000]
    scores = model.user_factors[users] @ model.item_factors.T
    own = np.arange(len(users)), items
    likelihood = {factor: float(np.log(_softmax(np.abs(scores * factor)))[own].mean()) for factor in range(1, 31)}
    best = max(likelihood, key=likelihood.__getitem__)
    say(f"logits are iALS's scores times {best}")
    chosen = np.random.default_rng(0).choice(model.num_users, queries, replace=False)
    return model.item_factors, best * model.user_factors[chosen]


def popularity(weights: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Returns how often the softmax of |o| gives each class in 100,000 events."""
    return np.asarray(_softmax(np.abs(asked @ weights.T)).mean(0) * 100_000)


def cost(sampler: Sampler, classes: int, queries: int = 200, count: int = 1) -> float:
    """Returns microseconds a draw, the least of five rounds."""
    generator = np.random.default_rng(0)
    sampler.build(generator.normal(size=(classes, DIMENSION)).astype(np.float32))
    asked = generator.normal(size=(queries, DIMENSION)).astype(np.float32)
    rounds = []
    for number in range(6):
        start = time.process_time()
        sampler.sample(asked, count, seed=number)
        rounds.append((time.process_time() - start) / queries / count * 1e6)
    return min(rounds[1:])


def next_item_pairs(limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the last film, the next one and how many films there are, of MovieLens-1M."""
    data = np.load(Path(os.environ["TFKIT_DATA"]) / "ml1m_sequences.npz", allow_pickle=False)
    items, offsets = data["train_items"].astype(np.int64) - 1, data["train_offsets"]
    inside = np.ones(len(items), bool)
    inside[offsets[1:-1]] = False
    inside[0] = False
    place = np.random.default_rng(0).permutation(np.flatnonzero(inside))[:limit]
    return items[place - 1], items[place], 3416


def next_word_pairs(limit: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the last word, the next one and how many words there are, of a part of WikiText-2."""
    with zipfile.ZipFile(Path(os.environ["TFKIT_DATA"]) / "wikitext2_small.zip") as archive:
        name = next(name for name in archive.namelist() if name.endswith("train.txt"))
        words = archive.read(name).decode().split()
    vocabulary, codes = np.unique(words, return_inverse=True)
    place = np.random.default_rng(0).permutation(len(codes) - 1)[:limit] + 1
    return codes[place - 1], codes[place], len(vocabulary)


def train(sampler: Sampler | None, count: int, steps: int, pairs: tuple[np.ndarray, np.ndarray], classes: int) -> float:
    """Returns the held-out cross-entropy of p(next | last) = softmax|<a_last, w_next>| after SGD by Adagrad."""
    generator = np.random.default_rng(1)
    last, following = pairs
    held = len(last) // 10
    a, w = (generator.normal(0, 0.3, (classes, DIMENSION)).astype(np.float32) for _ in range(2))
    ga, gw = np.full((classes, 1), 1e-2, np.float32), np.full((classes, 1), 1e-2, np.float32)
    if sampler is not None:
        sampler.build(w)
    for step in range(steps):
        rows = generator.integers(held, len(last), 256)
        h, target = a[last[rows]], following[rows]
        if sampler is None:
            scores = h @ w.T
            chances = _softmax(np.abs(scores)) * 1.0
            chances[np.arange(256), target] -= 1
            slopes = chances * np.sign(scores)
            to_h, to_w, touched = slopes @ w, slopes.T @ h, np.arange(classes)
        else:
            drawn = sampler.sample(h, count, positives=target, seed=step)
            ids = np.concatenate([target[:, None], drawn.ids], 1)
            scores = np.einsum("bd,bsd->bs", h, w[ids])
            corrected = np.abs(scores)
            corrected[:, 1:] -= drawn.log_probability + np.log(count)
            chances = _softmax(corrected)
            chances[:, 0] -= 1
            slopes = chances * np.sign(scores)
            to_h = np.einsum("bs,bsd->bd", slopes, w[ids])
            touched, where = np.unique(ids, return_inverse=True)
            to_w = np.zeros((len(touched), DIMENSION), np.float32)
            np.add.at(to_w, where.ravel(), (slopes[:, :, None] * h[:, None]).reshape(-1, DIMENSION))
        to_a = np.zeros_like(a)
        np.add.at(to_a, last[rows], to_h.astype(np.float32))
        ga += (to_a**2).mean(1, keepdims=True) / 256
        gw[touched] += (to_w**2).mean(1, keepdims=True) / 256
        a -= 0.3 * to_a / 16 / np.sqrt(ga)
        w[touched] -= 0.3 * to_w / 16 / np.sqrt(gw[touched])
        if sampler is not None:
            sampler.update(touched, w[touched])
    logits = np.abs(a[last[:held]] @ w.T)
    top = logits.max(1)
    return float(
        np.mean(top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(held), following[:held]])
    )


def _softmax(scores: np.ndarray) -> np.ndarray:
    values = np.exp(scores - scores.max(1, keepdims=True))
    return values / values.sum(1, keepdims=True)


def samples_needed(curve: dict[int, float], loss: float) -> float:
    """Returns the samples that reach a loss, along the logarithm between measured ones; inf if none does."""
    known = sorted(curve.items())
    if known[0][1] <= loss:
        return known[0][0]
    for (few, worse), (many, better) in zip(known, known[1:], strict=False):
        if better <= loss < worse:
            share = (worse - loss) / (worse - better)
            return float(np.exp(np.log(few) + share * np.log(many / few)))
    return float("inf")


class Kept:
    """Values that took long, in a file, so that an interrupted run goes on."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "sampled_softmax.json"
        self.values = json.loads(self.path.read_text()) if self.path and self.path.exists() else {}

    def __call__(self, key: str, make: Callable[[], float]) -> float:
        if key not in self.values:
            self.values[key] = make()
            if self.path is not None:
                common.write_json(self.path, self.values)
        say(f"{key}: {self.values[key]:.4f}")
        return float(self.values[key])


def plot(table: dict[str, Table], times: Table) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, rows in zip(axes, (*table.values(), times), strict=True):
        for name, values in rows.items():
            axis.plot(list(values), list(values.values()), "o-", label=name, markersize=4)
        axis.set_xscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    for axis, kind in zip(axes, table, strict=False):
        axis.set(xlabel="samples", ylabel="total variation from the softmax", title=f"scores of {kind}")
    axes[2].set(xlabel="classes", ylabel="microseconds a draw", yscale="log")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=100)


def biases(kept: Kept, quick: bool) -> dict[str, Table]:
    """Returns the bias of each sampler on each kind of scores; the unigram's counts are of queries of their own."""
    found: dict[str, Table] = {}
    count = 2 if quick else 5
    for kind, (weights, asked) in {
        "normal factors": scores_like_factorisation(500 if quick else 10_000, count + 200),
        "iALS": scores_of_ials(count + 200),
    }.items():
        for name, sampler, counts in (
            ("quadratic kernel", KernelSampler(ALPHA), (8, 32, 128)),
            ("uniform", UniformSampler(), (8, 32, 128, 512, 2048)),
            ("unigram", UnigramSampler(popularity(weights, asked[count:])), (8, 32, 128)),
            ("Fourier features", FourierSampler(), (8, 32, 128)),
            ("softmax", SoftmaxSampler(absolute=True), (8, 32)),
        ):
            sampler.build(weights)
            for samples in counts[:1] if quick else counts:
                draws = 50 if quick else 1_000_000 // samples
                made = functools.partial(bias, sampler, weights, asked[:count], samples, draws)
                value = kept(f"{kind}: bias of {name}, {samples} samples", made)
                found.setdefault(kind, {}).setdefault(name, {})[samples] = value
    return found


def costs(kept: Kept, quick: bool) -> Table:
    times: Table = {}
    for name, make in SAMPLERS.items():
        for classes in (1000, 2000) if quick else (1000, 10_000, 100_000, 1_000_000):
            if name == "softmax" and classes > 100_000:
                continue
            made = functools.partial(cost, make(), classes)
            times.setdefault(name, {})[classes] = kept(f"{name}, {classes} classes, us a draw", made)
    return times


def qualities(kept: Kept, quick: bool, steps: int) -> dict[str, Table]:
    found: dict[str, Table] = {}
    for task, (pairs, uniform) in TASKS.items():
        last, following, classes = pairs(2000 if quick else 200_000)
        for name, make, counts in (
            ("full", lambda: None, (classes,)),
            ("quadratic kernel", SAMPLERS["quadratic kernel"], (4, 8, 16)),
            ("uniform", UniformSampler, uniform),
        ):
            for count in counts[:1] if quick else counts:
                made = functools.partial(train, make(), count, steps, (last, following), classes)
                value = kept(f"{task}: cross-entropy of {name}, {count}", made)
                found.setdefault(task, {}).setdefault(name, {})[count] = value
    return found


TASKS = {"films": (next_item_pairs, (8, 32, 128, 512)), "words": (next_word_pairs, (32, 128, 512))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    quick = arguments.quick
    kept = Kept(None if quick else arguments.cache)
    table, times = biases(kept, quick), costs(kept, quick)
    quality = qualities(kept, quick, 3 if quick else arguments.steps)
    if quick:
        return
    figures = {
        "tv_quadratic_8": table["iALS"]["quadratic kernel"][8],
        "tv_uniform_2048": table["iALS"]["uniform"][2048],
        "tv_quadratic_8_normal_factors": table["normal factors"]["quadratic kernel"][8],
        "tv_uniform_2048_normal_factors": table["normal factors"]["uniform"][2048],
        "sampling_time_1m_over_1k_classes": times["quadratic kernel"][1_000_000] / times["quadratic kernel"][1000],
    }
    for task, own in quality.items():
        # Where uniform never gets there, its most samples are a bound.
        most, end = max(own["uniform"]), "" if task == "films" else f"_{task}"
        ratios = [n / min(samples_needed(own["uniform"], loss), most) for n, loss in own["quadratic kernel"].items()]
        figures[f"samples_over_uniform_at_equal_quality{end}"] = float(np.median(ratios))
        figures[f"loss_of_16_over_full_softmax{end}"] = own["quadratic kernel"][16] / min(own["full"].values())
    plot(table, times)
    common.write_result(
        common.RESULTS / "sampled_softmax.json", figures, title="Sampled softmax", plot=PLOT.name,
        about="Blanc and Rendle, <https://arxiv.org/abs/1712.00527>: total variation from the softmax over 10,000 "
        "classes with normal factors and over the 9,066 films of MovieLens small with those of iALS; processor time of "
        "a draw; held-out cross-entropy after the same steps, of the next film of MovieLens-1M (3,416 classes) and of "
        "the next word of a part of WikiText-2.",
        results={
            **{f"Total variation with scores of {kind}, by samples": _listed("sampler", own)
               for kind, own in table.items()},
            "Microseconds a draw, by classes": _listed("sampler", times),
            **{f"Cross-entropy of the next of {task}, by samples": _listed("sampler", own)
               for task, own in quality.items()},
        },
        steps=arguments.steps, alpha=ALPHA, dimension=DIMENSION, data="200,000 pairs each, a tenth held out",
    )  # fmt: skip


def _listed(name: str, table: Table) -> list[dict[str, Any]]:
    columns = sorted({count for values in table.values() for count in values})
    return [{name: key, **{str(c): values.get(c) for c in columns}} for key, values in table.items()]


if __name__ == "__main__":
    main()
