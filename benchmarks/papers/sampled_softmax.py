"""Blanc and Rendle 2018: the bias of sampled softmax against the number of samples, and the cost against the classes.

    python benchmarks/papers/sampled_softmax.py
    python benchmarks/papers/sampled_softmax.py --quick      # does it run?

Bias: half the absolute difference between the softmax and the mean over draws of the sampled softmax's probabilities,
on scores like those of matrix factorisation (norms of classes log-normal). Quality: cross-entropy, on held-out pairs,
of a model of the next film given the last on MovieLens-1M, after the same steps with each number of samples.
Cost: processor time a draw of the kernel sampler.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit.training.sampled_softmax import KernelSampler, Sampler, SoftmaxSampler, UniformSampler

DIMENSION, ALPHA = 32, 100.0


def bias(sampler: Sampler, weights: np.ndarray, queries: np.ndarray, count: int, draws: int) -> float:
    """Returns the total variation between the softmax of |o| and the mean sampled softmax of |o|, over queries."""
    total = 0.0
    for number, query in enumerate(queries):
        logits = np.abs(weights.astype(float) @ query)
        full = np.exp(logits - logits.max())
        full /= full.sum()
        positive = int(np.random.default_rng(number).choice(len(full), p=full))
        mean = np.zeros(len(full))
        rows = np.tile(query, (draws, 1))
        drawn = sampler.sample(rows, count, positives=np.full(draws, positive), seed=number)
        corrected = logits[drawn.ids] - drawn.log_probability - np.log(count)
        top = np.maximum(corrected.max(1), logits[positive])[:, None]
        chances, own = np.exp(corrected - top), np.exp(logits[positive] - top[:, 0])
        whole = chances.sum(1) + own
        np.add.at(mean, drawn.ids, chances / whole[:, None] / draws)
        mean[positive] += (own / whole).mean()
        total += np.abs(mean - full).sum() / 2
    return total / len(queries)


def scores_like_factorisation(classes: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(classes, DIMENSION)) * generator.lognormal(0, 0.5, (classes, 1))
    asked = generator.normal(size=(queries, DIMENSION)) * 0.5
    return weights.astype(np.float32), asked.astype(np.float32)


def cost(classes: int, queries: int = 200, count: int = 1) -> float:
    """Returns microseconds a draw, the least of five rounds."""
    generator = np.random.default_rng(0)
    sampler = KernelSampler(ALPHA).build(generator.normal(size=(classes, DIMENSION)).astype(np.float32))
    asked = generator.normal(size=(queries, DIMENSION)).astype(np.float32)
    rounds = []
    for number in range(6):
        start = time.process_time()
        sampler.sample(asked, count, seed=number)
        rounds.append((time.process_time() - start) / queries / count * 1e6)
    return min(rounds[1:])


def next_item_pairs(limit: int) -> tuple[np.ndarray, np.ndarray]:
    data = np.load(Path(os.environ["TFKIT_DATA"]) / "ml1m_sequences.npz", allow_pickle=False)
    items, offsets = data["train_items"].astype(np.int64) - 1, data["train_offsets"]
    inside = np.ones(len(items), bool)
    inside[offsets[1:-1]] = False
    inside[0] = False
    place = np.random.default_rng(0).permutation(np.flatnonzero(inside))[:limit]
    return items[place - 1], items[place]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    quick = arguments.quick
    weights, queries = scores_like_factorisation(500 if quick else 10_000, 2 if quick else 10)
    table: dict[str, dict[int, float]] = {}
    for name, sampler, counts in (
        ("kernel", KernelSampler(ALPHA), (8, 32, 128)),
        ("uniform", UniformSampler(), (8, 32, 128, 512, 2048)),
        ("softmax", SoftmaxSampler(absolute=True), (8,)),
    ):
        sampler.build(weights)
        table[name] = {}
        for count in counts[:1] if quick else counts:
            table[name][count] = bias(sampler, weights, queries, count, 50 if quick else min(4000, 2_000_000 // count))
            say(f"bias of {name:8} {count:5} samples: {table[name][count]:.3f}")
    times = {}
    for classes in (1000, 2000) if quick else (1000, 10_000, 100_000, 1_000_000):
        times[classes] = cost(classes)
        say(f"{classes:9,} classes: {times[classes]:.1f} us a draw")
    pairs = next_item_pairs(2000 if quick else 200_000)
    steps = 3 if quick else arguments.steps
    quality: dict[str, dict[int, float]] = {"full": {3416: train(None, 0, steps, pairs, 3416)}}
    say(f"full softmax: {quality['full'][3416]:.4f}")
    for name, make, counts in (
        ("kernel", lambda: KernelSampler(ALPHA), (4, 8, 16)),
        ("uniform", UniformSampler, (8, 32, 128, 512)),
    ):
        quality[name] = {}
        for count in counts[:1] if quick else counts:
            quality[name][count] = train(make(), count, steps, pairs, 3416)
            say(f"{name} {count}: {quality[name][count]:.4f}")
    if quick:
        return
    figures = {
        "tv_quadratic_8": table["kernel"][8],
        "tv_uniform_2048": table["uniform"][2048],
        "sampling_time_1m_over_1k_classes": times[1_000_000] / times[1000],
    }
    ratios = [count / samples_needed(quality["uniform"], loss) for count, loss in quality["kernel"].items()]
    reached = [ratio for ratio in ratios if ratio > 0]
    if reached:
        figures["samples_over_uniform_at_equal_quality"] = float(np.median(reached))
    common.write_result(
        common.RESULTS / "sampled_softmax.json", figures, bias=table, us_per_draw=times, cross_entropy=quality,
        steps=steps, alpha=ALPHA, dimension=DIMENSION, data="MovieLens-1M next items, 200,000 pairs, a tenth held out",
    )  # fmt: skip


if __name__ == "__main__":
    main()
