"""One form for every model: a traced function from named inputs of a fixed batch size to named outputs."""

from __future__ import annotations

import contextlib
import keyword
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import surgery

CONSTRAINTS = {
    "kernel_constraint": "kernel",
    "depthwise_constraint": "kernel",
}


class Traced(NamedTuple):
    """A model ready for the converter.

    Attributes:
        function: the concrete function.
        holder: an object that keeps the model's variables alive and lets the converter find them.
        inputs: its inputs by name, in the model's order; shapes include the batch size.
        outputs: names of its outputs, in the model's order.
    """

    function: Any
    holder: tf.Module
    inputs: dict[str, tf.TensorSpec]
    outputs: list[str]


def trace(
    model: Any, batch_size: int, signature: Any = None, *, annotate: bool = False, unroll: bool = False
) -> Traced:
    """Traces a model in inference mode.

    Args:
        model: see `tfkit.export.convert`.
        batch_size: samples a run.
        signature: see `tfkit.export.convert`.
        annotate: write the grids of `kernel_constraint`s into the graph as fake-quantisation of the kernels.
        unroll: trace recurrent layers step by step, without a loop.

    Raises:
        TypeError: the model is none of the known kinds.
        ValueError: the model is not built, or its input shapes are open.
        FileNotFoundError: there is no such file.
    """
    if isinstance(model, (str, os.PathLike)):
        model = Path(model)
        if model.is_dir():
            return _trace_saved_model(model, batch_size, signature)
        model = load_keras(model)
    if isinstance(model, keras.Model):
        _check_weights(model)
        _warn_if_unfinished(model)
        model = in_float32(model)
        variables = [_raw(v) for v in model.variables]
        call = _annotated_call(model) if annotate else lambda x: model(x, training=False)
    elif is_tf_keras(model):
        variables = list(model.variables)

        def call(x: Any) -> Any:
            return model(x, training=False)

    else:
        raise TypeError(
            f"Argument `model` must be a Keras 3 model, a tf_keras model, a .keras file or a SavedModel folder. "
            f"Received: {type(model).__module__}.{type(model).__name__}."
        )
    structure = input_structure(model, signature)
    flat = keras.tree.flatten(structure)
    names = name_inputs(structure)
    inputs = {name: _fixed(name, spec, batch_size) for name, spec in zip(names, flat, strict=True)}
    outputs: list[str] = []

    @tf.function(autograph=False)
    def serve(*arguments: Any) -> dict[str, Any]:
        result = call(keras.tree.pack_sequence_as(structure, list(arguments)))
        named = name_outputs(model, result)
        outputs[:] = list(named)
        # An identity keeps an output apart from an input or another output that it equals.
        return {name: tf.identity(tensor) for name, tensor in named.items()}

    with unrolled(model) if unroll else contextlib.nullcontext():
        function = serve.get_concrete_function(*inputs.values())
    return Traced(function, _hold(variables), inputs, outputs)


@contextlib.contextmanager
def unrolled(model: Any) -> Iterator[None]:
    """Has the recurrent layers of a model unroll their loop, for as long as the context lasts."""
    layers = [layer for layer in model._flatten_layers() if getattr(layer, "unroll", None) is False]
    try:
        for layer in layers:
            layer.unroll = True
        yield
    finally:
        for layer in layers:
            layer.unroll = False


def has_loop(function: Any) -> bool:
    """Whether a concrete function, or one it calls, contains a loop."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    return any(node.op in ("While", "StatelessWhile") for node in nodes)


def load_keras(path: Path) -> Any:
    """Loads a `.keras` file, safe mode on: code in the file is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a `.keras` file.
    """
    if not path.exists():
        raise FileNotFoundError(f"Argument `model` must be a model or the path of one; {path} does not exist")
    if path.suffix != ".keras":
        raise ValueError(
            f"Argument `model` must be a .keras file or a SavedModel folder. Received: {path}. "
            "Load it yourself and pass the model, or save it as .keras."
        )
    import tfkit.compression  # noqa: F401  (registers the layers that a compressed model may hold)

    return keras.saving.load_model(path, compile=False, safe_mode=True)


def _check_weights(model: keras.Model) -> None:
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            if not np.isfinite(variable.numpy().astype(np.float32)).all():
                raise ValueError(
                    f"Argument `model` must have finite weights. Received: NaN or infinity in '{variable.path}'. "
                    "Train it again, with a lower learning rate."
                )


def _warn_if_unfinished(model: keras.Model) -> None:
    unfinished = [layer.name for layer in model._flatten_layers() if type(layer).__name__ == "Reparameterized"]
    if unfinished:
        warnings.warn(
            f"The model is prepared for training, not finished: the file will compute the weights of {unfinished} anew "
            "for each input. Convert what the compressor's `finalize(model)` gives.",
            stacklevel=4,
        )


def in_float32(model: keras.Model) -> keras.Model:
    """Returns a model that was trained in mixed or double precision with layers in float32, as TFLite computes."""
    if not any(layer.compute_dtype in ("float16", "bfloat16", "float64") for layer in model._flatten_layers()):
        return model
    return surgery.rebuild(model, lambda layer: surgery.copy_layer(layer, dtype="float32"))


def is_tf_keras(model: Any) -> bool:
    """Whether a model comes from tf_keras (Keras 2)."""
    return any(cls.__module__.split(".")[0] == "tf_keras" for cls in type(model).__mro__) and callable(model)


def input_structure(model: Any, signature: Any) -> Any:
    """Returns the specs of a model's inputs, nested as the model wants them.

    Raises:
        ValueError: the model does not tell; the message says what to pass.
    """
    if signature is not None:
        if isinstance(signature, (str, bytes)):
            raise ValueError(
                f"Argument `signature` must be a tf.TensorSpec, or a list or dictionary of them, for a Keras model; "
                f"only a SavedModel has named signatures. Received: {signature!r}."
            )
        return keras.tree.map_structure(lambda spec: spec, signature)
    if getattr(model, "inputs", None):
        structure = getattr(model, "_inputs_struct", None)
        if structure is None:
            structure = getattr(model, "_nested_inputs", None)
        if structure is None:
            structure = model.inputs[0] if len(model.inputs) == 1 else list(model.inputs)
        return structure
    if not getattr(model, "built", False):
        raise ValueError(
            f"Argument `model` must be built. Received: {model.name!r}, which has never seen data. "
            "Call it once on a batch, or pass signature=tf.TensorSpec((None, ...))."
        )
    build_config = model.get_build_config() if hasattr(model, "get_build_config") else None
    shapes = (build_config or {}).get("input_shape")
    if shapes is None:
        raise ValueError(
            f"The inputs of {model.name!r} are not known. Pass signature=tf.TensorSpec((None, ...), name='x'), "
            "or a list or dictionary of them."
        )
    return _specs_of_shapes(shapes)


def name_inputs(structure: Any) -> list[str]:
    """Names inputs, in flat order: by dictionary key, by the input's own name, or `input_0`, `input_1` ..."""
    flat = keras.tree.flatten(structure)
    if isinstance(structure, Mapping) and len(structure) == len(flat):
        names = [str(key) for key in keras.tree.flatten({key: key for key in structure})]
    else:
        names = [getattr(spec, "name", None) or f"input_{i}" for i, spec in enumerate(flat)]
    return _unique([_as_argument(_clean(name)) for name in names])


def _specs_of_shapes(shapes: Any) -> Any:
    if isinstance(shapes, Mapping):
        return {name: tf.TensorSpec(shape, keras.config.floatx(), name=name) for name, shape in shapes.items()}
    if shapes and isinstance(shapes[0], (list, tuple)):
        return [tf.TensorSpec(shape, keras.config.floatx()) for shape in shapes]
    return tf.TensorSpec(shapes, keras.config.floatx())


def _fixed(name: str, spec: Any, batch_size: int) -> tf.TensorSpec:
    shape = list(spec.shape)
    if not shape:
        raise ValueError(f"input {name!r} must have a batch axis; it is a scalar")
    if any(n is None for n in shape[1:]):
        raise ValueError(
            f"input {name!r} has shape {tuple(shape)}, but TFLite needs every axis but the first fixed. "
            f"Pass signature=tf.TensorSpec(...) with the sizes the phone will use."
        )
    return tf.TensorSpec([batch_size, *shape[1:]], tf.as_dtype(spec.dtype), name=name)


def name_outputs(model: Any, result: Any) -> dict[str, Any]:
    """Names the outputs of a model: by dictionary key, by the model's own output names, or `output_0`, `output_1` ...

    Args:
        model: any callable; a Keras model may have `output_names`.
        result: what calling it gave.

    Returns:
        The flat outputs by name, in the model's order.
    """
    flat = keras.tree.flatten(result)
    if isinstance(result, Mapping) and len(result) == len(flat):
        flat = list(result.values())
        names = [_clean(str(key)) for key in result]
    else:
        own = list(getattr(model, "output_names", None) or [])
        names = [_clean(n) for n in own] if len(own) == len(flat) else [f"output_{i}" for i in range(len(flat))]
    return dict(zip(_unique(names), flat, strict=True))


def _trace_saved_model(path: Path, batch_size: int, signature: Any) -> Traced:
    if not (path / "saved_model.pb").exists():
        raise ValueError(f"Argument `model` must be a SavedModel folder; {path} has no saved_model.pb")
    loaded = tf.saved_model.load(str(path))
    key = signature or "serving_default"
    if key not in loaded.signatures:
        raise ValueError(
            f"Argument `signature` must be one of the SavedModel's {sorted(loaded.signatures)}. Received: {key!r}."
        )
    served = loaded.signatures[key]
    specs = served.structured_input_signature[1]
    inputs = {name: _fixed(name, spec, batch_size) for name, spec in specs.items()}
    outputs = list(served.structured_outputs)

    @tf.function(autograph=False)
    def serve(*arguments: Any) -> dict[str, Any]:
        result = served(**dict(zip(inputs, arguments, strict=True)))
        return {name: tf.identity(result[name]) for name in outputs}

    holder = _hold([])
    holder.loaded = loaded
    return Traced(serve.get_concrete_function(*inputs.values()), holder, inputs, outputs)


def _annotated_call(model: keras.Model) -> Callable[[Any], Any]:
    """Calls a model with each kernel that has a grid replaced by its fake-quantisation on that very grid."""
    grids = find_grids(model)

    def call(x: Any) -> Any:
        trainable = [_raw(v) for v in model.trainable_variables]
        fixed = [_raw(v) for v in model.non_trainable_variables]
        for values, variables in ((trainable, model.trainable_variables), (fixed, model.non_trainable_variables)):
            for i, variable in enumerate(variables):
                if id(variable) in grids:
                    values[i] = on_grid(tf.convert_to_tensor(values[i]), *grids[id(variable)])
        outputs, _ = model.stateless_call(trainable, fixed, x, training=False)
        return outputs

    return call


def find_grids(model: keras.Model) -> dict[int, tuple[np.ndarray, bool]]:
    """Finds kernels that lie on a known int8 grid, by a constraint with a `scale`.

    Returns:
        By `id` of the variable, (scale, depthwise). Left out are kernels whose scales the converter cannot be told:
        it accepts them by channel for Conv2D and DepthwiseConv2D, as one number also for Conv1D and Dense. For the
        others it takes max|w| / 127 of each channel by itself, which is the same grid wherever the grid reaches 127.
    """
    per_channel = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
    whole = (*per_channel, keras.layers.Conv1D, keras.layers.Dense)
    grids: dict[int, tuple[np.ndarray, bool]] = {}
    for layer in model._flatten_layers():
        for attribute, weight in CONSTRAINTS.items():
            grid = getattr(layer, attribute, None)
            scale = getattr(grid, "scale", None)
            variable = getattr(layer, weight, None)
            if scale is None or variable is None:
                continue
            # A narrow grid is written on the finest 8-bit one that holds it: the file rounds biases to steps of the
            # product of the input's and the kernel's scale, which would be coarse.
            finer = 127 // (2 ** (getattr(grid, "bits", 8) - 1) - 1)
            scale = np.atleast_1d(np.asarray(scale, np.float32)) / finer
            if np.ptp(scale) == 0:
                scale = scale[:1]
            if isinstance(layer, per_channel if scale.size > 1 else whole):
                grids[id(variable)] = (scale, isinstance(layer, keras.layers.DepthwiseConv2D))
    return grids


def on_grid(kernel: Any, scale: np.ndarray, depthwise: bool) -> Any:
    """Rounds a kernel to scale * {-127 ... 127} with the op that the converter reads as a quantisation."""
    if scale.size == 1:
        limit = 127.0 * float(scale[0])
        return tf.quantization.fake_quant_with_min_max_vars(kernel, -limit, limit, num_bits=8, narrow_range=True)
    shape = kernel.shape
    # The op's channels are the last axis; those of a depthwise kernel (h, w, channels, multiplier) are the last two.
    view = tf.reshape(kernel, [*shape[:-2], shape[-2] * shape[-1]]) if depthwise else kernel
    rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        view, -127.0 * scale, 127.0 * scale, num_bits=8, narrow_range=True
    )
    return tf.reshape(rounded, shape) if depthwise else rounded


def _raw(variable: Any) -> Any:
    return getattr(variable, "_value", variable)


def _hold(variables: Sequence[Any]) -> tf.Module:
    holder = tf.Module()
    holder.kept = list(variables)
    return holder


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", name.split(":")[0]) or "tensor"


def _as_argument(name: str) -> str:
    """Returns a name that a function's argument may have: with any other, a file loses all its names in silence."""
    if keyword.iskeyword(name) or name == "self":
        return f"{name}_"
    return name if name[0].isalnum() else f"input{name}"


def _unique(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        result.append(f"{name}_{seen[name]}" if seen[name] else name)
    return result
