"""`fit` over any strategy: the same examples in the same order for any number of workers, and resumed where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.training.distribute import checkpoint as checkpoints
from tfkit.training.distribute import keras_mend, strategies


def fit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int = 32,
    epochs: int = 1,
    shuffle: bool = True,
    seed: int = 0,
    sample_weight: Any = None,
    checkpoint: Path | str | None = None,
    save_every: int | None = None,
    callbacks: Any = (),
    **keywords: Any,
) -> keras.callbacks.History:
    """Trains under the strategy that the model was made in, as one process would on the whole batch.

    The order of examples comes from `seed` and the epoch alone. With a checkpoint, a run that was cut off goes on at
    the step of the last one when the same program is started again; after a finished run it trains no further, and only
    more `epochs` do.

    Args:
        model: a compiled model, made and compiled inside `strategy.scope()`.
        x, y, sample_weight: arrays, or nests of them, examples first; the same on all workers.
        batch_size: examples in a step, over all workers.
        epochs: in all, with those before a restart.
        shuffle: whether each epoch has an order of its own.
        seed: of the order.
        checkpoint: a file to save to and resume from, on a disk that all workers see.
        save_every: steps between two saves; None: after each epoch only.
        callbacks: Keras callbacks; a resumed epoch is a `fit` of its own to them.
        **keywords: `validation_data`, `verbose` and others of `keras.Model.fit`.

    Returns:
        The history of the epochs that this process trained.

    Raises:
        ValueError: bad arguments, or what several replicas cannot do (see `tfkit.training.distribute.check`).
    """
    keras_mend.enable()
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    if tf.distribute.has_strategy() and tf.distribute.get_strategy() is not strategy:
        raise ValueError("The model was not made inside this strategy's scope. Make and compile it there.")
    examples = _examples((x, y, sample_weight))
    checks.integer("batch_size", batch_size, replicas, max(examples, replicas))
    checks.integer("epochs", epochs, 0)
    if save_every is not None:
        checks.integer("save_every", save_every, 1)
    rest = examples % batch_size
    if 0 < rest < replicas:
        raise checks.error(
            "batch_size", f"such that the last batch has at least {replicas} examples, one a replica", batch_size,
            f"The last one has {rest} of {examples}: drop them, or choose another size.",
        )  # fmt: skip
    steps = -(-examples // batch_size)
    if steps % model.steps_per_execution:
        raise checks.error(
            "steps_per_execution", f"a divisor of the {steps} steps of an epoch", model.steps_per_execution,
            "Compile the model with another, or choose another batch_size.",
        )  # fmt: skip
    if replicas > 1:
        keras_mend.check(model)
    validation = keywords.get("validation_data")
    if isinstance(validation, (tuple, list)) and replicas > 1:
        size = keywords.pop("validation_batch_size", None) or batch_size
        parts = tuple(part for part in validation if part is not None)
        count = -(-_examples(parts) // size)
        keywords |= {
            "validation_data": distributed(strategy, parts, size, count, 1, shuffle=False),
            "validation_steps": count,
        }

    data = tuple(part for part in (x, y, sample_weight) if part is not None)
    start = checkpoints.START
    extra = []
    if checkpoint is not None:
        path = Path(checkpoint)
        _build(model, data, strategy)
        start = checkpoints.restore(model, path) or start
        if start.epoch >= epochs:
            return keras.callbacks.History()
        write = strategies.is_chief(strategy)
        extra = [checkpoints.Checkpointing(path, save_every, write, start)]

    def run(first: checkpoints.Position, last: int) -> keras.callbacks.History:
        batches = distributed(strategy, data, batch_size, steps, last, first, shuffle, seed)
        return model.fit(
            batches, epochs=last, initial_epoch=first.epoch, steps_per_epoch=steps - first.step, shuffle=False,
            callbacks=[*extra, *callbacks], **keywords,
        )  # fmt: skip

    if start.step == 0:
        return run(start, epochs)
    history = run(start, start.epoch + 1)
    if start.epoch + 1 < epochs and not model.stop_training:
        later = run(checkpoints.Position(start.epoch + 1, 0), epochs)
        for name, values in later.history.items():
            history.history[name] = history.history.get(name, []) + values
        history.epoch += later.epoch
    return history


def distributed(
    strategy: tf.distribute.Strategy,
    data: tuple[Any, ...],
    batch_size: int,
    steps: int,
    epochs: int,
    start: checkpoints.Position = checkpoints.START,
    shuffle: bool = True,
    seed: int = 0,
) -> Any:
    """Returns each replica's part of every batch from a position on, as a data set of the strategy.

    A batch is cut into as many parts as there are replicas, whose sizes differ by at most one example.
    """
    examples = _examples(data)
    replicas = strategy.num_replicas_in_sync
    arrays = tf.nest.map_structure(np.asarray, data)

    def pipeline(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = replicas // context.num_input_pipelines
        # Constants of the graph are copied into it; captured tensors are not.
        tensors = tf.nest.map_structure(tf.convert_to_tensor, arrays)

        def part(index: Any) -> Any:
            step, replica = index // local, index % local + context.input_pipeline_id * local
            epoch, begin = step // steps, (step % steps) * batch_size
            size = tf.minimum(examples - begin, batch_size)
            low, high = begin + size * replica // replicas, begin + size * (replica + 1) // replicas
            places = tf.range(low, high)
            if shuffle:
                key = tf.stack([tf.constant(seed, tf.int64), epoch])
                places = tf.random.experimental.index_shuffle(places, key, tf.constant(examples - 1, tf.int64))
            return tf.nest.map_structure(lambda tensor: tf.gather(tensor, places), tensors)

        first, last = start.epoch * steps + start.step, epochs * steps
        parts = tf.data.Dataset.range(first * local, last * local).map(part, num_parallel_calls=2, deterministic=True)
        return parts.prefetch(2 * local)

    if replicas == 1:
        return pipeline(tf.distribute.InputContext())
    return strategy.distribute_datasets_from_function(pipeline)


def _examples(data: Any) -> int:
    lengths = {len(part) for part in tf.nest.flatten(data) if part is not None}
    if len(lengths) != 1:
        raise checks.error("x", "arrays with as many examples as `y` and `sample_weight`", sorted(lengths))
    return lengths.pop()


def _build(model: keras.Model, data: tuple[Any, ...], strategy: tf.distribute.Strategy) -> None:
    """Makes all variables, so that a state can be restored: metrics and losses are made by their first use."""
    first = tf.nest.map_structure(lambda part: tf.convert_to_tensor(np.asarray(part)[:1]), data)
    with strategy.scope():
        model._symbolic_build(data_batch=first)
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
