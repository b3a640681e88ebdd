"""The peer's side of compression.py: tensorflow-model-optimization on Keras 2, run as a child process.

    PEER_PYTHON benchmarks/peers/compression_tfmot.py --in JOB_DIR --out OUT_DIR

JOB_DIR holds `job.json` (settings, architectures) and the arrays it names: the data, and the weights of the float
networks trained once by the caller. OUT_DIR gets one .tflite a model and method, and `peer.json`. A method that fails
is recorded with its error, and the others go on.
"""

from __future__ import annotations

import os

# Before TensorFlow is imported: `tf.keras` is Keras 2 here, and here only.
os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

# Sparsity-preserving clustering is public in the guides, but reachable only by this path.
from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster as sparse_cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common
from benchmarks.peers import stepclock, twin

QUANTIZE = tfmot.quantization.keras
COMBINE = tfmot.experimental.combine


class Peer:
    """One network and everything tfmot does to it.

    Args:
        spec: The architecture, as `twin.describe` gave it.
        weights: The trained float weights.
        data: `x_train`, `y_train`, float32 images and integer labels.
        plan: Batch size, epochs, rates, sparsity: the caller's `Plan` as a dictionary.
        seed: For TensorFlow, NumPy and Python.
    """

    def __init__(self, spec: dict, weights: dict, data: dict, plan: dict, seed: int) -> None:
        self.spec, self.weights, self.data, self.plan, self.seed = spec, weights, data, plan, seed
        self._pruned: Any = None
        self._clustered: Any = None

    def float_model(self) -> Any:
        """A fresh copy of the trained float network; tfmot's wrappers reuse the layers they are given."""
        model = twin.build(self.spec, tf_keras.layers, tf_keras.Model)
        twin.load_weights(model, self.weights)
        return model

    def train(self, model: Any, rate: float, epochs: int, callbacks: list) -> Any:
        """Fine-tune in place with the plan's batch size and Adam, the rate falling to 0 along a cosine."""
        tf_keras.utils.set_random_seed(self.seed)
        steps = epochs * -(-len(self.data["x_train"]) // self.plan["batch_size"])
        self.compile(model, tf_keras.optimizers.schedules.CosineDecay(rate, steps))
        model.fit(
            self.data["x_train"],
            self.data["y_train"],
            batch_size=self.plan["batch_size"],
            epochs=epochs,
            callbacks=callbacks,
            verbose=0,
        )
        return model

    def compile(self, model: Any, rate: Any) -> None:
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf_keras.optimizers.Adam(rate), loss, metrics=["accuracy"])

    # -- preparing: the float model in, the model to train out -------------------------------------------------

    def prepare_prune(self, schedule: str = "polynomial") -> Any:
        plan, api = self.plan, tfmot.sparsity.keras
        frequency, end = plan["prune_every_steps"], plan["prune_end_step"]
        if schedule == "polynomial":
            pace = api.PolynomialDecay(0.0, plan["sparsity"], begin_step=0, end_step=end, frequency=frequency)
        else:
            pace = api.ConstantSparsity(plan["sparsity"], begin_step=0, frequency=frequency)
        return api.prune_low_magnitude(self.float_model(), pruning_schedule=pace)

    def prepare_cluster(self, clusters: int) -> Any:
        linear = tfmot.clustering.keras.CentroidInitialization.LINEAR
        return tfmot.clustering.keras.cluster_weights(self.float_model(), clusters, linear)

    def prepare_qat(self, model: Any = None, scheme: Any = None) -> Any:
        if scheme is None:
            return QUANTIZE.quantize_model(model or self.float_model())
        return QUANTIZE.quantize_apply(QUANTIZE.quantize_annotate_model(model), scheme)

    # -- methods: a plain or quantized model, trained ---------------------------------------------------------

    def prune(self, schedule: str) -> Any:
        model = self.prepare_prune(schedule)
        update = tfmot.sparsity.keras.UpdatePruningStep()
        self.train(model, self.plan["prune_rate"], self.plan["prune_epochs"], [update])
        return tfmot.sparsity.keras.strip_pruning(model)

    def pruned(self) -> Any:
        """The gradually pruned network, trained once and copied for each method that starts from it."""
        if self._pruned is None:
            self._pruned = self.prune("polynomial")
        return self._copy(self._pruned)

    def cluster(self, clusters: int) -> Any:
        model = self.prepare_cluster(clusters)
        self.train(model, self.plan["cluster_rate"], self.plan["cluster_epochs"], [])
        return tfmot.clustering.keras.strip_clustering(model)

    def pruned_clustered(self) -> Any:
        """Sparsity-preserving clustering of the pruned network, trained once and copied."""
        if self._clustered is None:
            linear = tfmot.clustering.keras.CentroidInitialization.LINEAR
            model = sparse_cluster.cluster_weights(self.pruned(), self.plan["clusters"], linear, preserve_sparsity=True)
            self.train(model, self.plan["cluster_rate"], self.plan["cluster_epochs"], [])
            self._clustered = tfmot.clustering.keras.strip_clustering(model)
        return self._copy(self._clustered)

    def quantized(self, model: Any, scheme: Any = None) -> Any:
        model = self.prepare_qat(model, scheme)
        return self.train(model, self.plan["qat_rate"], self.plan["qat_epochs"], [])

    def methods(self) -> dict[str, tuple[Callable[[], Any], bool]]:
        """Name to (how to make the model, whether it converts to int8)."""
        keep_zeros = COMBINE.Default8BitPrunePreserveQuantizeScheme
        keep_clusters = COMBINE.Default8BitClusterPreserveQuantizeScheme
        return {
            "float": (self.float_model, False),
            "prune": (self.pruned, False),
            "prune_constant": (lambda: self.prune("constant"), False),
            "cluster_16": (lambda: self.cluster(16), False),
            "cluster_32": (lambda: self.cluster(32), False),
            "prune_cluster": (self.pruned_clustered, False),
            "qat": (lambda: self.quantized(self.float_model()), True),
            "prune_qat": (lambda: self.quantized(self.pruned(), keep_zeros()), True),
            "prune_cluster_qat": (
                lambda: COMBINE.strip_clustering_cqat(
                    self.quantized(self.pruned_clustered(), keep_clusters(preserve_sparsity=True))
                ),
                True,
            ),
        }

    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds a step of the float network and of each method, in interleaved rounds."""
        plan = self.plan
        x, y = stepclock.steps_of(self.data["x_train"], self.data["y_train"], plan["batch_size"], plan["timing_steps"])
        prepared = {"float": self.float_model(), "prune": self.prepare_prune(), "qat": self.prepare_qat()}
        prepared[f"cluster_{plan['clusters']}"] = self.prepare_cluster(plan["clusters"])

        def fitter(model: Any, extra: Callable[[], list]) -> Callable[[Any], Any]:
            return lambda watch: model.fit(
                x, y, batch_size=plan["batch_size"], verbose=0, shuffle=False, callbacks=[*extra(), watch]
            )

        fits = {}
        for name, model in prepared.items():
            self.compile(model, 1e-4)
            pruning = name == "prune"
            fits[name] = fitter(model, (lambda: [tfmot.sparsity.keras.UpdatePruningStep()]) if pruning else list)
        clock = lambda: stepclock.make_clock(tf_keras.callbacks.Callback)  # noqa: E731
        return stepclock.step_seconds(fits, clock, rounds=plan["timing_rounds"])

    def _copy(self, model: Any) -> Any:
        twin_model = twin.build(self.spec, tf_keras.layers, tf_keras.Model)
        twin_model.set_weights(model.get_weights())
        return twin_model


def to_tflite(model: Any, int8: bool) -> bytes:
    """Convert as tfmot's guides do: float32, or int8 from the ranges that training learned, float in and out.

    The batch is fixed at one, as tfkit's files have it: a dynamic one costs both bytes and time.
    """
    shape = (1, *model.input_shape[1:])
    traced = tf.function(lambda image: model(image, training=False)).get_concrete_function(tf.TensorSpec(shape))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([traced], model)
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    return converter.convert()


def run_job(job_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Do every model and method of the job; see the module's docstring."""
    job = json.loads((job_dir / "job.json").read_text())
    out_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for entry in job["models"]:
        with np.load(job_dir / entry["data"], allow_pickle=False) as archive:
            data = dict(archive)
        with np.load(job_dir / entry["weights"], allow_pickle=False) as archive:
            weights = dict(archive)
        peer = Peer(entry["spec"], weights, data, entry["plan"], job["seed"])
        rows = results.setdefault(entry["name"], {"methods": {}})["methods"]
        for name, (make, int8) in peer.methods().items():
            if name not in job["methods"]:
                continue
            started = time.perf_counter()
            try:
                content = to_tflite(make(), int8)
            except Exception as error:  # a peer's failure is a result
                rows[name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"}
                traceback.print_exc()
                continue
            path = out_dir / f"{entry['name']}-{name}.tflite"
            path.write_bytes(content)
            rows[name] = {"file": path.name, "seconds": time.perf_counter() - started}
            print(f"  {entry['name']} {name}: tfmot, {rows[name]['seconds']:.0f} s", flush=True)
        results[entry["name"]]["timing"] = peer.timings()
    packages = ("tensorflow", "tf_keras", "tensorflow-model-optimization", "keras", "numpy")
    return {"models": results, "versions": common.versions(*packages)}


def main() -> None:
    """Parse the arguments, run the job, write `peer.json`."""
    parser = argparse.ArgumentParser(description="tfmot's side of benchmarks/peers/compression.py.")
    parser.add_argument("--in", dest="job", type=Path, required=True, help="folder with job.json and its arrays")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .tflite files and peer.json")
    arguments = parser.parse_args()
    common.write_json(arguments.out / "peer.json", run_job(arguments.job, arguments.out))


if __name__ == "__main__":
    main()
