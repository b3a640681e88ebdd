"""Bounds and radii by decomon, in its own environment; `certification.py` starts this and reads what it writes.

    python certification_decomon.py task.npz answer.json

The task is that of `certification_lirpa.py`, of dense layers and balls of Linf only. A model of the margins' bounds is
made once, backwards from them (`crown`), with boxes as its input; decomon runs it eagerly, since a `tf.function` of it
fails (`len` of a symbolic tensor).
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", KERAS_BACKEND="tensorflow")

import keras
import numpy as np
from certification_search import cpu_seconds, radii
from decomon.models import clone

SLOPES = {"fast_lin": "same-slope", "crown": "volume-slope"}


def network(task: Any) -> keras.Model:
    """Builds the network, its input flat, from arrays in PyTorch's layouts."""
    count = int(task["layers"])
    kinds = [str(task[f"{number}/kind"]) for number in range(count)]
    inputs = keras.Input((task["x"][0].size,))
    x, kernels = inputs, []
    for number, kind in enumerate(kinds):
        if kind == "relu":
            x = keras.layers.Activation("relu")(x)
        elif kind == "dense":
            kernel, bias = (np.asarray(task[f"{number}/{name}"]) for name in ("kernel", "bias"))
            layer = keras.layers.Dense(len(kernel))
            x = layer(x)
            kernels.append((layer, [kernel.T, bias]))
        elif kind != "flatten":
            raise ValueError(f"decomon is given dense layers only, not {kind}")
    for layer, values in kernels:
        layer.set_weights(values)
    return keras.Model(inputs, x)


class Bounder:
    """Lower bounds of margins at radii, one for each example."""

    def __init__(self, task: Any, method: str, dtype: str) -> None:
        keras.config.set_floatx(dtype)
        self.x = task["x"].reshape(len(task["x"]), -1).astype(dtype)
        self.rows = np.ascontiguousarray(task["rows"].transpose(0, 2, 1)).astype(dtype)
        rows = keras.Input(self.rows.shape[1:])
        self.model = clone(network(task), slope=SLOPES[method], method="crown", back_bounds=[rows])

    def margins(self, chosen: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
        x, radius = self.x[chosen], epsilon[:, None].astype(self.x.dtype)
        _, low = self.model.predict_on_single_batch_np([np.stack([x - radius, x + radius], 1), self.rows[chosen]])
        return np.asarray(low, np.float64)


def main() -> None:
    task = np.load(sys.argv[1], allow_pickle=False)
    answer: dict[str, Any] = {"versions": {name: version(name) for name in ("decomon", "keras", "tensorflow")}}
    everything = np.arange(len(task["x"]))
    for method in str(task["methods"]).split():
        if "epsilon" in task:
            exact = Bounder(task, method, "float64")
            answer[method] = {"margins": exact.margins(everything, task["epsilon"]).tolist()}
        else:
            plain = Bounder(task, method, "float32")
            plain.margins(everything[:2], np.full(2, task["first"]))
            wall, cpu = time.perf_counter(), cpu_seconds()
            found = radii(plain.margins, len(everything), float(task["first"]), float(task["tolerance"]))
            answer[method] = {
                "radii": found.tolist(), "seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu
            }  # fmt: skip
        print(method, answer[method].get("cpu_seconds"), file=sys.stderr, flush=True)
    with open(sys.argv[2], "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
