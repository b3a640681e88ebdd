"""Relaxed quantization: stochastic rounding that is differentiable, grid included.

Paper: Louizos, Reisser, Blankevoort, Gavves, Welling. Relaxed quantization for discretized neural networks. ICLR 2019,
https://arxiv.org/abs/1810.01875.

Weights and activations get logistic noise of learned size; the chance of each grid point is the mass of noise that
rounds to it, and a draw from it is relaxed by the concrete distribution, so that gradients reach the input, the grid's
step and the noise. Without noise, at inference, this is plain rounding.

Differs: the local grid is a fixed number of points on either side, not those within a multiple of the noise, so that
shapes are static. The noise starts at a tenth of a step, not a third, which suits fine-tuning for few epochs. Weights
lie on {-L … L} times the step, L = 2**(bits - 1) - 1, which int8 files hold exactly (the paper's grid has one point
more below zero). The step starts at the one of least squared error, for activations on the first batch; the zero of an
activation's grid follows from that batch's range, and stays. The model's inputs and outputs have 8 bits and no noise.
What a max pooling alone reads is drawn after it; that is the same when rounding, and takes fewer draws. Step and noise
are learned as logarithms. A draw takes exponential variables in place of Gumbel ones, and the gradient is written out:
the same numbers for less time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.base import copy_wrapped
from tfkit.compression.fake_quantize import FakeQuantize, QuantizedGrid, fake_quantize
from tfkit.compression.low_precision import best_unit
from tfkit.compression.masking import is_sparse
from tfkit.compression.quantization_aware import QuantizationAware, Role
from tfkit.compression.quantized_layers import WEIGHTED
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import checks, surgery

#: Rounding before them is rounding after them, of fewer numbers.
POOLINGS = (
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
)
#: Beyond the grid by so many times the noise, nothing of the distribution depends on the input any more.
TAIL = 12.0
#: Less noise than a thousandth of a step is no noise at all; the bound keeps step / noise finite.
LEAST_NOISE = 1e-3
FAST_POWERS: dict[float, Callable[[Any], Any]] = {0.5: tf.sqrt, 1.0: tf.identity, 2.0: tf.square}


def grid_probabilities(x: Any, scale: Any, noise: Any, low: Any, high: Any, neighbours: int = 1) -> tuple[Any, Any]:
    """Returns how likely logistic noise takes `x` to each point of its local grid (equation 5 of the paper).

    Args:
        x: float32 tensor of any shape.
        scale: the grid's step, a scalar; its points are `scale * {low … high}`.
        noise: the scale of the logistic distribution, a scalar; its standard deviation is pi / sqrt(3) of that.
        low, high: the grid's ends, integers.
        neighbours: grid points on either side of `x`.

    Returns:
        (below, probabilities): the integer of the grid point below `x`, of the shape of `x`, and the probabilities of
        the integers `below + 1 - neighbours … below + neighbours`, shape (2 * neighbours, *x.shape).
    """
    below, _, _, _, weights = _local_grid(x, scale, noise, low, high, neighbours)
    stacked = tf.stack(weights)
    return below, stacked / tf.reduce_sum(stacked, axis=0)


def _local_grid(x: Any, scale: Any, noise: Any, low: Any, high: Any, neighbours: int) -> tuple[Any, ...]:
    """Returns the integer below, (x - its point) / noise, whether that is not clipped, and two lists of tensors.

    First the logistic cumulative distribution at the 2 * neighbours + 1 boundaries of the cells, then for each point a
    number in proportion to its probability. The mass of a cell with boundaries a < b is F(b) - F(a), which is
    F(b) (1 - F(a)) times a number that is the same for all cells, as they are of equal width; the product does not
    cancel where the difference does.
    """
    steps = x / scale
    base = tf.clip_by_value(tf.floor(steps), low, high - 1.0)
    ratio = scale / noise
    free = (steps - base) * ratio
    shift = tf.clip_by_value(free, -0.5 * ratio - TAIL, 1.5 * ratio + TAIL)
    boundaries = [(k - 0.5) * ratio for k in range(1 - neighbours, neighbours + 2)]
    cumulative = [tf.sigmoid(boundary - shift) for boundary in boundaries]
    weights = []
    for position, k in enumerate(range(1 - neighbours, neighbours + 1)):
        mass = cumulative[position + 1] * tf.sigmoid(shift - boundaries[position])
        if k not in (0, 1):
            mass = tf.where((base + k >= low) if k < 0 else (base + k <= high), mass, 0.0)
        weights.append(mass)
    return base, shift, tf.equal(free, shift), cumulative, weights


def relaxed_round(
    x: Any, scale: Any, noise: Any, low: Any, high: Any, uniform: Any, temperature: float = 1.0, hard: bool = False
) -> Any:
    """Returns a relaxed draw of a grid point for each element (equations 5 to 7), with gradients to all of x and grid.

    The draw weights each point k by z_k, in proportion to (p_k / e_k)**(1 / temperature), e_k exponential: that is the
    concrete distribution, as -log(e_k) is a Gumbel variable. Between two points only e_0 / e_1 matters, which is
    u / (1 - u) for a uniform u: one number does.

    Args:
        x, scale, noise, low, high: see `grid_probabilities`.
        uniform: uniform numbers in [0, 1), shape (2 * neighbours, *x.shape), or (1, *x.shape) for one neighbour.
        temperature: of the concrete distribution; towards 0 the draw becomes one grid point.
        hard: give the likeliest point of the draw itself, a sample of the categorical distribution, with the gradient
            of the relaxed one: the straight-through variant, RQ ST.

    Returns:
        A tensor of the shape of `x`.
    """
    draws = uniform.shape[0]
    numbers = [tf.cast(number, tf.float32) for number in (scale, noise, low, high)]
    drawn = _drawer(draws, float(temperature), hard)(tf.reshape(x, [-1]), *numbers, tf.reshape(uniform, [draws, -1]))
    return tf.reshape(drawn, tf.shape(x))


@functools.cache
def _drawer(draws: int, temperature: float, hard: bool) -> Any:
    """Returns `relaxed_round` for flat tensors: a graph of a hundred operations, traced once for all tensors."""
    neighbours = max(1, draws // 2)
    offsets = [float(k) for k in range(1 - neighbours, neighbours + 1)]

    def draw(x: Any, scale: Any, noise: Any, low: Any, high: Any, uniform: Any) -> Any:
        base, shift, free, cumulative, weights = _local_grid(x, scale, noise, low, high, neighbours)
        ratio = scale / noise
        # 24 bits of a uniform number may all be zero, and neither quotient nor logarithm may be infinite.
        uniform = tf.clip_by_value(uniform, 2.0**-24, 1.0 - 2.0**-24)
        if draws == 1:
            race = [weights[0], weights[1] * (uniform[0] / (1.0 - uniform[0]))]
        else:
            exponential = tf.unstack(-tf.math.log(uniform))
            race = [weight / number for weight, number in zip(weights, exponential, strict=True)]
        powers = _power(race, 1.0 / temperature)
        total = tf.add_n(powers)
        mean = tf.add_n([k * power for k, power in zip(offsets, powers, strict=True) if k]) / total
        # With A_k = dm / dlog(p_k) = z_k (k - m) / temperature, whose sum is 0, and d log(p_k) from the logistic.
        change = [power * (k - mean) for k, power in zip(offsets, powers, strict=True)]
        along_shift, along_ratio = [], []
        for position, k in enumerate(offsets):
            below, above = cumulative[position], cumulative[position + 1]
            along_shift.append(change[position] * (below + above))
            along_ratio.append(change[position] * (k - (k + 0.5) * above - (k - 0.5) * below))
        divisor = temperature * total
        by_shift = tf.where(free, tf.add_n(along_shift) / divisor, 0.0)
        by_ratio = tf.add_n(along_ratio) / divisor
        moved = base + (_likeliest(race, offsets) if hard else mean)

        def gradient(upstream: Any) -> tuple[Any, ...]:
            # y = scale (base + m(shift, ratio)), shift = (x - scale base) / noise, ratio = scale / noise.
            by_scale = moved + ratio * (by_ratio - by_shift * base)
            by_noise = -ratio * (by_shift * shift + by_ratio * ratio)
            return (
                upstream * ratio * by_shift,
                tf.reduce_sum(upstream * by_scale),
                tf.reduce_sum(upstream * by_noise),
                None,
                None,
                None,
            )

        return scale * moved, gradient

    def bounded(x: Any, scale: Any, noise: Any, low: Any, high: Any, uniform: Any) -> Any:
        return tf.custom_gradient(draw)(x, scale, tf.maximum(noise, LEAST_NOISE * scale), low, high, uniform)

    vector, scalar = tf.TensorSpec([None]), tf.TensorSpec([])
    signature = [vector, scalar, scalar, scalar, scalar, tf.TensorSpec([draws, None])]
    return tf.function(bounded, input_signature=signature, autograph=False)


def _power(numbers: Sequence[Any], exponent: float) -> Sequence[Any]:
    """Returns numbers in proportion to numbers**exponent."""
    if exponent in FAST_POWERS:  # Of the numbers here, from 0.01 to 1e8 for the largest, none of these overflows.
        return [FAST_POWERS[exponent](number) for number in numbers]
    largest = numbers[0]
    for number in numbers[1:]:
        largest = tf.maximum(largest, number)
    return [tf.pow(number / largest, exponent) for number in numbers]


def _likeliest(race: Sequence[Any], offsets: Sequence[float]) -> Any:
    best, chosen = race[0], tf.fill(tf.shape(race[0]), offsets[0])
    for number, offset in zip(race[1:], offsets[1:], strict=True):
        chosen = tf.where(number > best, offset, chosen)
        best = tf.maximum(best, number)
    return chosen


class _Sampler:
    """What weights and activations share: the learned step and noise, and the draws on the grid."""

    bits: int
    temperature: float
    straight_through: bool
    neighbours: int
    noise: float
    grid: Any
    seed_generator: Any

    def _check(self) -> None:
        checks.integer("bits", self.bits, 1, 8)
        checks.integer("neighbours", self.neighbours, 1)
        for name in ("temperature", "noise"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise checks.error(name, "positive and finite", value)

    def _draw(self, x: Any, low: Any, high: Any) -> Any:
        shape = keras.ops.shape(x)
        draws = 1 if self.neighbours == 1 else 2 * self.neighbours
        uniform = keras.random.uniform((draws, *shape), seed=self.seed_generator, dtype="float32")
        step, noise = keras.ops.unstack(keras.ops.exp(self.grid))
        return relaxed_round(x, step, noise, low, high, uniform, self.temperature, self.straight_through)

    def _step(self) -> Any:
        return keras.ops.exp(self.grid)[0]

    def _sampler_config(self) -> dict[str, Any]:
        names = ("bits", "temperature", "straight_through", "neighbours", "noise", "seed")
        return {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable(package="tfkit")
class RelaxedQuantizeWeight(_Sampler, WeightTransform):
    """Draws each weight from the points of `scale * {-L … L}` near it while training; rounds it at inference.

    Args:
        bits: width of the integers, from 2; L = 2**(bits - 1) - 1.
        temperature, straight_through, neighbours, noise: see `RelaxedQuantization`.
        depthwise: whether the kernel is depthwise, (…, channels, multiplier).
        keep_zeros: leave weights of exactly zero out of the draws.
        seed: of the draws.
    """

    def __init__(
        self,
        bits: int = 8,
        temperature: float = 1.0,
        straight_through: bool = False,
        neighbours: int = 1,
        noise: float = 0.1,
        depthwise: bool = False,
        keep_zeros: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bits = bits
        self.temperature = temperature
        self.straight_through = straight_through
        self.neighbours = neighbours
        self.noise = noise
        self.depthwise = depthwise
        self.keep_zeros = keep_zeros
        self.seed = checks.integer("seed", seed, 0)
        self._check()
        checks.integer("bits", bits, 2, 8)
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def limit(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def build(self, input_shape: Any) -> None:
        #: Logarithms of step and noise. They are one variable, for every variable costs the optimizer a step.
        self.grid = self.add_weight(name="grid", shape=(2,), initializer="zeros")

    def adapt(self, value: np.ndarray) -> None:
        scale = float(best_unit(value.reshape(-1, 1), self.bits)[0]) / self.limit
        self.grid.assign(np.log([scale, self.noise * scale]))

    def transform(self, weight: Any) -> Any:
        # Called as a layer, for then Keras says whether the model is being trained.
        return self(weight)

    def call(self, weight: Any, training: bool = False) -> Any:
        weight = keras.ops.convert_to_tensor(weight, dtype="float32")
        if training:
            drawn = self._draw(weight, -float(self.limit), float(self.limit))
            return keras.ops.where(weight == 0.0, 0.0, drawn) if self.keep_zeros else drawn
        step = self._step()
        return keras.ops.clip(keras.ops.round(weight / step), -self.limit, self.limit) * step

    def constraint(self, weight: np.ndarray) -> QuantizedGrid:
        return QuantizedGrid(keras.ops.convert_to_numpy(self._step()), self.bits, self.depthwise)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **self._sampler_config(),
            "depthwise": self.depthwise,
            "keep_zeros": self.keep_zeros,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class RelaxedQuantizeActivation(_Sampler, keras.layers.Layer):
    """Draws each activation from the grid points near it while training; rounds it at inference.

    The grid has `2**bits` points. The first training batch fixes where zero lies among them (at the bottom, if nothing
    is negative), and gives the first step, the one of least squared error. Until then, inference passes its input
    through.

    Args:
        bits: width of the integers.
        temperature, straight_through, neighbours, noise: see `RelaxedQuantization`.
        seed: of the draws.

    Call: any float tensor in, a tensor of the same shape out. With `update=False` the input is only rounded to the
    layer's grid: for a second tensor that must lie on it.
    """

    def __init__(
        self,
        bits: int = 8,
        temperature: float = 1.0,
        straight_through: bool = False,
        neighbours: int = 1,
        noise: float = 0.1,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bits = bits
        self.temperature = temperature
        self.straight_through = straight_through
        self.neighbours = neighbours
        self.noise = noise
        self.seed = checks.integer("seed", seed, 0)
        self._check()
        self.supports_masking = True
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    def build(self, input_shape: Any) -> None:
        options: dict[str, Any] = {"initializer": "zeros", "autocast": False}
        self.grid = self.add_weight(name="grid", shape=(2,), **options)  # Logarithms of step and noise.
        self.zero_point = self.add_weight(name="zero_point", shape=(), trainable=False, **options)
        self.steps = self.add_weight(name="steps", shape=(), trainable=False, **options)

    def call(self, inputs: Any, training: bool = False, update: bool = True) -> Any:
        x = keras.ops.cast(inputs, "float32")
        if not training:
            outputs = keras.ops.cond(self.steps > 0, lambda: self._rounded(x), lambda: x)
        elif not update:
            outputs = self._rounded(x)
        else:
            self._start(x)
            outputs = self._draw(x, -self.zero_point, self.levels - self.zero_point)
        return keras.ops.cast(outputs, inputs.dtype)

    def freeze(self) -> FakeQuantize:
        """Returns the plain rounding that this layer has become.

        Raises:
            ValueError: if the layer has seen no data.
        """
        if not self.built or float(self.steps) == 0:
            raise ValueError(
                f"Quantizer '{self.name}' has seen no data, so its range is unknown. "
                "Train the prepared model for at least one step before `finalize`."
            )
        low, high = self._range()
        return FakeQuantize(self.bits, minimum=float(low), maximum=float(high), name=self.name)

    def _range(self) -> tuple[Any, Any]:
        step = self._step()
        return -self.zero_point * step, (self.levels - self.zero_point) * step

    def _rounded(self, x: Any) -> Any:
        return fake_quantize(x, *self._range(), self.bits)

    def _start(self, x: Any) -> None:
        """Sets the grid on the first batch; leaves it to the optimizer afterwards."""

        def first() -> tuple[Any, Any]:
            step, zero_point = first_grid(x, self.levels)
            return keras.ops.log(keras.ops.stack([step, self.noise * step])), zero_point

        def later() -> tuple[Any, Any]:
            return keras.ops.convert_to_tensor(self.grid), keras.ops.convert_to_tensor(self.zero_point)

        grid, zero_point = keras.ops.cond(self.steps > 0, later, first)
        self.grid.assign(grid)
        self.zero_point.assign(zero_point)
        self.steps.assign(self.steps + 1.0)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._sampler_config()}


def first_grid(x: Any, levels: int) -> tuple[Any, Any]:
    """Returns the step of least squared error among 19 shares of the range, and the integer that zero has.

    Args:
        x: float32 tensor. The error is that of 16,384 of its elements, drawn at random.
        levels: number of steps of the grid.

    Returns:
        Two scalars. A tensor of zeros gets the step of a range of 1.
    """
    low, high = tf.minimum(tf.reduce_min(x), 0.0), tf.maximum(tf.reduce_max(x), 0.0)
    span = tf.where(high > low, high - low, 1.0)
    zero_point = tf.round(-low / span * levels)
    flat = tf.reshape(x, [-1])
    drawn = tf.gather(flat, tf.random.stateless_uniform([16384], [0, 0], 0, tf.size(flat), tf.int32))
    steps = span / levels * tf.linspace(1.0, 0.1, 19)
    rounded = tf.clip_by_value(tf.round(drawn / steps[:, None]), -zero_point, levels - zero_point) * steps[:, None]
    error = tf.reduce_mean(tf.square(rounded - drawn), axis=1)
    return steps[tf.argmin(error)], zero_point


@keras.saving.register_keras_serializable(package="tfkit")
class RelaxedQuantization(QuantizationAware):
    """Prepares a model whose weights and activations are drawn from their grids while it trains.

    Every kernel and every activation between the model's inputs and outputs has a step and a noise of its own, which
    the optimizer trains with the weights: start from a trained float model. Biases stay as they are. `finalize` rounds,
    and gives the model that an int8 file computes; export it with `quantization="int8-qat"`. See `QuantizationAware`
    for the layers that are quantized.

    Args:
        bits: width of the weights' integers, 2 to 8; a kernel has one step. 2 bits are {-1, 0, 1}.
        activation_bits: width of the activations, 1 to 8.
        temperature: of the concrete distribution. Low: draws are nearly grid points, and gradients vary much.
        straight_through: draw grid points themselves, with the gradient of the relaxed draw (the paper's RQ ST).
        neighbours: grid points on either side of a number that a draw may give. Time grows with them; noise of more
            than a fifth of a step needs 2.
        noise: the logistic distribution's scale at the start, in steps. The paper's 1 / 3 needs long training.
        momentum: of the moving average of the inputs' and outputs' ranges.
        seed: of the draws; each tensor has its own stream.
        include, exclude, preserve: see `Compressor`; a layer left out is computed in float.
    """

    def __init__(
        self,
        *,
        bits: int = 8,
        activation_bits: int = 8,
        temperature: float = 1.0,
        straight_through: bool = False,
        neighbours: int = 1,
        noise: float = 0.1,
        momentum: float = 0.99,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(
            bits=bits,
            activation_bits=activation_bits,
            momentum=momentum,
            include=include,
            exclude=exclude,
            preserve=preserve,
        )
        self.temperature = temperature
        self.straight_through = straight_through
        self.neighbours = neighbours
        self.noise = noise
        self.seed = checks.integer("seed", seed, 0)
        RelaxedQuantizeActivation(**self._options())  # Checks the arguments.
        self._numbers: Iterator[int] = itertools.count()

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "straight_through": self.straight_through,
            "neighbours": self.neighbours,
            "noise": self.noise,
        }

    def _next_seed(self) -> int:
        return int(np.random.SeedSequence([self.seed, next(self._numbers)]).generate_state(1)[0] >> 1)

    def prepare(self, model: keras.Model) -> keras.Model:
        self._numbers = itertools.count()
        return _swap_neighbours(super().prepare(model), RelaxedQuantizeActivation, POOLINGS)

    def finalize(self, model: keras.Model) -> keras.Model:
        return super().finalize(_swap_neighbours(model, POOLINGS, RelaxedQuantizeActivation))

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        if not isinstance(layer, WEIGHTED):
            return []
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        keep_zeros = self.preserve and is_sparse(value)
        return [
            RelaxedQuantizeWeight(
                self.bits, depthwise=depthwise, keep_zeros=keep_zeros, seed=self._next_seed(), **self._options()
            )
        ]

    def quantizer(self, name: str, role: Role) -> keras.Layer:
        if role != "hidden":
            return FakeQuantize(8, self.momentum, name=name)
        return RelaxedQuantizeActivation(self.activation_bits, seed=self._next_seed(), name=name, **self._options())


def _swap_neighbours(model: keras.Model, first: Any, second: Any) -> keras.Model:
    """Returns a copy in which each layer of class `first` comes after the one of class `second` that alone reads it."""
    consumers = surgery.sole_consumers(model)
    layers = {id(layer): layer for layer in surgery.leaf_layers(model)}
    pairs = {
        id(reader): layers[name]
        for name, reader in consumers.items()
        if isinstance(layers.get(name), first) and isinstance(reader, second)
    }
    early = {id(layer) for layer in pairs.values()}
    waiting: dict[int, keras.Layer] = {}

    def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        if id(original) in early:
            waiting[id(original)] = new
            return args[0]
        outputs = new(*args, **kwargs)
        return waiting[id(pairs[id(original)])](outputs) if id(original) in pairs else outputs

    return surgery.rebuild(model, copy_wrapped, call) if pairs else model
