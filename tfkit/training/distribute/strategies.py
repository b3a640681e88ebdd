"""Which strategy the surroundings ask for."""

from __future__ import annotations

import json
import os

import tensorflow as tf

from tfkit.training.distribute import keras_mend


def strategy() -> tf.distribute.Strategy:
    """Returns the strategy for this process, and makes Keras' `fit` right under it. Call it before all else.

    `MultiWorkerMirroredStrategy` where `TF_CONFIG` names several workers (set by `tfkit launch`, or by the training
    operator of a Kubernetes cluster) or Slurm started several tasks; `MirroredStrategy` on one machine with several
    GPUs; otherwise TensorFlow's default. Make the model, compile it, and call `fit` in its scope or after it:

    >>> with strategy().scope():
    ...     import keras
    ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    ...     model.compile("sgd", "mse")
    """
    keras_mend.enable()
    if workers() > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if "TF_CONFIG" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver()
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def workers() -> int:
    """Returns the number of workers that `TF_CONFIG` names, 1 without it.

    Raises:
        ValueError: `TF_CONFIG` is not the JSON that TensorFlow expects.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return 1
    try:
        cluster = json.loads(text).get("cluster", {})
        return sum(len(cluster.get(kind, ())) for kind in ("chief", "worker")) or 1
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f'TF_CONFIG must be JSON with "cluster" and "task". Received: {text[:200]!r}') from None


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files for all."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    first_worker = "chief" not in resolver.cluster_spec().jobs and resolver.task_id == 0
    return resolver.task_type == "chief" or first_worker
