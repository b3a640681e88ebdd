"""Structured pruning: filters, units and attention heads leave, and the layers really become smaller.

Paper: Li, Kadav, Durdanovic, Samet, Graf. Pruning filters for efficient ConvNets. ICLR 2017,
https://arxiv.org/abs/1608.08710 (importance "l1"). Other importances: Liu, Li, Shen, Huang, Yan, Zhang. Learning
efficient convolutional networks through network slimming. ICCV 2017, https://arxiv.org/abs/1708.06519 ("batch_norm");
Molchanov, Mallya, Tyree, Frosio, Kautz. Importance estimation for neural network pruning. CVPR 2019,
https://arxiv.org/abs/1906.10771 ("taylor"; of heads, nearly that of Michel, Levy, Neubig,
https://arxiv.org/abs/1905.10650). Coupled layers: Fang et al. DepGraph, https://arxiv.org/abs/2301.12900.

Differs: channels tied by the graph (residual additions, depthwise convolutions, flattening …) are judged by the sum
over the layers that make them, where Li et al. let the shortcut decide; the scores of a group of tied layers are
divided by their mean, so that one threshold serves the whole network and a budget of multiply-adds can be met; with
"taylor", gates on weights count only where no batch normalization has one; the network is pruned before training goes
on, not a few channels every so many batches; LayerNormalization normalizes the channels that are left.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import keras
import numpy as np

from tfkit.compression.base import Compressor, Fit, NoEffectWarning, check_examples, setting_for
from tfkit.compression.channel_importance import norm_scores, taylor_scores
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import channels, checks, surgery
from tfkit.internal.channels import ChannelGraph, Group

Importance = Literal["l1", "l2", "taylor", "batch_norm", "random"]
IMPORTANCES = ("l1", "l2", "taylor", "batch_norm", "random")
#: How finely the budget is searched.
STEPS = 1024


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """One group of tied layers: `layers` by name, `kind` of what is removed, and how many there were and are."""

    layers: tuple[str, ...]
    kind: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class StructuredReport:
    """What structured pruning did.

    Attributes:
        groups: the groups of tied channels and heads, in the order of the graph.
        left_alone: the layers whose channels all stayed because they must, with the reason.
        macs_before, macs_after: multiply-adds for one example; see `macs`.
        parameters_before, parameters_after: numbers of weights.
    """

    groups: tuple[GroupRow, ...]
    left_alone: Mapping[str, str]
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        lines = [f"{row.kind:<8} {row.before:>6} -> {row.after:<6} {', '.join(row.layers)}" for row in self.groups]
        lines += [f"{name}: all stay, {why}" for name, why in self.left_alone.items()]
        for name, before, after in (
            ("multiply-adds", self.macs_before, self.macs_after),
            ("parameters", self.parameters_before, self.parameters_after),
        ):
            lines.append(f"{name}: {before:,} -> {after:,} ({after / max(before, 1):.0%})")
        return "\n".join(lines)


@keras.saving.register_keras_serializable(package="tfkit")
class StructuredPruning(Compressor):
    """Removes the least important filters, units and attention heads, and gives smaller layers with sliced weights.

    The result has no masks and needs fine-tuning. Channels that additions, depthwise convolutions and the like tie
    together leave together. The inputs and outputs of the model keep their shapes, and so do the channels that a layer
    without a known rule reads or makes (recurrent layers, embeddings, Lambda, your own): `report` names them. Nested
    models are opened: the result is one flat graph.

    Args:
        sparsity: share of the channels removed, in [0, 1); or a mapping from layer-name patterns to shares (layers
            without a match are left alone, unless they are tied to one with a match).
        macs: share of the multiply-adds to keep, in (0, 1]; it then takes the place of `sparsity`, and the fewest
            channels that meet it are removed.
        importance: `"l1"` or `"l2"`, the norm of a channel's weights; `"batch_norm"`, the size of its gamma (l1 where
            there is no batch normalization); `"taylor"`, the squared change of the loss to first order; `"random"`.
        scope: `"layer"`, the same share of each group of tied layers; `"global"`, one threshold for all, on scores
            divided by their group's mean.
        data: (inputs, targets) for `"taylor"`: a few hundred examples of the training data.
        loss: for `"taylor"`, a Keras loss or its name, or a list or dictionary of them for several outputs.
        granularity: what is removed: `"channels"`, `"heads"`, or both.
        round_to: the number of channels left in each group is a multiple of this, rounded up: 8 suits SIMD kernels.
        min_channels: least number of channels left in a group.
        steps: `apply` prunes in that many steps, and trains after each.
        seed: for random importance.
        include, exclude, preserve: see `Compressor`; they choose whose filters, units and heads may be removed.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.5,
        *,
        macs: float | None = None,
        importance: Importance = "l1",
        scope: Literal["layer", "global"] = "layer",
        data: tuple[Any, Any] | None = None,
        loss: Any = None,
        granularity: Sequence[str] = ("channels", "heads"),
        round_to: int = 1,
        min_channels: int = 1,
        steps: int = 1,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            checks.number("sparsity", share, 0, 1, open_high=True)
        if macs is not None and checks.number("macs", macs, 0, 1) == 0:
            raise checks.error("macs", "more than 0", macs, "Pass the share of multiply-adds to keep.")
        checks.choice("importance", importance, IMPORTANCES)
        checks.choice("scope", scope, ("layer", "global"))
        if scope == "global" and isinstance(sparsity, Mapping) and macs is None:
            raise checks.error("sparsity", "one number with scope='global'", dict(sparsity), "Use scope='layer'.")
        if importance == "taylor" and (data is None or loss is None):
            raise ValueError(
                "Arguments `data` and `loss` must be given with importance='taylor', which follows the gradient. "
                f"Received: data={'None' if data is None else 'given'}, loss={loss!r}. "
                "Pass data=(x, y) from the training data and the loss of the training."
            )
        self.granularity = (granularity,) if isinstance(granularity, str) else tuple(granularity)
        for kind in self.granularity:
            checks.choice("granularity", kind, ("channels", "heads"))
        self.sparsity = sparsity
        self.macs = macs
        self.importance: Importance = importance
        self.scope = scope
        self.data = None if data is None else check_examples(data)
        self.loss = loss
        self.round_to = checks.integer("round_to", round_to, 1)
        self.min_channels = checks.integer("min_channels", min_channels, 1)
        self.steps = checks.integer("steps", steps, 1)
        self.seed = checks.integer("seed", seed, 0)
        self._report: StructuredReport | None = None

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.data is not None:  # A tuple of arrays does not come back from Keras.
            config["data"] = [keras.saving.serialize_keras_object(part) for part in self.data]
        config["loss"] = keras.saving.serialize_keras_object(self.loss)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        config = dict(config)
        if config.get("data") is not None:
            config["data"] = tuple(keras.saving.deserialize_keras_object(part) for part in config["data"])
        if isinstance(config.get("loss"), Mapping):
            config["loss"] = keras.saving.deserialize_keras_object(config["loss"])
        return cls(**config)

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        return []  # The layers themselves become smaller.

    def prepare(self, model: keras.Model) -> keras.Model:
        """Returns a new, smaller model, which needs fine-tuning; see `Compressor.prepare`.

        Whatever `steps` is, this goes to the end in one step.

        Raises:
            ValueError: if `macs` cannot be reached; the message says what can.
        """
        pruned, self._report = self._prune(model, 1.0, {}, None)
        return pruned

    def apply(self, model: keras.Model, fit: Fit | None = None) -> keras.Model:
        """Prunes in `steps` steps, trains after each, and finalizes; see `Compressor.apply`."""
        originals: dict[str, int] = {}
        first: StructuredReport | None = None
        for step in range(1, self.steps + 1):
            pruned, last = self._prune(model, step / self.steps, originals, first)
            first = first or last
            if fit is not None:
                fit(pruned, self.callbacks())
            model = self.finalize(pruned)
        assert first is not None
        self._report = _joined(first, last)
        return model

    def report(self) -> StructuredReport:
        """Returns what the last `prepare` or `apply` did.

        Raises:
            RuntimeError: before either.
        """
        if self._report is None:
            raise RuntimeError("Nothing has been pruned yet. Call `prepare` or `apply` first.")
        return self._report

    def _prune(
        self, model: keras.Model, progress: float, originals: dict[str, int], first: StructuredReport | None
    ) -> tuple[keras.Model, StructuredReport]:
        """Prunes a model on which earlier steps may have worked; `originals` holds its first numbers of channels."""
        self._check_patterns(model)
        flat = channels.flatten(model)
        graph = ChannelGraph(flat, self.granularity, self.selects)
        groups = graph.groups()
        before = first.macs_before if first is not None else graph.macs()
        for group in groups:
            originals.setdefault(_label(group), len(group.roots))
        ranks = [
            self._ranked(graph, group, scores)
            for group, scores in zip(groups, self._scores(graph, groups), strict=True)
        ]
        removed = self._chosen(graph, groups, ranks, [originals[_label(g)] for g in groups], before, progress)
        keep = graph.kept(np.concatenate([np.empty(0, int), *removed]))
        rows = tuple(
            GroupRow(tuple(b.layer.name for b in g.blocks), g.kind, len(g.roots), len(g.roots) - len(gone))
            for g, gone in zip(groups, removed, strict=True)
        )
        changed = any(len(gone) for gone in removed)
        if first is None:
            self._warn_if_unchanged(model, changed=bool(groups))
        if groups and not changed and progress == 1.0 and first is None:
            warnings.warn(
                f"StructuredPruning changed nothing: {self!r} removes no channel of this model.",
                NoEffectWarning,
                stacklevel=3,
            )
        # What earlier steps gave to the weights stays (`preserve`); an unchanged model comes back as a copy.
        pruned = graph.shrink(keep, self._wrap) if changed else surgery.rebuild(model, self._wrap)
        report = StructuredReport(
            rows, graph.left_alone(), graph.macs(), graph.macs(keep), _parameters(flat), _parameters(pruned)
        )
        return pruned, report

    def _scores(self, graph: ChannelGraph, groups: Sequence[Group]) -> list[np.ndarray]:
        """Returns the importance of each root of each group, divided by the group's mean."""
        everywhere = self._importance(graph)
        found = []
        for group in groups:
            scores = everywhere(group)
            mean = scores.mean()
            found.append(scores / mean if mean > 0 else np.ones_like(scores))
        return found

    def _importance(self, graph: ChannelGraph) -> Callable[[Group], np.ndarray]:
        if self.importance == "random":
            rng = np.random.default_rng(self.seed)
            return lambda group: rng.random(len(group.roots)) + 1e-3
        if self.importance == "taylor":
            by_scale, by_kernel = taylor_scores(graph, self.data, self.loss)
        else:
            order = 2 if self.importance == "l2" else 1
            by_scale = norm_scores(graph, "scale", 1) if self.importance == "batch_norm" else np.zeros(len(graph.root))
            by_kernel = norm_scores(graph, "kernel", order)
        scaled = np.zeros(len(graph.root), bool)
        for cut in graph.slices:
            if cut.role == "scale" and isinstance(cut.layer, keras.layers.BatchNormalization):
                scaled[graph.root[cut.ids]] = True

        def of(group: Group) -> np.ndarray:
            if self.importance in ("taylor", "batch_norm") and scaled[group.roots].all():
                return by_scale[group.roots]
            return by_kernel[group.roots]

        return of

    def _ranked(self, graph: ChannelGraph, group: Group, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a group's roots from the least to the most important, and their scores; what must stay comes last."""
        order = np.argsort(scores, kind="stable")
        roots, scores = group.roots[order], scores[order]
        protected = np.zeros(len(roots), bool)
        for block in group.blocks:  # No layer may lose all its channels.
            mine = graph.root[block.ids]
            if (mine != channels.STAYS).all():
                protected[np.flatnonzero(np.isin(roots, mine))[-1]] = True
        last = np.argsort(protected, kind="stable")
        free = int((~protected).sum())
        scores = np.where(np.arange(len(roots)) < free, scores[last], np.inf)
        return roots[last], scores

    def _chosen(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        ranks: Sequence[tuple[np.ndarray, np.ndarray]],
        originals: Sequence[int],
        macs_before: int,
        progress: float,
    ) -> list[np.ndarray]:
        """Returns the roots to remove from each group."""

        def removed(counts: Sequence[int]) -> list[np.ndarray]:
            return [
                roots[: self._allowed(group, scores, count)]
                for group, (roots, scores), count in zip(groups, ranks, counts, strict=True)
            ]

        def at(shares: Sequence[float]) -> list[np.ndarray]:
            """Removes a share of the original channels of each group."""
            if self.scope == "global":
                pool = np.sort(np.concatenate([np.empty(0), *(scores for _, scores in ranks)]))
                gone = sum(originals) - len(pool)
                count = min(max(round(shares[0] * sum(originals)) - gone, 0), len(pool)) if len(pool) else 0
                limit = pool[count - 1] if count else -math.inf
                return removed([int(np.searchsorted(scores, limit, "right")) for _, scores in ranks])
            return removed(
                [
                    round(share * n) - (n - len(g.roots))
                    for share, n, g in zip(shares, originals, groups, strict=True)
                ]
            )  # fmt: skip

        def left(roots: Sequence[np.ndarray]) -> float:
            return graph.macs(graph.kept(np.concatenate([np.empty(0, int), *roots]))) / max(macs_before, 1)

        if not groups:
            return []
        if self.macs is None:
            shares = [1 - (1 - self._share(group)) ** progress for group in groups]
            return at(shares)
        target = self.macs**progress
        low, high = 0, STEPS
        if left(at([1.0] * len(groups))) > target:
            raise checks.error(
                "macs",
                f"at least {left(at([1.0] * len(groups))):.4f} for this model and these settings",
                self.macs,
                "Lower `min_channels`, `round_to` or what `exclude` matches; `report` names what must stay.",
            )
        while low < high:
            middle = (low + high) // 2
            if left(at([middle / STEPS] * len(groups))) <= target:
                high = middle
            else:
                low = middle + 1
        return at([high / STEPS] * len(groups))

    def _share(self, group: Group) -> float:
        shares = [setting_for(self.sparsity, block.layer) for block in group.blocks]
        return min((share for share in shares if share is not None), default=0.0)

    def _allowed(self, group: Group, scores: np.ndarray, count: int) -> int:
        """Returns how many of a group may be removed if `count` should be."""
        total = len(scores)
        heads = group.kind == "heads"
        least = max(1 if heads else self.min_channels, int(np.isinf(scores).sum()))
        kept = max(total - max(count, 0), least)
        if not heads:
            kept = self.round_to * math.ceil(kept / self.round_to)
        return max(total - kept, 0)


def _label(group: Group) -> str:
    """Names a group by its first layer, which keeps its name from step to step."""
    return f"{group.kind}:{group.blocks[0].layer.name}"


def _parameters(model: keras.Model) -> int:
    """Counts weights without what wrappers add."""
    return sum(surgery.source(layer).count_params() for layer in surgery.leaf_layers(model))


def _joined(first: StructuredReport, last: StructuredReport) -> StructuredReport:
    before = {(row.kind, row.layers): row.before for row in first.groups}
    rows = tuple(dataclasses.replace(row, before=before.get((row.kind, row.layers), row.before)) for row in last.groups)
    return dataclasses.replace(
        last, groups=rows, macs_before=first.macs_before, parameters_before=first.parameters_before
    )
