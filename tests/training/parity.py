"""What the tests of distributed training run as one process, and as several: `python tests/training/parity.py CASES`.

Each case trains a small network; the first worker writes its weights and history to `CASE.npz` in the folder given by
the variable PARITY_OUT.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np
import tensorflow as tf

from tfkit import graphs
from tfkit.training import LARS, ImportanceSampling, distribute

CROSS_ENTROPY = {"from_logits": True}


def data(count=47):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 5)).astype("float32")
    return x, rng.integers(0, 3, count), rng.random(count).astype("float32")


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    x = keras.layers.Dense(8, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.01))(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


@keras.saving.register_keras_serializable("parity")
class MeanLoss(keras.Model):
    """A `train_step` of one's own, with a plain mean for its loss, as users write it."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def call(self, x):
        return self.inner(x)

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            values = keras.losses.sparse_categorical_crossentropy(y, self.inner(x), from_logits=True)
            loss = tf.reduce_mean(values)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


def nodes_and_model():
    """A graph model over node ids, with an uneven number of neighbours a node."""
    graph = graphs.stochastic_block_model(60, 3, 6, features=5, seed=0)
    model = graphs.NodeModel(graphs.GCN(3, 8, dropout=0.0, l2=0.01, seed=1), graph)
    nodes = np.arange(47)
    return nodes, graph.labels[nodes], np.linspace(0, 1, 47, dtype="float32"), model


def trained(case):
    """Returns the weights and the history of a case."""
    x, y, weight = data()
    settings = {
        "clipnorm": {"clipnorm": 0.05},
        "global_clipnorm": {"global_clipnorm": 0.05},
        "accumulation": {"gradient_accumulation_steps": 3, "clipnorm": 0.05},
    }.get(case, {})
    optimizer = LARS(1.0, weight_decay=0.01) if case == "lars" else keras.optimizers.Adam(0.01, **settings)
    model = network()
    if case == "custom":
        model = MeanLoss(model)
    elif case == "graph":
        x, y, weight, model = nodes_and_model()
    elif case == "importance":
        model = ImportanceSampling(model, 8, 2.5, threshold=100.0)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(**CROSS_ENTROPY),
        metrics=["accuracy"],
        steps_per_execution=2 if case == "steps_per_execution" else 1,
    )
    # 47 examples in batches of 12 or 20: the last batch is smaller, and odd.
    size = 12 if case in ("steps_per_execution", "accumulation") else 20
    more = {} if case in ("custom", "importance") else {"validation_data": (x, y), "sample_weight": weight}
    history = distribute.fit(model, x, y, batch_size=size, epochs=2, verbose=0, **more)
    return model.get_weights(), history.history


def main(cases):
    mirrored = int(os.environ.get("PARITY_REPLICAS", "0"))
    if mirrored:
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * mirrored)
        distribute.enable()
        strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(mirrored)])
    else:
        strategy = distribute.strategy()
    for case in cases:
        with strategy.scope():
            weights, history = trained(case)
        if distribute.is_chief(strategy):
            arrays = {f"w{index}": weight for index, weight in enumerate(weights)}
            about = {"replicas": strategy.num_replicas_in_sync, "history": history}
            np.savez(Path(os.environ["PARITY_OUT"]) / f"{case}.npz", about=json.dumps(about), **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
