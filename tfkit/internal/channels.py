"""Which channels of a model belong together, and the same model with some of them gone.

Every layer that makes channels (filters, units, attention heads) gets an id for each. The ids are followed through the
graph: a batch normalization scales them, an addition ties those it adds, a flattening repeats each for every pixel, a
depthwise convolution for every multiplier. Ids that are tied can only go together; ids tied to id 0 must stay: those of
the model's inputs and outputs, and of layers no rule is known for. So a layer that is not understood costs
compression, never a wrong model.

Removing a channel leaves out what its consumers add up from it; the rest of the graph computes what it did. Only
normalizations over the channels (LayerNormalization, RMSNormalization) see the difference: they normalize what is left.

The coupling of layers by the graph is that of Fang, Ma, Song, Mi, Wang. DepGraph: towards any structural pruning. CVPR
2023, https://arxiv.org/abs/2301.12900; here each single channel is a node, not each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tfkit.internal import surgery

Ids = np.ndarray  # Of integers.
Count = Callable[[Ids], int]
STAYS = 0


class Value(NamedTuple):
    """A tensor of the graph.

    Attributes:
        shape: of one example; None where a dimension is not known.
        axis: where its channels lie, counted in `shape`.
        ids: of the channels along that axis; None if all must stay.
    """

    shape: tuple[int | None, ...]
    axis: int = -1
    ids: Ids | None = None


class Slice(NamedTuple):
    """An axis of a weight that runs along channels.

    Attributes:
        layer, variable, axis: where.
        ids: of the channels.
        role: `"kernel"` or `"bias"` where the weight makes the channels, `"scale"` or `"shift"` where it multiplies
            or shifts them one by one, `""` elsewhere.
    """

    layer: keras.Layer
    variable: keras.Variable
    axis: int
    ids: Ids
    role: str


class Block(NamedTuple):
    """The channels one layer makes. `kind`: `"channels"` or `"heads"`."""

    layer: keras.Layer
    kind: str
    ids: Ids


class Group(NamedTuple):
    """Layers whose channels are tied to one another.

    Attributes:
        blocks: the layers' channels, at least one.
        kind: `"channels"` or `"heads"`.
        roots: an id for each set of tied channels that can be removed.
    """

    blocks: tuple[Block, ...]
    kind: str
    roots: Ids


class Cost(NamedTuple):
    """Multiply-adds of one use of a layer: `coefficient` times how many channels of each of `factors` there are."""

    layer: str
    coefficient: int
    factors: tuple[Ids, ...] = ()


class Record(NamedTuple):
    """How to make the smaller copy of a layer: its inputs, and its configuration for a number of channels."""

    layer: keras.Layer
    inputs: tuple[Value, ...]
    config: Mapping[str, Callable[[Count], Any]]


class ChannelGraph:
    """The channels of a model and what ties them.

    Args:
        model: a functional model without nested models; see `flatten`.
        kinds: what may be removed: `"channels"`, `"heads"`.
        selects: whether the channels that a layer makes may be removed.

    Attributes:
        slices: every axis of a weight that runs along channels.
        costs: the multiply-adds.
        blocks: the channels each layer makes.
        root: for each id, the smallest id it is tied to; 0 if it must stay.
    """

    def __init__(
        self,
        model: keras.Model,
        kinds: Sequence[str] = ("channels", "heads"),
        selects: Callable[[keras.Layer], bool] = lambda layer: True,
    ) -> None:
        from tfkit.internal import channel_rules

        self.model = model
        self.kinds = tuple(kinds)
        self.selects = selects
        self.slices: list[Slice] = []
        self.costs: list[Cost] = []
        self.blocks: list[Block] = []
        self.records: dict[int, Record] = {}
        self._slots: dict[tuple[int, int], Ids] = {}
        self._units: dict[tuple[int, str], Ids] = {}
        self._targets: dict[int, Ids] = {}
        self._ties: list[tuple[Ids, Ids]] = []
        self._reasons: list[tuple[Ids, str]] = []
        self._count = 1
        self._trace(channel_rules.apply)
        self.root = _components(self._count, self._ties)

    # What the rules call while the graph is traced.

    def units(self, layer: keras.Layer, count: int, kind: str = "channels") -> Ids:
        """Returns the ids of the channels a layer makes: the same ones each time a shared layer is called."""
        key = (id(layer), kind)
        if key not in self._units:
            self._units[key] = ids = np.arange(self._count, self._count + count)
            self._count += count
            self.blocks.append(Block(layer, kind, ids))
            if kind not in self.kinds:
                self.keep(ids, f"{kind} are not asked for")
            elif not self.selects(layer):
                self.keep(ids, "include and exclude leave it out")
        return self._units[key]

    def tie(self, first: Ids, second: Ids) -> None:
        """These channels go or stay together, one by one; the arrays may broadcast."""
        first, second = np.broadcast_arrays(first, second)
        self._ties.append((first.ravel(), second.ravel()))

    def keep(self, ids: Ids | None, reason: str) -> None:
        """These channels stay."""
        if ids is not None:
            self.tie(ids, np.array(STAYS))
            self._reasons.append((np.ravel(ids), reason))

    def slice(self, layer: Any, variable: Any, axis: int, ids: Ids, role: str = "") -> None:
        """An axis of a weight runs along these channels; None, a weight the layer does not have, is passed over."""
        if variable is None:
            return
        key = (id(variable), axis)
        if key in self._slots:  # A shared layer: what it is called on is tied.
            self.tie(self._slots[key], ids)
            return
        self._slots[key] = ids
        self.slices.append(Slice(layer, variable, axis, ids, role))

    def record(
        self, layer: keras.Layer, inputs: Sequence[Value], config: Mapping[str, Callable[[Count], Any]] | None = None
    ) -> None:
        """The layer's copy is built anew for the channels that are left."""
        self.records.setdefault(id(layer), Record(layer, tuple(inputs), dict(config or {})))

    def target(self, layer: keras.Layer, ids: Ids) -> None:
        """The configuration of a layer without weights holds the number of these channels."""
        known = self._targets.setdefault(id(layer), ids)
        if known is not ids:
            if known.shape == ids.shape:
                self.tie(known, ids)
            else:
                self.keep(known, f"layer '{layer.name}' is called on different shapes")
                self.keep(ids, f"layer '{layer.name}' is called on different shapes")

    def cost(self, layer: Any, coefficient: float, *factors: Ids) -> None:
        if coefficient:
            self.costs.append(Cost(layer.name, int(coefficient), factors))

    # What there is to know afterwards.

    def groups(self) -> list[Group]:
        """Returns the groups of channels that can be removed, in the order of the graph."""
        free = [np.unique(roots[roots != STAYS]) for roots in (self.root[block.ids] for block in self.blocks)]
        owner = np.arange(self._count)
        links = [(np.full(len(roots), roots[0]), roots) for roots in free if len(roots)]
        owner = _components(self._count, links)
        members: dict[int, list[int]] = {}
        for position, roots in enumerate(free):
            if len(roots):
                members.setdefault(int(owner[roots[0]]), []).append(position)
        return [
            Group(
                tuple(self.blocks[p] for p in positions),
                self.blocks[positions[0]].kind,
                np.unique(np.concatenate([free[p] for p in positions])),
            )
            for positions in members.values()
        ]

    def left_alone(self) -> dict[str, str]:
        """Returns the layers whose channels must all stay, with the reason."""
        # Components without the ties to id 0 say which reason reaches which layer.
        loose = [(a[(a != STAYS) & (b != STAYS)], b[(a != STAYS) & (b != STAYS)]) for a, b in self._ties]
        root = _components(self._count, loose)
        left: dict[str, str] = {}
        for block in self.blocks:
            if (self.root[block.ids] == STAYS).all():
                mine = root[block.ids]
                why = next(
                    (why for ids, why in self._reasons if np.isin(root[ids], mine).any()),
                    "tied to channels that must stay",
                )
                label = block.layer.name if block.kind == "channels" else f"{block.layer.name} ({block.kind})"
                left[label] = why
        return left

    def kept(self, removed_roots: Ids) -> np.ndarray:
        """Returns, for each id, whether it is left after these sets of tied channels are removed."""
        keep = ~np.isin(self.root, removed_roots)
        keep[self.root == STAYS] = True
        return keep

    def macs(self, keep: np.ndarray | None = None) -> int:
        """Returns the multiply-adds for one example with the channels of `keep`; with all of them if None."""
        return sum(self.macs_by_layer(keep).values())

    def macs_by_layer(self, keep: np.ndarray | None = None) -> dict[str, int]:
        """Returns the multiply-adds of each layer, its uses added up; see `macs`."""
        found: dict[str, int] = {}
        for cost in self.costs:
            counts = (len(ids) if keep is None else int(keep[ids].sum()) for ids in cost.factors)
            found[cost.layer] = found.get(cost.layer, 0) + cost.coefficient * math.prod(counts)
        return found

    def shrink(self, keep: np.ndarray, wrap: surgery.Replace | None = None) -> keras.Model:
        """Returns a new model in which only the channels of `keep` are left, weights sliced.

        Args:
            keep: for each id, whether it is left.
            wrap: gives the layer to use in place of a (smaller) one, or None for none; plain layers if left out.
        """
        from tfkit.compression.base import copy_wrapped

        wrap = wrap or copy_wrapped

        slices: dict[int, list[Slice]] = {}
        for cut in self.slices:
            slices.setdefault(id(cut.variable), []).append(cut)

        def count(ids: Ids) -> int:
            return int(keep[ids].sum())

        def replace(layer: keras.Layer) -> keras.Layer | None:
            record = self.records.get(id(layer))
            if record is None:
                return wrap(layer)
            settings = {name: make(count) for name, make in record.config.items()}
            smaller = surgery.unbuilt_copy(layer, **settings)
            if layer.weights:
                smaller.build(*(_batched(value, count) for value in record.inputs))
            for old, new in zip(layer.weights, smaller.weights, strict=True):
                array = keras.ops.convert_to_numpy(old)
                for cut in slices.get(id(old), ()):
                    array = np.compress(keep[cut.ids], array, axis=cut.axis)
                new.assign(array)
            return wrap(smaller) or smaller

        return surgery.rebuild(self.model, replace)

    def _trace(self, rule: Callable[[ChannelGraph, Any, list[Value], Any], list[Value]]) -> None:
        values: dict[int, Value] = {}
        for depth in sorted(self.model._nodes_by_depth, reverse=True):
            for node in self.model._nodes_by_depth[depth]:
                inputs = [values.get(id(t), Value(tuple(t.shape[1:]))) for t in node.input_tensors]
                outputs = [] if node.is_input else rule(self, node.operation, inputs, node)
                for tensor, value in zip(node.outputs, outputs, strict=bool(outputs)):
                    values[id(tensor)] = value
        for tensor in self.model.outputs:
            if id(tensor) in values:
                self.keep(values[id(tensor)].ids, "an output of the model")


def flatten(model: keras.Model) -> keras.Model:
    """Returns a model without nested models, for `ChannelGraph`: a copy, or the model itself if it has none."""
    from tfkit.compression.base import copy_wrapped

    view = surgery.as_functional(model)
    if any(surgery.is_graph(layer) for layer in view.layers):
        return surgery.rebuild(model, copy_wrapped, inline=True)
    return view if isinstance(model, keras.Sequential) else model


def macs(model: keras.Model) -> int:
    """Counts multiply-adds for one example: of convolutions, dense and recurrent layers and attention.

    Normalizations, activations and pooling are left out, as is usual; they are few, and mostly folded away. A layer
    that is called twice counts twice. A dimension that the model leaves open (the length of a sequence) counts as 1.

    Args:
        model: a functional or built sequential model; nested models are opened.

    >>> macs(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3)]))
    15552
    """
    return ChannelGraph(flatten(model)).macs()


def _batched(value: Value, count: Count) -> tuple[int | None, ...]:
    shape = list(value.shape)
    if value.ids is not None:
        shape[value.axis] = count(value.ids)
    return (None, *shape)


def _components(count: int, ties: Sequence[tuple[Ids, Ids]]) -> Ids:
    """Returns, for each of `count` nodes, the smallest node it is connected to."""
    root = np.arange(count)
    if not ties:
        return root
    first, second = (np.concatenate(side).astype(np.intp) for side in zip(*ties, strict=True))
    while True:
        a, b = root[first], root[second]
        low = np.minimum(a, b)
        np.minimum.at(root, a, low)
        np.minimum.at(root, b, low)
        while (root[root] != root).any():
            root = root[root]
        if (root[first] == root[second]).all():
            return root
