"""A Keras layer over ScaNN's TensorFlow operations, which a SavedModel can hold."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.retrieval.scann import ScaNN

#: What the operation that makes a searcher takes, in its order, and the file of the package that holds it.
_FILES = {
    "serialized_partitioner": "serialized_partitioner.pb",
    "datapoint_to_token": "datapoint_to_token.npy",
    "ah_codebook": "ah_codebook.pb",
    "hashed_dataset": "hashed_dataset.npy",
}
_UNUSED = {"int8_dataset": np.int8, "int8_multipliers": np.float32, "dp_norms": np.float32}
_MISSING = {"datapoint_to_token": np.int32, "hashed_dataset": np.uint8}


class ScaNNLayer(keras.layers.Layer):
    """Searches an index for the rows of its input; `ScaNN.as_layer` makes it.

    Args:
        index: a built index, whose items and codes the layer keeps as variables.
        k: items for each query.
        leaves, rescore: as in `ScaNN.search`.
        name: of the layer.
    """

    def __init__(self, index: ScaNN, k: int, leaves: int | None, rescore: int | None, name: str | None = None) -> None:
        super().__init__(trainable=False, name=name, dtype="float32")  # Under any policy: the operations know no other.
        count = len(index.items)
        self.k = checks.integer("k", k, 1, count)
        index.check_effort(leaves, rescore)
        usual = index.default_effort(k)
        self.leaves = min(usual["leaves"] if leaves is None else leaves, count)
        self.rescore = min(max(k, usual["rescore"] if rescore is None else rescore), count)
        self.dimension = index.dimension
        self._scale = 2.0**index._exponent
        self._operations = operations()
        pieces = _pieces(index)
        self._config = pieces.pop("scann_config")
        self._index = {name: tf.Variable(value, trainable=False, name=name) for name, value in pieces.items()}
        # Searchers are shared by name within a process, so that each layer needs one of its own.
        self._shared = f"tfkit-{os.getpid()}-{id(self)}-{np.random.default_rng().integers(1 << 62)}"

    def call(self, queries: Any) -> tuple[Any, Any]:
        handle = self._operations.tensors_to_scann(
            x=self._index["dataset"],
            scann_config=tf.constant([self._config]),
            **{name: self._index[name] for name in (*_FILES, *_UNUSED)},
            shared_name=self._shared,
        )
        asked = tf.cast(queries, tf.float32)
        count = tf.shape(asked)[0]
        asked = tf.pad(asked, [[0, tf.cast(count == 0, tf.int32)], [0, 0]])  # The operation takes no empty batch.
        powers = _power_of_two(asked)
        ids, scores = self._operations.scann_search_batched(
            handle, asked / powers, self.k, self.rescore, self.leaves, False
        )
        missing = [[0, 0], [0, self.k - tf.shape(ids)[1]]]  # Fewer were found: they are left out, or come as NaN.
        ids = tf.pad(tf.cast(ids, tf.int64), missing)
        scores = tf.pad(scores, missing, constant_values=np.nan)
        found = ~tf.math.is_nan(scores)
        scores = tf.cast(tf.cast(scores, tf.float64) * tf.cast(powers, tf.float64) * self._scale, tf.float32)
        scores, ids = tf.where(found, scores, -np.inf), tf.where(found, ids, -1)
        shape = (queries.shape[0], self.k)
        return tf.ensure_shape(scores[:count], shape), tf.ensure_shape(ids[:count], shape)

    def compute_output_spec(self, queries: Any) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        if len(queries.shape) != 2 or queries.shape[-1] not in (None, self.dimension):
            raise checks.error("queries", f"of shape (batch, {self.dimension})", queries)
        shape = (queries.shape[0], self.k)
        return keras.KerasTensor(shape, "float32"), keras.KerasTensor(shape, "int64")

    def export(self, model: keras.Model, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes a model that contains this layer as a SavedModel, with the signature `serving_default`.

        Whoever loads it must `import scann` first, or serve it with a TensorFlow Serving that has ScaNN's operations.

        Args:
            model: a functional or sequential model with one input.
            path: the folder to write.
            force: write into a folder that is there already.
        """
        target = Path(path)
        if target.exists() and not force:
            raise FileExistsError(f"{target} exists. Choose another path, or pass force=True to overwrite it.")
        if not any(layer is self for layer in model._flatten_layers()):
            raise ValueError("Argument `model` must contain this layer. Received: a model without it.")
        shape, dtype = model.inputs[0].shape, model.inputs[0].dtype

        @tf.function(input_signature=[tf.TensorSpec(shape, dtype, name="queries")])
        def serve(queries: Any) -> dict[str, Any]:
            scores, ids = model(queries, training=False)
            return {"scores": scores, "ids": ids}

        module = tf.Module()
        module.variables_of_model = [variable.value for variable in model.variables]
        module.index = list(self._index.values())
        module.serve = serve
        options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        tf.saved_model.save(module, str(target), signatures=serve, options=options)
        return target

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError(
            "A layer over a ScaNN index cannot be kept in a .keras file. Write the model with `layer.export(model, "
            "path)`, or save tower and index apart: `tower.save(...)`, `index.save(...)`."
        )


def _power_of_two(queries: Any) -> Any:
    """Returns for each query the largest power of two up to its largest coordinate, 1 for zeros, (queries, 1)."""
    largest = tf.reduce_max(tf.abs(queries), axis=1, keepdims=True)
    power = tf.bitcast(tf.bitcast(largest, tf.int32) & 0x7F800000, tf.float32)  # The exponent's bits alone.
    return tf.where(power > 0, power, 1.0)


def operations() -> Any:
    """Returns the package's module of TensorFlow operations.

    Raises:
        ImportError: there is none.
    """
    try:
        return importlib.import_module("scann.scann_ops.py.scann_ops")
    except (ImportError, tf.errors.OpError) as error:
        raise ImportError(
            "ScaNN's TensorFlow operations are not there; they come with the distribution `scann`, whose version must "
            f"fit TensorFlow (pip install 'scann==1.4.2' for TensorFlow 2.20): {error}"
        ) from None


def _pieces(index: ScaNN) -> dict[str, Any]:
    """Returns the values of the layer's variables."""
    if index._kind in ("tree", "hashing"):
        files, config = index._files(index._arrays()), index._config_message()
    else:
        files, config = {"dataset.npy": index.items}, ScaNN._message_for(index.items)
    pieces: dict[str, Any] = {"scann_config": config, "dataset": files["dataset.npy"]}
    for name, file in _FILES.items():
        value = files.get(file, np.zeros((), _MISSING[name]) if name in _MISSING else b"")
        pieces[name] = [value] if isinstance(value, bytes) else value
    return pieces | {name: np.zeros((), dtype) for name, dtype in _UNUSED.items()}
