"""tfkit's side of compression.py: the same methods as compression_tfmot.py, on Keras 3."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.peers import stepclock
from benchmarks.peers.plan import INT8, Plan
from tfkit import compression, export

# tfmot leaves depthwise kernels alone when it prunes and clusters; so that both do the same work, so do we.
SPARED = ("depthwise*",)


class Ours:
    """One trained float network and everything tfkit does to it.

    Args:
        model: the float network; it is not changed.
        data: `x_train`, `y_train`, float32 images and integer labels.
        plan: batch size, epochs, rates, sparsity.
        seed: for Keras, NumPy and Python.
    """

    def __init__(self, model: keras.Model, data: Mapping[str, np.ndarray], plan: Plan, seed: int) -> None:
        self.model, self.data, self.plan, self.seed = model, data, plan, seed
        self._pruned: keras.Model | None = None
        self._clustered: keras.Model | None = None

    def compressor(self, method: str) -> compression.Compressor:
        """The compressor of a single stage: `prune`, `prune_constant`, `cluster_<values>` or `qat`."""
        every, end = self.plan.prune_pace(len(self.data["x_train"]))
        if method == "prune":
            return compression.MagnitudePruning(self.plan.sparsity, end=end, frequency=every, exclude=SPARED)
        if method == "prune_constant":
            return compression.MagnitudePruning(self.plan.sparsity, schedule="constant", exclude=SPARED)
        if method == "qat":
            return compression.QuantizationAware()
        values = int(method.removeprefix("cluster_"))
        return compression.WeightClustering(values.bit_length() - 1, initialization="linear", exclude=SPARED)

    def stage(self, method: str, model: keras.Model) -> keras.Model:
        """Compress `model` by one method and fine-tune it as the plan says."""
        kind = method.split("_")[0]
        epochs, rate = getattr(self.plan, f"{kind}_epochs"), getattr(self.plan, f"{kind}_rate")
        return self.compressor(method).apply(
            model, lambda prepared, callbacks: train(prepared, self.data, self.plan, rate, epochs, self.seed, callbacks)
        )

    def make(self, method: str) -> keras.Model:
        """The compressed network; stages that several methods share are trained once."""
        if method == "float":
            return self.model
        if method == "prune":
            self._pruned = self._pruned or self.stage("prune", self.model)
            return self._pruned
        if method == "prune_cluster":
            self._clustered = self._clustered or self.stage(f"cluster_{self.plan.clusters}", self.make("prune"))
            return self._clustered
        if method.endswith("_qat"):
            return self.stage("qat", self.make(method.removesuffix("_qat")))
        return self.stage(method, self.model)

    def write(self, folder: Path, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Train and convert by each of the methods.

        Returns:
            For each method the `file` (path) and the `seconds` it took.
        """
        rows = {}
        for method in methods:
            started = time.perf_counter()
            path = folder / f"{self.plan.network}-{method}.tflite"
            quantization = "int8-qat" if method in INT8 else "float32"
            export.convert(self.make(method), path, quantization=quantization, force=True)
            rows[method] = {"file": str(path), "seconds": time.perf_counter() - started}
            print(f"  {self.plan.network} {method}: tfkit, {rows[method]['seconds']:.0f} s", flush=True)
        return rows

    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds a step of the float network and of each method, in interleaved rounds; as `Peer.timings`."""
        plan = self.plan
        x, y = stepclock.steps_of(self.data["x_train"], self.data["y_train"], plan.batch_size, plan.timing_steps)

        def fitter(model: keras.Model, compressor: compression.Compressor | None) -> Callable[[Any], Any]:
            compile_for_training(model, 1e-4)

            def fit(watch: Any) -> None:
                extra = compressor.callbacks() if compressor else []
                model.fit(x, y, batch_size=plan.batch_size, verbose=0, shuffle=False, callbacks=[*extra, watch])

            return fit

        fits = {"float": fitter(keras.models.clone_model(self.model), None)}
        for method in ("prune", "qat", f"cluster_{plan.clusters}"):
            compressor = self.compressor(method)
            fits[method] = fitter(compressor.prepare(self.model), compressor)
        clock = lambda: stepclock.make_clock(keras.callbacks.Callback)  # noqa: E731
        return stepclock.step_seconds(fits, clock, rounds=plan.timing_rounds)


def compile_for_training(model: keras.Model, rate: Any) -> None:
    """Adam on the cross-entropy of logits, accuracy beside it."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])


def train(
    model: keras.Model,
    data: Mapping[str, np.ndarray],
    plan: Plan,
    rate: float,
    epochs: int,
    seed: int,
    callbacks: list[keras.callbacks.Callback],
) -> None:
    """Train in place, the rate falling to 0 along a cosine."""
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(data["x_train"]) // plan.batch_size)
    compile_for_training(model, keras.optimizers.schedules.CosineDecay(rate, steps))
    model.fit(
        data["x_train"], data["y_train"], batch_size=plan.batch_size, epochs=epochs, callbacks=callbacks, verbose=0
    )
