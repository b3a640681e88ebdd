"""What `tfkit compress` tries: a table of training stages, and a table of files made of them.

A row says everything once: the code that runs and the recipe that a reader is shown come from the same fields.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras

from tfkit import compression
from tfkit.compression.searching.finetuning import Augmentation, describe_function
from tfkit.export.pack import SUFFIX
from tfkit.internal import checks, surgery

#: Weights kept in a layer grow with its size to this power. Fitted to LeNet-5 in table 3 of Deep Compression (Han, Mao,
#: Dally, https://arxiv.org/abs/1510.00149): 66 % of 500, 19 % of 5,000, 12 % of 25,000 and 8 % of 400,000 are kept.
KEPT_POWER = 0.75


class Stage(NamedTuple):
    """A model made by training another one under a compression method.

    Attributes:
        name: of the model it gives.
        parent: the stage it starts from; `"float32"` is the model as it was given.
        method: a class of `tfkit.compression`.
        arguments: of its constructor; `sparsity`, if it is a number, is that of the whole model, see
            `sparsity_by_layer`.
        epochs: in units of the search's `epochs`, at least one.
        learning_rate: in units of the search's `learning_rate`.
    """

    name: str
    parent: str
    method: str
    arguments: Mapping[str, Any]
    epochs: float
    learning_rate: float

    def compressor(self, model: keras.Model) -> compression.Compressor:
        """Returns the method, set for this model."""
        arguments = dict(self.arguments)
        if shares_out(arguments):
            arguments["sparsity"] = sparsity_by_layer(model, arguments["sparsity"])
        made: compression.Compressor = getattr(compression, self.method)(**arguments)
        return made

    def epochs_of(self, epochs: int) -> int:
        """Returns the number of epochs, of a search with this many."""
        return max(1, round(self.epochs * epochs))


class Candidate(NamedTuple):
    """A file to make: the model of a stage, written in one of the formats of `tfkit.export.convert`."""

    name: str
    stage: str
    quantization: str
    summary: str


STAGES: tuple[Stage, ...] = (
    Stage("qat", "float32", "QuantizationAware", {}, 0.5, 0.3),
    # Each pruning goes on from the one before: the paper's pruning and retraining in rounds.
    Stage("pruned_80", "float32", "MagnitudePruning", {"sparsity": 0.8}, 1.0, 1.0),
    Stage("pruned_90", "pruned_80", "MagnitudePruning", {"sparsity": 0.9}, 1.0, 1.0),
    Stage("pruned_96", "pruned_90", "MagnitudePruning", {"sparsity": 0.96}, 1.0, 2.0),
    Stage("clustered_90", "pruned_90", "WeightClustering", {"bits": 5}, 0.5, 0.3),
    Stage("clustered_96", "pruned_96", "WeightClustering", {"bits": 4}, 0.5, 0.5),
    Stage("clustered_90_qat", "clustered_90", "QuantizationAware", {}, 0.5, 0.1),
    Stage("clustered_96_qat", "clustered_96", "QuantizationAware", {}, 0.5, 0.2),
)

BASELINE = Candidate("float32", "float32", "float32", "the model as it was given")
CANDIDATES: tuple[Candidate, ...] = (
    BASELINE,
    Candidate("float16", "float32", "float16", "weights in half precision"),
    Candidate("dynamic_int8", "float32", "dynamic", "int8 weights, float activations"),
    Candidate("int8", "float32", "int8", "int8 weights and activations, calibrated after training"),
    Candidate("int8_qat", "qat", "int8-qat", "int8 weights and activations, trained with their rounding"),
    Candidate("pruned_80_dynamic", "pruned_80", "dynamic", "80 % zeros, int8 weights, float activations"),
    Candidate("pruned_90", "pruned_90", "float32", "90 % zeros"),
    Candidate("pruned_90_int8", "pruned_90", "int8", "90 % zeros, int8 calibrated after training"),
    Candidate("deep_compression", "clustered_90", "float32", "Deep Compression: 90 % zeros, 5-bit shared values"),
    Candidate("deep_compression_96", "clustered_96", "float32", "Deep Compression: 96 % zeros, 4-bit shared values"),
    Candidate("deep_compression_int8", "clustered_90_qat", "int8-qat", "Deep Compression at 90 %, trained on as int8"),
    Candidate(
        "deep_compression_96_int8", "clustered_96_qat", "int8-qat", "Deep Compression at 96 %, trained on as int8"
    ),
)


def shares_out(arguments: Mapping[str, Any]) -> bool:
    """Whether these arguments name a sparsity of the whole model, which is to be shared out over its layers."""
    return isinstance(arguments.get("sparsity"), (int, float))


def select(names: Sequence[str] | None) -> tuple[Candidate, ...]:
    """Returns the candidates of these names in the table's order, the baseline always among them; None for all.

    Raises:
        ValueError: if a name is unknown; the message lists the names.
    """
    known = [item.name for item in CANDIDATES]
    wanted = set(known if names is None else [checks.choice("candidates", name, known) for name in names])
    return tuple(item for item in CANDIDATES if item.name in wanted | {BASELINE.name})


def lineage(name: str, stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """Returns the stages that lead from the given model to a stage, in order; none for `"float32"`."""
    known = {item.name: item for item in stages}
    path: list[Stage] = []
    while name != BASELINE.stage:
        path.insert(0, known[checks.choice("stage", name, list(known))])
        name = path[0].parent
    return path


def sparsity_by_layer(model: keras.Model, sparsity: float) -> dict[str, float]:
    """Shares the zeros of a model out over its layers.

    A layer keeps weights in proportion to its size to the power 0.75, and never more than it has: small layers, where
    zeros save little and cost most, are pruned least.

    Args:
        model: a functional or sequential model.
        sparsity: share of zeros over all the compressible weights, in [0, 1).

    Returns:
        The share of zeros of each layer, by name (as a pattern that matches this name only), as `MagnitudePruning`
        takes it. Layers that stay dense are left out.
    """
    sparsity = checks.number("sparsity", sparsity, 0, 1, open_high=True)
    sizes: dict[str, int] = {}
    for layer in surgery.leaf_layers(model):
        source = surgery.source(layer)
        count = sum(int(variable.shape.num_elements()) for variable in surgery.compressible_weights(source).values())
        if count:
            sizes[source.name] = sizes.get(source.name, 0) + count
    budget = (1.0 - sparsity) * sum(sizes.values())
    kept: dict[str, float] = {}
    # Layers whose part exceeds their size stay dense; what they leave is shared out again over the others.
    while True:
        free = [name for name in sizes if name not in kept]
        left = budget - sum(kept.values())
        unit = left / sum(sizes[name] ** KEPT_POWER for name in free) if free else 0.0
        full = [name for name in free if unit * sizes[name] ** KEPT_POWER >= sizes[name]]
        if not full:
            break
        kept |= {name: float(sizes[name]) for name in full}
    return {glob.escape(name): 1.0 - max(unit, 0.0) * sizes[name] ** KEPT_POWER / sizes[name] for name in free}


def recipe(
    candidate: Candidate,
    stages: Sequence[Stage] = STAGES,
    *,
    data: str,
    seed: int,
    loss: str,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    calibration_samples: int,
    augment: Any = None,
) -> str:
    """Returns the Python program that makes a candidate's file from the given model; to be run in the output folder.

    Args:
        candidate: the candidate.
        stages: those it is made by, among others.
        data: the expression that gives the data set.
        seed, loss, epochs, learning_rate, batch_size, calibration_samples, augment: the settings of the search.
    """
    stages = lineage(candidate.stage, stages)
    drawn = isinstance(augment, Augmentation)
    lines = ["import keras", f"from tfkit import {'compression, ' if stages else ''}data, export"]
    if any(shares_out(item.arguments) for item in stages):
        lines.append("from tfkit.compression.searching.candidates import sparsity_by_layer")
    if stages:
        lines.append(
            f"from tfkit.compression.searching.finetuning import {'Augmentation, ' if drawn else ''}FineTuning"
        )
        if augment is not None and not drawn:
            lines.append(f"augment = ...  # the function that was given: {describe_function(augment)}")
    lines.append("")
    calibrated = candidate.quantization == "int8"
    if stages or calibrated:
        lines.append(f"dataset = {data}")
    lines.append('model = keras.saving.load_model("models/float32.keras")')
    for item in stages:
        arguments = ", ".join(
            f"sparsity_by_layer(model, {value!r})"
            if name == "sparsity" and shares_out(item.arguments)
            else f"{name}={value!r}"
            for name, value in item.arguments.items()
        )
        lines += [
            f"fit = FineTuning(dataset, epochs={item.epochs_of(epochs)}, "
            f"learning_rate={item.learning_rate * learning_rate!r}, batch_size={batch_size}, loss={loss!r}, "
            f"seed={seed}{'' if augment is None else f', augment={augment!r}' if drawn else ', augment=augment'})",
            f"model = compression.{item.method}({arguments}).apply(model, fit)  # {item.name}",
        ]
    path = f'"{candidate.name}.tflite"'
    extra = f", calibration=dataset.x_train, calibration_samples={calibration_samples}, seed={seed}"
    lines += [
        f'export.convert(model, {path}, quantization="{candidate.quantization}"{extra if calibrated else ""})',
        f'export.pack({path}, "{candidate.name}{SUFFIX}")',
    ]
    return "\n".join(lines)
