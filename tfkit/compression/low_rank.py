"""Low-rank approximation: a layer becomes a sequence of smaller plain layers that compute nearly the same.

Paper: Denton, Zaremba, Bruna, LeCun, Fergus. Exploiting linear structure within convolutional networks for efficient
evaluation. NIPS 2014, https://arxiv.org/abs/1404.0736 (matrices); spatial: Jaderberg, Vedaldi, Zisserman. BMVC 2014,
https://arxiv.org/abs/1405.3866, scheme 2, in the closed form of Tai et al. ICLR 2016, https://arxiv.org/abs/1511.06067;
channel, with data: Zhang, Zou, He, Sun. Accelerating very deep convolutional networks. 2015,
https://arxiv.org/abs/1505.06798; Tucker-2: Kim et al. ICLR 2016, https://arxiv.org/abs/1511.06530.

Differs: Zhang et al. approximate the outputs after the nonlinearity, and from inputs that the layers before already
distort; here outputs are taken before it, and inputs from the model as given, which has a closed form. Their rank
selection (section 2.4: the largest product of kept energies within a budget, greedily) is solved by one price for cost,
over layers and methods together, for Tucker too, where Kim et al. use variational Bayes. Attention is not factored
projection by projection: its heads become narrower (see `AttentionSplit`), which saves at every rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import keras
import numpy as np

from tfkit.compression.base import Compressor, copy_wrapped, setting_for
from tfkit.compression.clustering import is_clustered
from tfkit.compression.low_rank_factors import allocate
from tfkit.compression.low_rank_layers import splits
from tfkit.compression.low_rank_sites import Site, Split, TappedModel, gram_of, why_not
from tfkit.compression.pruning import is_sparse
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import checks, surgery

METHODS = ("auto", "svd", "spatial", "channel", "tucker2")
COSTS = ("parameters", "multiply_adds")
Rank = int | Sequence[int]


class LowRankRow(NamedTuple):
    """What low rank did with one layer.

    Attributes:
        layer, kind: its name and class.
        method: how it was split; empty if it was left alone.
        ranks: one; for `"tucker2"` those of input and output channels, for attention `key_dim` and `value_dim`.
        parameters_before, parameters_after: numbers of them, biases included.
        multiply_adds_before, multiply_adds_after: for one example; unknown lengths count as 1.
        relative_error: ||X W - X W_r|| / ||X W|| of the layer alone, over the data; without data that of the weight.
            Of attention: the root of the mean square of that of the scores and that of the mixed values.
        note: why it was left alone.
    """

    layer: str
    kind: str
    method: str
    ranks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int
    relative_error: float
    note: str


@keras.saving.register_keras_serializable(package="tfkit")
class LowRank(Compressor):
    """Replaces layers by sequences of smaller ones; train the result to win back what that costs.

    Dense, EinsumDense and Embedding become two layers. A Conv2D becomes k x 1 and 1 x k convolutions (`"spatial"`), a
    k x k one with few filters and a 1x1 one (`"channel"`), or 1x1, k x k and 1x1 (`"tucker2"`). A Conv1D has the
    last two. MultiHeadAttention gets narrower heads. The last of the new layers keeps the name, the bias and the
    activation. Strides, padding and dilation are kept exactly; a kernel's regularizer goes to each factor, its
    constraint is dropped. A layer stays as it is where splitting would not save, and where its kind is not handled.

    Give one of `rank`, `energy` and `budget`. Zeros and shared values of earlier steps do not survive the
    factorisation, which warns then: put this first in a chain.

    Args:
        rank: of every layer; or a mapping from layer-name or class patterns to ranks, where layers without a match are
            left alone. A pair for `"tucker2"` and attention. Ranks above the full one mean the full one.
        energy: share of the squared norm of each layer's weight (with `data`: of its outputs) to keep, in (0, 1]; or a
            mapping as above. The cheapest split that keeps it is taken.
        budget: share of the whole model's cost to keep, in (0, 1). Ranks, and methods for `"auto"`, are chosen for all
            layers together so that the product of the layers' kept shares of energy is large.
        data: inputs of the model, as for `tfkit.export.convert(calibration=...)`; no labels. The error minimised is
            then that of the layers' outputs on them, rather than that of the weights. A few hundred serve.
        method: for convolutions; or a mapping as above (`"auto"` without a match). `"auto"` picks the cheapest that
            keeps the energy, the best within the budget, or of the given ranks the one of least error. Kernels that a
            method does not fit use `"channel"`.
        cost: what `budget` counts, and what a split must lower: `"parameters"` or `"multiply_adds"`.
        ridge: with `data`, how much the weights' own error counts beside that of the outputs, as a share of the
            inputs' mean square; keeps inputs that the data lack from being given up.
        samples: most examples taken from `data`; of an array, a random choice.
        only_if_smaller: leave alone what would not get cheaper. False splits all layers, also at full rank.
        seed: of the choice of examples.
        include, exclude: see `Compressor`.
    """

    def __init__(
        self,
        rank: Rank | Mapping[str, Rank] | None = None,
        *,
        energy: float | Mapping[str, float] | None = None,
        budget: float | None = None,
        data: Any = None,
        method: str | Mapping[str, str] = "auto",
        cost: Literal["parameters", "multiply_adds"] = "parameters",
        ridge: float = 1e-3,
        samples: int = 512,
        only_if_smaller: bool = True,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=False)
        given = [name for name, value in (("rank", rank), ("energy", energy), ("budget", budget)) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"Give exactly one of the arguments `rank`, `energy` and `budget`. Received: {given or 'none'}. "
                "For half the parameters: budget=0.5."
            )
        for value in rank.values() if isinstance(rank, Mapping) else [rank] * (rank is not None):
            for one in value if isinstance(value, Sequence) else [value]:
                checks.integer("rank", one, 1)
            if isinstance(value, Sequence) and len(value) != 2:
                raise checks.error("rank", "a number or a pair", value)
        for share in energy.values() if isinstance(energy, Mapping) else [energy] * (energy is not None):
            if checks.number("energy", share, 0, 1) == 0:
                raise checks.error("energy", "more than 0", share)
        if budget is not None and checks.number("budget", budget, 0, 1, open_high=True) == 0:
            raise checks.error("budget", "more than 0", budget)
        for name in method.values() if isinstance(method, Mapping) else [method]:
            checks.choice("method", name, METHODS)
        self.rank = rank
        self.energy = energy
        self.budget = budget
        self.data = data
        self.method = method
        self.cost = checks.choice("cost", cost, COSTS)
        if checks.number("ridge", ridge, 0) == 0:
            raise checks.error("ridge", "more than 0", ridge, "A small one, such as 1e-6, is as good as none.")
        self.ridge = ridge
        self.samples = checks.integer("samples", samples, 1)
        self.only_if_smaller = only_if_smaller
        self.seed = checks.integer("seed", seed, 0)
        self._rows: list[LowRankRow] = []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowRank:
        return cls(**{**config, "data": keras.saving.deserialize_keras_object(config.get("data"))})

    def __repr__(self) -> str:
        """As of every compressor, with the data's kind in place of the data."""
        data, self.data = self.data, None
        try:
            text = super().__repr__()
        finally:
            self.data = data
        return text if data is None else f"{text[:-1]}, data=<{checks.describe(data)}>)"

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        raise TypeError("LowRank replaces layers; it adds no transforms to their weights.")

    def prepare(self, model: keras.Model) -> keras.Model:
        """Returns a new plain, trainable functional model in which layers are split; compile it before `fit`.

        Raises:
            TypeError: the model cannot be rebuilt.
            ValueError: it holds layers that another compressor has prepared, or its weights are not finite, or the
                budget is out of reach; the message says what to do.
        """
        self._check_patterns(model)
        sites = self._sites(model)
        grams = self._grams(sites) if self.data is not None else {}
        candidates: dict[int, list[Split]] = {}
        rows: dict[int, LowRankRow] = {}
        for key, site in sites.found.items():
            reason = why_not(site.layer) if self.selects(site.layer) else "not selected"
            if not reason and not self.budget and self._setting(site.layer) is None:
                reason = "no pattern matches it"
            rows[key] = self._row(site, reason)
            if not reason:
                method = setting_for(self.method, site.layer, "auto")
                wanted = self._setting(site.layer) if self.rank is not None else ()
                candidates[key] = splits(site, method, grams.get(key), self.ridge, wanted)
        chosen = self._choose(model, sites.found, candidates)

        parts: dict[int, list[keras.layers.Layer]] = {}
        for key, pick in chosen.items():
            site = sites.found[key]
            if pick is None:
                rows[key] = rows[key]._replace(note="no split that keeps enough is smaller")
                continue
            split, option = pick
            ranks = tuple(int(rank) for rank in split.options.ranks[option])
            parts[key], error = split.layers(ranks)
            rows[key] = rows[key]._replace(
                method=split.method,
                ranks=ranks,
                parameters_after=int(split.parameters[option]),
                multiply_adds_after=int(split.multiply_adds[option]),
                relative_error=error,
            )
        _unique_names(model, parts.values())
        self._warn_of_lost_structure([sites.found[key].layer for key in parts])
        prepared = _substitute(model, parts)
        self._rows = list(rows.values())
        self._warn_if_unchanged(model, bool(parts))
        return prepared

    def finalize(self, model: keras.Model) -> keras.Model:
        """Returns a copy: the prepared model is plain already; what others have prepared is theirs to finish."""
        return surgery.rebuild(model, copy_wrapped)

    def report(self) -> list[LowRankRow]:
        """Returns, for the last model prepared, what became of each layer that has weights to compress."""
        return list(self._rows)

    def _setting(self, layer: keras.Layer) -> Any:
        return setting_for(self.rank if self.rank is not None else self.energy, layer)

    def _sites(self, model: keras.Model) -> TappedModel:
        tapped = TappedModel(model)
        for site in tapped.found.values():
            if isinstance(site.layer, Reparameterized):
                if self.selects(site.layer.layer) and not why_not(site.layer.layer):
                    raise ValueError(
                        "Argument `model` must be finalized where LowRank splits it: factors cannot keep what another "
                        f"compressor has prepared. Received: the prepared layer '{site.layer.name}'. Finalize it "
                        "first, as `Chain.apply` does, or name the layer in `exclude`."
                    )
                continue
            for name, variable in surgery.compressible_weights(site.layer).items():
                if not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
                    raise ValueError(
                        f"Argument `model` must have finite weights. Received: NaN or infinity in '{name}' of layer "
                        f"'{site.layer.name}'. Train it again, with a lower learning rate."
                    )
        tapped.found = {k: site for k, site in tapped.found.items() if not isinstance(site.layer, Reparameterized)}
        return tapped

    def _grams(self, tapped: TappedModel) -> dict[int, Any]:
        """Sums the Gram matrices of the inputs of the layers to split over the data."""
        from tfkit.compression.calibration import input_batches

        keys = [
            key
            for key, site in tapped.found.items()
            if self.selects(site.layer)
            and not why_not(site.layer)
            and (self.budget or self._setting(site.layer) is not None)
        ]
        if not keys:
            return {}
        calls = [(key, inputs) for key in keys for inputs in tapped.found[key].inputs]
        taps = keras.Model(tapped.model.inputs, keras.tree.flatten([inputs for _, inputs in calls]))
        sums: dict[int, Any] = {}
        for batch in input_batches(tapped.model, self.data, self.samples, self.seed):
            tensors = iter(keras.tree.flatten(taps(batch, training=False)))
            for key, inputs in calls:
                gram = gram_of(tapped.found[key].layer, [next(tensors) for _ in inputs])
                sums[key] = _add(sums[key], gram) if key in sums else gram
        for key, gram in sums.items():
            if not all(np.isfinite(part).all() for part in keras.tree.flatten(gram)):
                raise ValueError(
                    "Argument `data` must keep every layer's input finite. Received: data for which that of "
                    f"'{tapped.found[key].layer.name}' is not. Check the data and the model for NaN."
                )
        return sums

    def _choose(
        self, model: keras.Model, sites: Mapping[int, Site], candidates: Mapping[int, Sequence[Split]]
    ) -> dict[int, tuple[Split, int] | None]:
        """Returns the split and the option of each layer, None where it stays."""
        chosen: dict[int, tuple[Split, int] | None] = {}
        tables: dict[int, tuple[np.ndarray, np.ndarray, list[tuple[Split, int] | None]]] = {}
        for key, ways in candidates.items():
            before = getattr(sites[key], self.cost)
            costs = np.concatenate([getattr(split, self.cost) for split in ways])
            losses = np.concatenate([split.options.loss for split in ways])
            # Zhang et al., section 2.4: what the network keeps goes like the product of what its layers keep.
            faded = -np.log(np.maximum(1 - losses, 1e-9))
            picks: list[tuple[Split, int] | None] = [(s, i) for s in ways for i in range(len(s.options.loss))]
            usable = costs < before if self.only_if_smaller else np.ones(len(costs), bool)
            if self.budget:
                tables[key] = (
                    np.append(costs[usable], before),
                    np.append(faded[usable], 0.0),
                    [pick for pick, good in zip(picks, usable, strict=True) if good] + [None],
                )
                continue
            setting = self._setting(sites[key].layer)
            if self.energy is not None:
                fits = usable & (losses <= 1 - setting + 1e-12)
                order = np.lexsort((losses, costs))
            else:
                fits = usable & np.concatenate([_has_ranks(split, setting) for split in ways])
                order = np.lexsort((costs, losses))
            best = next((i for i in order if fits[i]), None)
            chosen[key] = None if best is None else picks[best]
        if self.budget and tables:
            chosen.update(self._within_budget(model, sites, tables))
        return chosen

    def _within_budget(
        self, model: keras.Model, sites: Mapping[int, Site], tables: Mapping[int, Any]
    ) -> dict[int, Any]:
        whole = model.count_params()
        if self.cost == "multiply_adds":
            whole = sum(site.multiply_adds for site in sites.values())
        fixed = whole - sum(getattr(sites[key], self.cost) for key in tables)
        costs, losses = [table[0] for table in tables.values()], [table[1] for table in tables.values()]
        least = (fixed + sum(int(cost.min()) for cost in costs)) / whole
        if least > cast(float, self.budget):
            raise ValueError(
                f"Argument `budget` must be within reach: with rank 1 everywhere the model keeps {least:.3f} of its "
                f"{self.cost.replace('_', '-')}, for the layers selected. Received: {self.budget}."
            )
        indices = allocate(costs, losses, cast(float, self.budget) * whole - fixed)
        return {key: table[2][index] for (key, table), index in zip(tables.items(), indices, strict=True)}

    @staticmethod
    def _row(site: Site, note: str) -> LowRankRow:
        size, macs = site.parameters, site.multiply_adds
        return LowRankRow(site.layer.name, type(site.layer).__name__, "", (), size, size, macs, macs, 0.0, note)

    @staticmethod
    def _warn_of_lost_structure(layers: Sequence[keras.Layer]) -> None:
        lost = []
        for layer in layers:
            values = [keras.ops.convert_to_numpy(v) for v in surgery.compressible_weights(layer).values()]
            if any(is_sparse(value) or is_clustered(value) for value in values) or hasattr(
                getattr(layer, "kernel_constraint", None), "holds"
            ):
                lost.append(layer.name)
        if lost:
            warnings.warn(
                f"LowRank ends the zeros, shared values or integers that earlier steps gave to {lost}: its factors are "
                "dense. Put LowRank before pruning, clustering and quantization, or name these layers in `exclude`.",
                UserWarning,
                stacklevel=4,
            )


def _substitute(model: keras.Model, parts: Mapping[int, Sequence[Any]]) -> keras.Model:
    def replace(layer: keras.Layer) -> keras.Layer | None:
        return parts[id(layer)][-1] if id(layer) in parts else copy_wrapped(layer)

    def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        if len(parts.get(id(original), ())) > 1:
            for part in parts[id(original)][:-1]:
                args = (part(args[0]), *args[1:])
        return new(*args, **kwargs)

    return surgery.rebuild(model, replace, call)


def _has_ranks(split: Split, setting: Rank) -> np.ndarray:
    """Marks the option with the ranks that were asked for, or as near below as there is."""
    ranks = split.options.ranks
    if np.ndim(setting) and len(np.atleast_1d(setting)) != ranks.shape[1]:
        raise ValueError(
            f"Argument `rank` must be one number where a layer is split by '{split.method}', which has one rank. "
            f"Received: {setting}."
        )
    wanted = np.broadcast_to(np.asarray(setting), ranks.shape[1:])
    return np.all(ranks == np.clip(wanted, ranks.min(axis=0), ranks.max(axis=0)), axis=1)


def _unique_names(model: keras.Model, parts: Iterable[Sequence[keras.Layer]]) -> None:
    """Renames new layers whose names are taken: a layer may have been split before."""
    taken = {layer.name for layer in surgery.leaf_layers(model)}
    for layers in parts:
        for layer in layers[:-1]:
            base, number = layer.name, 1
            while layer.name in taken:
                number += 1
                layer.name = f"{base}_{number}"
            taken.add(layer.name)


def _add(a: Any, b: Any) -> Any:
    return keras.tree.map_structure(np.add, a, b)
