"""A network made ready for bounds: compiled passes, intermediate bounds in chunks, margins."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.robustness.certification import propagation, reading, windows
from tfkit.robustness.certification.activations import Activation
from tfkit.robustness.certification.builder import Graph
from tfkit.robustness.certification.maximum import Maximum
from tfkit.robustness.certification.nodes import Convolution, Linear
from tfkit.robustness.certification.propagation import Bounds, Row, Setting
from tfkit.robustness.certification.region import Ball, Clip, ball, dual_norm
from tfkit.robustness.certification.rounding import SAFETY, UNIT64, gamma

Tensor = Any
#: Bytes of one array of coefficients; a handful of them live at a time.
CHUNK_BYTES = 48 * 2**20
#: A pass becomes a compiled graph when it has been made so often: more often than one search makes it.
EAGER_USES = 24


class Problem(NamedTuple):
    """Balls whose bounds are sought, and how.

    Attributes:
        x: centres, (examples, *shape), in the precision of the computation.
        epsilon: radii.
        clip: where inputs end.
        setting: see `propagation.Setting`.
    """

    x: np.ndarray
    epsilon: np.ndarray
    clip: Clip
    setting: Setting


class Network:
    """A Keras model read into a graph, with its passes compiled once for each precision.

    Weights are the model's own: train it on, and the bounds follow. So they do for ranges of fake quantization and
    other copies, by `fresh`, which all that takes a network calls. Everything here takes and gives arrays or tensors;
    `bounds` and `certified_radius` are what users call.

    Args:
        source: a Keras model, or a graph that was read from elsewhere.

    Raises:
        UnsupportedLayerError: a layer cannot be bounded.
    """

    def __init__(self, source: keras.Model | Graph) -> None:
        self._model = None if isinstance(source, Graph) else source
        self._use(source if isinstance(source, Graph) else reading.read(source))

    def _use(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._uses: collections.Counter[Any] = collections.Counter()
        self._norms: dict[Any, np.ndarray] = {}
        self._windows: dict[int, windows.Windows | None] = {}
        depends: set[int] = set()  # on an activation
        for position, node in enumerate(self.nodes):
            if not isinstance(node, Linear) and position or any(source in depends for source in node.inputs):
                depends.add(position)
        #: What the activations read, in order, and which of these are affine functions of the input.
        self.targets = sorted({node.inputs[0] for node in self.nodes[1:] if not isinstance(node, Linear)})
        self.affine = {target for target in self.targets if target not in depends and target}
        self.last = len(self.nodes) - 1

    def fresh(self) -> Network:
        """Forgets what was computed from weights, which may have changed since; reads the model anew if it must.

        Raises:
            ValueError: what was copied has changed, and the network was made of a graph, without a model.
        """
        if self.graph.outdated:
            if self._model is None:
                raise ValueError("Ranges have changed since the graph was read. Read the model again.")
            self._use(reading.read(self._model))
        self._norms.clear()
        return self

    @property
    def outputs(self) -> int:
        """Numbers in an output."""
        return self.nodes[-1].size

    def forward(self, x: np.ndarray) -> np.ndarray:
        """The outputs in float64, (examples, outputs)."""
        values = {0: tf.constant(np.asarray(x, np.float64))}
        for position, node in enumerate(self.nodes[1:], 1):
            given = [values[source] for source in node.inputs]
            if isinstance(node, Linear):
                constant = node.constant(tf.float64)
                values[position] = node.apply(given) if constant is None else node.apply(given) + constant
            else:
                assert isinstance(node, (Activation, Maximum))
                values[position] = node.value(given[0])
        return values[self.last].numpy().reshape(len(x), -1)

    def problem(
        self, x: np.ndarray, epsilon: np.ndarray, order: float, clip: Clip, arithmetic: str, dtype: str = "float64"
    ) -> Problem:
        """Puts together what is asked."""
        return Problem(
            np.asarray(x, dtype), np.asarray(epsilon, dtype), clip, Setting(order, clip is not None, arithmetic)
        )

    def compiled(self, key: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function of tensors; when it has been used often, as a graph made once for any batch."""
        flat = [tf.convert_to_tensor(value) for value in tf.nest.flatten(arguments)]
        full = (key, tuple((a.dtype, a.shape.rank if a.dtype.is_integer else tuple(a.shape[1:])) for a in flat))
        self._uses[full] += 1
        if self._uses[full] <= EAGER_USES:  # Making a graph takes as long as many passes.
            return function(*tf.nest.pack_sequence_as(arguments, flat))
        if full not in self._compiled:

            def run(*tensors: Tensor) -> Any:
                return function(*tf.nest.pack_sequence_as(arguments, tensors))

            # A concrete function, since the one of `tf.function` would complain of being made often.
            self._compiled[full] = tf.function(run, autograph=False).get_concrete_function(*map(_open_spec, flat))
        return self._compiled[full](*flat)

    def intermediate(
        self, problem: Problem, *, slopes: str = "adaptive", refine: bool = True, intersect: bool = True
    ) -> tuple[Ball, Bounds]:
        """Bounds of all nodes.

        Args:
            problem: the balls.
            slopes: "adaptive" or "parallel" lower lines.
            refine: whether what activations read is bounded backwards; otherwise by intervals.
            intersect: whether what is bounded backwards keeps its interval where that is better.
        """
        setting, nodes = problem.setting, self.nodes
        region = self.compiled(
            ("ball", problem.clip, setting), lambda x, e: ball(x, e, problem.clip, setting.arithmetic), problem.x,
            problem.epsilon,
        )  # fmt: skip
        bounds = propagation.start(region)
        stops = [target for target in self.targets if target and (refine or target in self.affine)]
        at = 0
        for target in [*dict.fromkeys(stops), self.last]:
            wanted = range(at + 1, target + 1)
            if len(wanted):

                def function(known: Bounds, wanted: range = wanted) -> Bounds:
                    return propagation.advance(nodes, known, wanted, setting, slopes)

                bounds = self.compiled(("advance", at, target, slopes, setting), function, bounds)
            at = max(at, target)
            if target in self.affine:
                bounds = self._affine_range(target, region, bounds, setting)
            elif target != self.last and refine:
                bounds = self._refined(target, region, bounds, setting, slopes == "parallel", intersect)
        return region, bounds

    def _affine_range(self, target: int, region: Ball, bounds: Bounds, setting: Setting) -> Bounds:
        """The exact range over a ball of L1 or L2, where a box around it is too large."""
        if np.isinf(setting.order):
            return bounds
        norms = self._row_norms(target, setting, region.x.dtype)

        def function(region: Ball, bounds: Bounds, norms: Tensor) -> Bounds:
            values, errors = {0: region.x}, {0: region.error}
            for position in range(1, target + 1):
                node = self.nodes[position]
                if not isinstance(node, Linear) or any(source not in values for source in node.inputs):
                    continue
                constant = node.constant(region.x.dtype)
                value = node.apply([values[source] for source in node.inputs])
                values[position] = value if constant is None else value + constant
                errors[position] = bounds.error[position] + node.apply_absolute([errors[s] for s in node.inputs])
            reach = tf.reshape(region.epsilon[:, None] * norms[0], (-1, *self.nodes[target].shape))
            reach += errors[target]
            found = bounds.copy()
            found.low[target] = tf.maximum(bounds.low[target], values[target] - reach)
            found.high[target] = tf.minimum(bounds.high[target], values[target] + reach)
            return found

        return self.compiled(("affine", target, setting), function, region, bounds, norms)

    def _row_norms(self, target: int, setting: Setting, dtype: tf.DType) -> np.ndarray:
        """The dual norm of each number's coefficients on the input, (1, numbers)."""
        key = (target, setting.order, dtype)
        if key in self._norms:
            return self._norms[key]
        count = self.nodes[0].size

        def function(indices: Tensor, zeros: Bounds) -> Tensor:
            coefficients = propagation.begin(self.nodes, zeros, Row(target, indices=indices))[0]
            for position in range(target, 0, -1):
                if position in coefficients:
                    propagation.pass_linear(self.nodes, coefficients, position, coefficients.pop(position))
            return dual_norm(tf.reshape(coefficients[0], (1, -1, count)), setting.order)

        size, zero = self.nodes[target].size, np.zeros((1, self.nodes[target].size), dtype.as_numpy_dtype)
        nothing = Bounds({0: zero}, {}, {target: zero}, {})
        per_chunk = max(1, CHUNK_BYTES // (zero.itemsize * max(node.size for node in self.nodes[: target + 1])))
        found = [
            self.compiled(("norms", target, setting), function, np.arange(at, min(at + per_chunk, size))[None], nothing)
            for at in range(0, size, per_chunk)
        ]
        slack = 1 + SAFETY * gamma(count + 16, UNIT64)
        self._norms[key] = np.concatenate([np.asarray(part) for part in found], 1) * np.asarray(slack, zero.dtype)
        return self._norms[key]

    def _refined(
        self, target: int, region: Ball, bounds: Bounds, setting: Setting, parallel: bool, intersect: bool
    ) -> Bounds:
        """Bounds what an activation reads backwards, where that can matter, in chunks of its numbers."""
        nodes = self.nodes
        low, high = (np.array(side[target]) for side in (bounds.low, bounds.high))
        undecided: np.ndarray = np.zeros(low.shape, bool)
        for node in nodes:
            if isinstance(node, (Activation, Maximum)) and node.inputs == (target,):
                undecided |= np.asarray(node.undecided(low, high))
        undecided = undecided.reshape(len(low), -1)
        counts = undecided.sum(1)
        if not counts.max(initial=0):
            return bounds
        places = self._windows_of(target)
        if places is not None and places.volume * nodes[target].size < counts.max() * self._volume(target):
            return self._refined_by_windows(places, region, bounds, setting, parallel, intersect)
        # Those that matter first; the shorter lists are filled up with others, whose bounds are right too.
        order = np.argsort(~undecided, axis=1, kind="stable")[:, : counts.max()]
        widest = max(node.size for node in nodes[: target + 1])
        per_row = len(low) * widest * low.itemsize * (1 if parallel else 2)
        per_chunk = max(1, CHUNK_BYTES // per_row)
        flat_low, flat_high = low.reshape(len(low), -1), high.reshape(len(high), -1)

        def function(region: Ball, bounds: Bounds, indices: Tensor) -> tuple[Tensor, Tensor]:
            row = Row(target, indices=indices, mirrored=not parallel)
            least, largest = propagation.backward(nodes, bounds, region, row, setting, both=parallel)
            if not parallel:
                least, largest = tf.split(least, 2, 1)
                largest = -largest
            return least, largest

        for start in range(0, order.shape[1], per_chunk):
            indices = order[:, start : start + per_chunk]
            least, largest = self.compiled(("refine", target, parallel, setting), function, region, bounds, indices)
            least, largest = least.numpy(), largest.numpy()
            if intersect:
                least = np.maximum(np.take_along_axis(flat_low, indices, 1), least)
                largest = np.minimum(np.take_along_axis(flat_high, indices, 1), largest)
            np.put_along_axis(flat_low, indices, least, 1)
            np.put_along_axis(flat_high, indices, largest, 1)
        refined = bounds.copy()
        refined.low[target] = tf.constant(low)
        # In float32 the two may cross by rounding.
        refined.high[target] = tf.constant(np.maximum(low, high))
        return refined

    def _windows_of(self, target: int) -> windows.Windows | None:
        if target not in self._windows:
            self._windows[target] = windows.windows_of(self.nodes, target)
        return self._windows[target]

    def _volume(self, target: int) -> int:
        """Coefficients of a row over whole images, of all nodes that it passes."""
        return sum(node.size for node in self.nodes[:target])

    def _refined_by_windows(
        self,
        places: windows.Windows,
        region: Ball,
        bounds: Bounds,
        setting: Setting,
        parallel: bool,
        intersect: bool,
    ) -> Bounds:
        """Bounds all numbers that a convolution gives, in chunks of examples and of rows of places."""
        target = self.nodes[places.target]
        assert isinstance(target, Convolution)
        low, high = (np.array(side[places.target]) for side in (bounds.low, bounds.high))
        height, width, filters = target.shape
        per_place = filters * (1 if parallel else 2) * max(node.size for node in places.nodes) * low.itemsize
        per_row = width * per_place
        rows = int(np.clip(CHUNK_BYTES // per_row, 1, height))
        examples = int(max(1, CHUNK_BYTES // (per_row * rows))) if rows == height else 1

        def function(region: Ball, bounds: Bounds, first: Tensor) -> tuple[Tensor, Tensor]:
            return windows.bounded(places, target, bounds, region, setting, first, rows, parallel)

        needed = {place.position for place in places.places} | {places.target}
        seen = Bounds(*({key: value for key, value in part.items() if key in needed} for part in bounds))
        for at in range(0, len(low), examples):
            part = slice(at, at + examples)
            own = tf.nest.map_structure(lambda value: value[part], (region, seen))  # noqa: B023
            for first in range(0, height, rows):
                start = min(first, height - rows)  # The last chunk is as large as the others.
                key = ("windows", places.target, parallel, setting, rows)
                least, largest = self.compiled(key, function, *own, np.int32(start))
                here = (part, slice(start, start + rows))
                least, largest = least.numpy(), largest.numpy()
                low[here] = np.maximum(low[here], least) if intersect else least
                high[here] = np.minimum(high[here], largest) if intersect else largest
        refined = bounds.copy()
        refined.low[places.target] = tf.constant(low)
        # In float32 the two may cross by rounding.
        refined.high[places.target] = tf.constant(np.maximum(low, high))
        return refined

    def lower(
        self, region: Ball, bounds: Bounds, rows: np.ndarray, setting: Setting, *, stop: bool = False
    ) -> np.ndarray:
        """Lower bounds of linear functions of the output.

        Args:
            rows: coefficients, (examples, rows, outputs).
            stop: by the ranges of the last activations instead of lines.
        """
        shaped = np.asarray(rows, region.x.dtype.as_numpy_dtype).reshape(*rows.shape[:2], *self.nodes[-1].shape)

        def function(region: Ball, bounds: Bounds, rows: Tensor) -> Tensor:
            row = Row(self.last, coefficients=rows)
            return propagation.backward(self.nodes, bounds, region, row, setting, stop=stop)[0]

        return self.compiled(("lower", stop, setting), function, region, bounds, shaped).numpy()


def finite(bounds: Bounds) -> np.ndarray:
    """Whether all that is known of an example is finite; (examples,)."""
    parts = [*bounds.low.values(), *bounds.high.values()]
    return np.all([np.isfinite(np.asarray(part)).reshape(len(part), -1).all(1) for part in parts], axis=0)


def _open_spec(value: Tensor) -> tf.TensorSpec:
    """Batch open; rows open too in what has an integer index or is a list of rows."""
    rank = value.shape.rank
    if rank == 0:
        return tf.TensorSpec((), value.dtype)
    if value.dtype.is_integer:
        return tf.TensorSpec((None,) * rank, value.dtype)
    return tf.TensorSpec((None, *value.shape[1:]), value.dtype)


_KNOWN: weakref.WeakKeyDictionary[keras.Model, Network] = weakref.WeakKeyDictionary()


def as_network(model: Any) -> Network:
    """Returns the network of a model, made once, and fresh."""
    if isinstance(model, Network):
        return model.fresh()
    if not isinstance(model, keras.Model):
        return Network(model)
    if model not in _KNOWN or _KNOWN[model].graph.outdated:
        _KNOWN[model] = Network(reading.read(model))  # Of a graph: a network that holds its model would keep it alive.
    return _KNOWN[model].fresh()
