"""What `tfkit.compression.search` tries: chains of methods, and which of the many are worth a first look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tfkit import compression
from tfkit.compression.base import setting_for
from tfkit.compression.searching.candidates import BASELINE, Candidate, Stage, sparsity_by_layer
from tfkit.compression.searching.halving import Point, spread
from tfkit.compression.searching.sensitivity import (
    PRUNED_SHARE,
    Sensitivity,
    curvatures,
    kernels,
    price_by_sensitivity,
    rounded,
    sparsity_by_sensitivity,
)
from tfkit.internal import checks, surgery

#: Bits that a packed weight takes, about: of a float32 and of an 8-bit integer.
FLOAT_BITS, INT8_BITS = 27.0, 7.0
#: Latency over float32, about.
INT8_LATENCY, DYNAMIC_LATENCY = 0.5, 0.6
#: A chain that promises more than this share of the int8 file, which takes no training, is not worth any.
LEAST_GAIN = 0.7
#: Nor is one that is predicted to lose this much before training: guessing among 100 classes loses less.
HOPELESS_LOSS = 5.0
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985)
#: What a chain may be exported as, by default.
ENDINGS = ("float32", "int8-qat")
#: Files that need no training, made in every search.
FORMATS = ("float16", "dynamic", "int8")


class Step(NamedTuple):
    """One method of a chain, with its share of the training.

    Attributes:
        label: letters, digits and underscores, which tell it from every other step; part of the names of files.
        method: a class of `tfkit.compression`.
        arguments: of its constructor.
        epochs: in units of the search's `epochs`.
        learning_rate: in units of the search's `learning_rate`.
    """

    label: str
    method: str
    arguments: Mapping[str, Any]
    epochs: float = 1.0
    learning_rate: float = 1.0


class Trial(NamedTuple):
    """A chain of methods and the format it is exported in: one file a rung.

    Attributes:
        steps: in order; none for a mere change of format.
        quantization: of `tfkit.export.convert`.
    """

    steps: tuple[Step, ...]
    quantization: str = "float32"

    @property
    def name(self) -> str:
        """The labels of its steps, and the format where the last step does not imply it."""
        labels = [step.label for step in self.steps]
        implied = bool(labels) and self.quantization in ("float32", "int8-qat")
        return "_".join(labels if implied else [*labels, self.quantization.replace("-", "_")])

    @property
    def summary(self) -> str:
        """The chain in words."""
        chain = ", ".join(f"{step.method}({_words(step.arguments)})" for step in self.steps)
        return f"{chain}; {self.quantization}" if chain else f"{self.quantization} of the model as it was given"

    def stages(self, share: float = 1.0, suffix: str = "") -> list[Stage]:
        """Returns its training stages, each named by what leads to it, so that chains share what they have in common.

        Args:
            share: of the full epochs.
            suffix: of the names.
        """
        made: list[Stage] = []
        parent, labels = BASELINE.stage, []
        for step in self.steps:
            labels.append(step.label)
            name = "_".join(labels) + suffix
            made.append(Stage(name, parent, step.method, step.arguments, step.epochs * share, step.learning_rate))
            parent = name
        return made

    def candidate(self, suffix: str = "") -> Candidate:
        """Returns the file to make of it."""
        stages = self.stages(suffix=suffix)
        return Candidate(
            self.name + suffix, stages[-1].name if stages else BASELINE.stage, self.quantization, self.summary
        )


def check(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Checks chains given by a user.

    Raises:
        ValueError: a method is unknown, a label cannot be part of a name or stands for two things, or two trials are
            the same.
    """
    known: dict[str, Step] = {}
    for trial in trials:
        checks.choice("quantization", trial.quantization, ("float32", "float16", "dynamic", "int8", "int8-qat"))
        for step in trial.steps:
            if not (step.label.isidentifier() and step.label.isascii()):
                raise checks.error("label", "made of letters, digits and underscores", step.label)
            if not hasattr(compression, step.method):
                raise checks.error("method", "the name of a class of tfkit.compression", step.method)
            if known.setdefault(step.label, step) != step:
                raise checks.error(
                    "label", "that of one step only", step.label, "Give the two steps labels of their own."
                )
    names = [trial.name for trial in trials]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise checks.error("chains", "different from each other", ", ".join(twice), "Leave the repeated ones out.")
    if not trials:
        raise checks.error("chains", "at least one chain", trials, "Leave it out for those that fit the model.")
    return tuple(trials)


def space(model: keras.Model, sensitivity: Sensitivity, formats: Sequence[str] | None = None) -> list[Trial]:
    """Returns every chain of structured pruning, low rank, pruning, clustering and quantization that is considered.

    Args:
        model: the float32 model.
        sensitivity: of its layers; zeros and bits are shared out by it, and by the size of the layers beside it.
        formats: of the files; all if None.
    """
    trials = []
    for shape in _shapes():
        for pruning in _prunings(model, sensitivity):
            for ending, quantization in _endings(model, sensitivity):
                steps = (*shape, *pruning, *ending)
                # What was shared out by layer is for the layers as they were before their shapes changed.
                by_layer = any(isinstance(value, Mapping) for step in steps for value in step.arguments.values())
                wanted = formats is None or quantization in formats
                if steps and wanted and not (shape and by_layer):
                    trials.append(Trial(steps, quantization))
    return trials


def _shapes() -> Iterator[tuple[Step, ...]]:
    yield ()
    for macs in (0.7, 0.5):
        yield (Step(f"structured{100 * macs:.0f}", "StructuredPruning", {"macs": macs}),)
    yield (Step("lowrank50", "LowRank", {"budget": 0.5}, 1.0, 0.5),)


def _prunings(model: keras.Model, sensitivity: Sensitivity) -> Iterator[tuple[Step, ...]]:
    yield ()
    for sparsity in SPARSITIES:
        label = f"prune{f'{100 * sparsity:g}'.replace('.', '_')}"
        yield (Step(label, "MagnitudePruning", {"sparsity": sparsity}),)
        shared = sparsity_by_sensitivity(model, sensitivity, sparsity)
        yield (Step(f"{label}s", "MagnitudePruning", {"sparsity": shared}),)


def _endings(model: keras.Model, sensitivity: Sensitivity) -> Iterator[tuple[tuple[Step, ...], str]]:
    yield (), "float32"
    for bits, price in ((4, 0.03), (3, 0.1)):
        arguments = {"bits": bits, "entropy": price, "short_biases": True}
        yield (Step(f"cluster{bits}", "WeightClustering", arguments, 0.5, 0.3),), "float32"
    prices = price_by_sensitivity(model, sensitivity, 0.05)
    shared = {"bits": 4, "entropy": prices, "short_biases": True}
    clustered = Step("cluster4s", "WeightClustering", shared, 0.5, 0.3)
    yield (clustered,), "float32"
    yield (clustered, Step("int8", "QuantizationAware", {}, 0.5, 0.1)), "int8-qat"
    yield (Step("qat8", "QuantizationAware", {}, 0.5, 0.3),), "int8-qat"
    for bits, rate in ((6, 0.3), (5, 0.5), (4, 0.5)):
        yield (Step(f"qat{bits}", "QuantizationAware", {"bits": bits}, 1.0, rate),), "int8-qat"
    for bits in (4, 3, 2):
        narrow = {"weight_bits": bits, "activation_bits": 8}
        yield (Step(f"qnn{bits}", "QuantizedNeuralNetwork", narrow, 1.0, 0.5),), "int8-qat"


class Prediction(NamedTuple):
    """What is expected of a trial before anything is trained; it decides only what is looked at first.

    Attributes:
        packed_bytes: of the file, about.
        latency_ratio: over float32, about.
        loss: by how much the predictions would diverge without training, in nats.
    """

    packed_bytes: float
    latency_ratio: float
    loss: float


class Predictor:
    """Adds up the effects of a trial's steps on each layer, as if none saw the others.

    Args:
        model: the float32 model.
        sensitivity: of its layers.
    """

    def __init__(self, model: keras.Model, sensitivity: Sensitivity) -> None:
        self.model, self.sensitivity = model, sensitivity
        self.kernels = kernels(model)
        self.weights = {name: np.concatenate([v.ravel() for v in values]) for name, values in self.kernels.items()}
        self.layers = {surgery.source(layer).name: surgery.source(layer) for layer in surgery.leaf_layers(model)}
        self.mind = {kind: curvatures(sensitivity, kind) for kind in ("pruned", "quantized")}
        self.rest_bytes = 4.0 * (model.count_params() - sum(value.size for value in self.weights.values()))
        # What goes when the smallest weights do, for every number of them.
        self._gone = {
            name: np.concatenate([[0.0], np.cumsum(np.sort(np.square(value, dtype=np.float64)))])
            for name, value in self.weights.items()
        }
        self._apart: dict[tuple[str, int], float] = {}

    def __call__(self, trial: Trial) -> Prediction:
        """Predicts one trial."""
        kept = dict.fromkeys(self.weights, 1.0)
        bits = dict.fromkeys(self.weights, {"float32": FLOAT_BITS, "float16": 13.0}.get(trial.quantization, INT8_BITS))
        fast = {"float32": 1.0, "float16": 1.0, "dynamic": DYNAMIC_LATENCY}
        factor, latency, loss = 1.0, fast.get(trial.quantization, INT8_LATENCY), 0.0
        for step in trial.steps:
            arguments = step.arguments
            if "sparsity" in arguments:
                sparsity = arguments["sparsity"]
                shared = sparsity_by_layer(self.model, sparsity) if isinstance(sparsity, (int, float)) else sparsity
                for name, gone in self._gone.items():
                    share = float(setting_for(shared, self.layers[name], 0.0))
                    kept[name] = 1.0 - share
                    loss += self.mind["pruned"][name] * float(gone[round(share * (len(gone) - 1))])
            elif {"bits", "weight_bits"} & {*arguments} or step.method == "QuantizationAware":
                for position, name in enumerate(self.weights):
                    asked = arguments.get("bits", arguments.get("weight_bits", 8))
                    if "weight_bits" in arguments and position in (0, len(self.weights) - 1):
                        asked = max(asked, 8)  # As `QuantizedNeuralNetwork` has it by default.
                    width = int(setting_for(asked, self.layers[name], 8))
                    # Entropy-coded values take about a bit less than their index.
                    bits[name] = min(bits[name], width - 1.0)
                    loss += self.mind["quantized"][name] * self._rounding(name, width)
            elif "macs" in arguments:
                gone_share = 1.0 - arguments["macs"]
                factor, latency = factor * (1 - gone_share), latency * (1 - 0.7 * gone_share)
                loss += gone_share / PRUNED_SHARE * sum(row.pruned for row in self.sensitivity.layers)
            elif "budget" in arguments:
                factor *= arguments["budget"]
                loss += sum(row.low_rank for row in self.sensitivity.layers)
        size = sum(
            value.size * (_entropy(kept[name]) + kept[name] * bits[name]) / 8 for name, value in self.weights.items()
        )
        return Prediction(factor * size + self.rest_bytes + 2000, latency, loss)

    def _rounding(self, name: str, width: int) -> float:
        """Returns the squared distance that rounding to so many bits moves a layer's weights."""
        if (name, width) not in self._apart:
            apart = [np.square(value - rounded(value, width), dtype=np.float64) for value in self.kernels[name]]
            self._apart[name, width] = sum(float(np.sum(part)) for part in apart)
        return self._apart[name, width]


def first_rung(
    trials: Sequence[Trial], count: int, predict: Callable[[Trial], Prediction], objective: str
) -> tuple[Trial, ...]:
    """Returns the trials worth a first look: they are predicted to lie along the front, and to gain something.

    Args:
        trials: all that are considered.
        count: how many are wanted.
        predict: a `Predictor`.
        objective: `"size"` or `"latency"`.

    Returns:
        All of them, in their order, if as many are wanted; else at most `count`.
    """
    if count >= len(trials):
        return tuple(trials)
    points = []
    for trial in trials:
        predicted = predict(trial)
        if predicted.loss > HOPELESS_LOSS:
            continue
        cost = predicted.packed_bytes if objective == "size" else predicted.latency_ratio
        points.append(Point(trial.name, -predicted.loss, cost))
    if objective == "size":
        limit = LEAST_GAIN * predict(Trial((), "int8")).packed_bytes
        gaining = [point for point in points if point.cost <= limit]
        points = gaining if len(gaining) >= count else points
    by_name = {trial.name: trial for trial in trials}
    if not points:  # Chains of a user, all of them bold.
        return tuple(trials[:count])
    return tuple(by_name[name] for name in spread(points, count))


def _entropy(share: float) -> float:
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def _words(arguments: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} by layer" if isinstance(value, Mapping) else f"{name}={value!r}" for name, value in arguments.items()
    )
