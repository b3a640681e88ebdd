"""What Keras 3.15 gets wrong under a strategy with several replicas, put right in one place.

`enable` replaces five functions of Keras; with one replica each of them calls the original.

- `TensorFlowTrainer._maybe_symbolic_build` reduced a batch of several workers, which fails: a replica's part will do.
- `reduce_per_replica` reduced scalars along an axis that they do not have.
- `TensorFlowTrainer._make_function` failed with several steps in an execution; here the steps run one after another.
- `scale_loss_for_distribution`, and its inverse, divided a mean over a replica's examples by the number of replicas,
  which is right only if all parts have one size, and missing in a `train_step` that computes its own loss. In a step,
  losses now stay means over the replica's examples.
- `TFOptimizer._backend_apply_gradients` clipped each replica's gradient before the sum, and failed to accumulate. Now
  gradients are first averaged over the examples of all replicas, then accumulated, clipped and applied. So a step is
  that of one process on the whole batch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import optimizer as keras_optimizer
from keras.src.backend.tensorflow import trainer as keras_trainer
from keras.src.losses import loss as keras_loss

#: The minor versions of Keras whose internals this file was written for and tested with.
SUPPORTED = ("3.15",)

_originals: dict[str, Any] = {}


class _Step(threading.local):
    """What the functions below know of the step that is being traced; each replica is traced in its own thread."""

    examples: Any = None
    accumulate: bool = False


_step = _Step()


def enable() -> None:
    """Makes `keras.Model.fit` right under `tf.distribute` strategies, for this process; a second call does nothing.

    Raises:
        RuntimeError: the installed Keras is of a version that this was not tested with.
    """
    if _originals:
        return
    version = ".".join(keras.__version__.split(".")[:2])
    if version not in SUPPORTED:
        raise RuntimeError(
            f"Distributed training mends Keras {', '.join(SUPPORTED)}, and Keras {keras.__version__} is installed. "
            f'Install one of them: pip install "keras=={SUPPORTED[-1]}.*".'
        )
    trainer, optimizer = keras_trainer.TensorFlowTrainer, keras_optimizer.TFOptimizer
    _replace(trainer, "_maybe_symbolic_build", _symbolic_build)
    _replace(trainer, "_make_function", _make_function)
    _replace(optimizer, "_backend_apply_gradients", _apply_gradients)
    _replace(keras_trainer, "reduce_per_replica", _reduce_per_replica)
    _replace(keras_loss, "scale_loss_for_distribution", _scale_loss)
    _replace(keras_loss, "unscale_loss_for_distribution", _unscale_loss)


def _replace(owner: Any, name: str, new: Callable[..., Any]) -> None:
    _originals[name] = getattr(owner, name)
    setattr(owner, name, functools.wraps(_originals[name])(new))


@contextlib.contextmanager
def example_weighted(examples: Any, accumulate: bool = False) -> Iterator[None]:
    """Within it, losses are means over this replica's examples, and optimizers weigh its gradients by their number.

    Args:
        examples: the number of this replica's examples, a scalar tensor.
        accumulate: whether optimizers with `gradient_accumulation_steps` only add to what they have.
    """
    before = (_step.examples, _step.accumulate)
    _step.examples, _step.accumulate = examples, accumulate
    try:
        yield
    finally:
        _step.examples, _step.accumulate = before


def mean_over_examples(gradients: list[Any], examples: Any) -> list[Any]:
    """Returns the gradients of the mean over the examples of all replicas; the same on each of them.

    Args:
        gradients: of the mean over this replica's examples.
        examples: their number; a replica without any counts for nothing, even if its gradients are not numbers.
    """
    context = tf.distribute.get_replica_context()
    own = tf.cast(examples, tf.float32)
    weighted = [tf.math.multiply_no_nan(tf.convert_to_tensor(each), tf.cast(own, each.dtype)) for each in gradients]
    *summed, total = context.all_reduce(tf.distribute.ReduceOp.SUM, [*weighted, own])
    return [each / tf.cast(total, each.dtype) for each in summed]


def _replicas(strategy: Any) -> int:
    return strategy.num_replicas_in_sync if strategy is not None else 1


def _scale_loss(value: Any) -> Any:
    return value if _step.examples is not None else _originals["scale_loss_for_distribution"](value)


def _unscale_loss(value: Any) -> Any:
    if _step.examples is None:
        return _originals["unscale_loss_for_distribution"](value)
    # Keras calls this for its trackers. The mean over no examples is not a number, and has no weight.
    return tf.where(_step.examples > 0, value, tf.zeros_like(value))


def _first_part(strategy: Any) -> Callable[[Any], Any]:
    return lambda part: strategy.experimental_local_results(part)[0]


def _symbolic_build(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
    if _replicas(self._distribute_strategy) == 1:
        _originals["_maybe_symbolic_build"](self, iterator=iterator, data_batch=data_batch)
        return
    parts = (self._compile_metrics, self._compile_loss, self.optimizer)
    if all(part is None or part.built for part in parts) and all(layer.built for layer in self._flatten_layers()):
        return  # `evaluate` within `fit` asks each time, with an iterator that is at its end.
    first_part = _first_part(self.distribute_strategy)
    if iterator is not None:
        for _, _, batches in iterator:
            data_batch = tf.nest.map_structure(first_part, next(batches))
            break
    with self.distribute_strategy.scope():
        self._symbolic_build(data_batch=data_batch)
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)


def _reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
    if (
        reduction in ("auto", "mean")
        and _replicas(strategy) > 1
        and not isinstance(strategy, tf.distribute.TPUStrategy)
    ):
        return tf.nest.map_structure(lambda value: strategy.reduce("MEAN", value, axis=None), values)
    return _originals["reduce_per_replica"](values, strategy, reduction)


def _make_function(self: Any, step_function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    strategy = self.distribute_strategy
    if _replicas(strategy) == 1:
        return _originals["_make_function"](self, step_function)
    check(self)
    training = step_function == self.train_step

    def make(accumulate: bool) -> Callable[[Any], Any]:
        def on_replica(data: Any) -> Any:
            data = tf.nest.map_structure(
                lambda part: None if isinstance(part, tf.experimental.Optional) else part, data
            )
            first = next(part for part in tf.nest.flatten(data) if part is not None)
            with example_weighted(tf.shape(first)[0], accumulate):
                return step_function(data)

        @tf.autograph.experimental.do_not_convert
        def one_step(data: Any) -> Any:
            outputs = strategy.run(on_replica, args=(data,))
            return keras_trainer.reduce_per_replica(outputs, strategy, reduction="auto")

        return one_step if self.run_eagerly else tf.function(one_step, reduce_retracing=True)

    steps = {accumulate: make(accumulate) for accumulate in (False, True)}
    every = (self.optimizer.gradient_accumulation_steps or 1) if training and self.optimizer is not None else 1

    def function(iterator: Any) -> Any:
        outputs = None
        for _ in range(self.steps_per_execution):
            try:
                data = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if outputs is None:
                    raise StopIteration from None
                break
            # The host counts, so that a graph has no branch with a sum over replicas in it.
            last = every == 1 or (int(self.optimizer._iterations.numpy()) + 1) % every == 0
            outputs = steps[not last](data)
        return outputs

    return function


def _apply_gradients(self: Any, gradients: list[Any], variables: list[Any]) -> None:
    context = tf.distribute.get_replica_context()
    if _step.examples is None or context is None or context.num_replicas_in_sync == 1:
        _originals["_backend_apply_gradients"](self, gradients, variables)
        return
    strategy = self._distribution_strategy
    if strategy is not context.strategy:
        raise ValueError("The optimizer must be made inside `strategy.scope()`, as the model is: make both there.")
    gradients = mean_over_examples(list(gradients), _step.examples)
    merge = tf.__internal__.distribute.interim.maybe_merge_call
    if self.gradient_accumulation_steps:
        kept = [self._accumulated_gradients[self._get_variable_index(each)].value for each in variables]
        gradients = [gradient + old for gradient, old in zip(gradients, kept, strict=True)]
        if _step.accumulate:
            merge(_assign, strategy, kept, gradients)
            return
        merge(_assign, strategy, kept, [tf.zeros_like(gradient) for gradient in gradients])
        gradients = [gradient / self.gradient_accumulation_steps for gradient in gradients]
    gradients = self._clip_gradients(gradients)
    self._apply_weight_decay(variables)
    pairs = [(gradient, each.value) for gradient, each in zip(gradients, variables, strict=True)]
    merge(self._distributed_tf_update_step, strategy, pairs, self.learning_rate)


def _assign(strategy: Any, variables: list[Any], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        strategy.extended.update(variable, lambda each, new: each.assign(new), args=(value,), group=False)


def assign_all(variables: list[Any], values: list[Any]) -> None:
    """Assigns in a step, under any strategy, values that are the same on all replicas.

    Args:
        variables: `tf.Variable`s, such as `.value` of Keras' own.
        values: their new values.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return
    tf.__internal__.distribute.interim.maybe_merge_call(_assign, context.strategy, variables, values)


def check(model: keras.Model) -> None:
    """Refuses what cannot be made right under several replicas.

    Raises:
        ValueError: naming what is refused and what to do instead.
    """
    if model.jit_compile:
        raise ValueError("`jit_compile=True` does not compile sums over replicas. Compile with jit_compile=False.")
    optimizer = model.optimizer
    if optimizer is None:
        return
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "A LossScaleOptimizer branches on finite gradients, which several replicas cannot do together. "
            "Use the dtype policy mixed_bfloat16, which needs no loss scaling."
        )
    if optimizer.use_ema:
        raise ValueError(
            "`use_ema=True` does not work with several replicas in Keras. Average the weights in a callback."
        )
    others = [each for each in vars(model).values() if isinstance(each, keras.optimizers.Optimizer)]
    if any(each.gradient_accumulation_steps for each in others if each is not optimizer):
        raise ValueError(
            "`gradient_accumulation_steps` works with the compiled optimizer only, and the model has more."
        )
    losses = [each for each in tf.nest.flatten(model.loss) if isinstance(each, keras.losses.Loss)]
    odd = [each.reduction for each in losses if each.reduction not in ("sum_over_batch_size", "mean")]
    if odd:
        raise ValueError(
            f"A loss with reduction={odd[0]!r} is not a mean over examples, which parts of a batch could be joined to. "
            "Use reduction='sum_over_batch_size'."
        )
