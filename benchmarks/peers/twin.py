"""The same network in Keras 3 and in Keras 2: architecture as plain JSON, weights as arrays in layer order.

No module here imports Keras: the caller passes its own (`keras` or `tf_keras`), so that both sides build from one
description and start from the very same floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Only what both Keras generations understand; initializers, dtypes and build configs differ and do not matter
# once the weights are loaded.
KEPT = {
    "Activation": ("activation",),
    "Add": (),
    "AveragePooling2D": ("pool_size", "strides", "padding"),
    "BatchNormalization": ("axis", "momentum", "epsilon", "center", "scale"),
    "Conv2D": ("filters", "kernel_size", "strides", "padding", "use_bias", "activation"),
    "Dense": ("units", "use_bias", "activation"),
    "DepthwiseConv2D": ("kernel_size", "strides", "padding", "use_bias", "activation"),
    "Dropout": ("rate",),
    "Flatten": (),
    "GlobalAveragePooling2D": (),
    "MaxPooling2D": ("pool_size", "strides", "padding"),
    "ReLU": ("max_value",),
    "Reshape": ("target_shape",),
    "Softmax": (),
    "ZeroPadding2D": ("padding",),
}


def describe(model: Any) -> dict[str, Any]:
    """Describe a functional or sequential Keras 3 image model.

    Args:
        model: The built model: one input, one output, layers of `KEPT`, no nesting.

    Returns:
        `input_shape` without the batch axis and `layers`: class, name, config and the names of the inputs.

    Raises:
        ValueError: If a layer is not of a known class.
    """
    layers = []
    previous = "input"
    for layer in model.layers:
        kind = type(layer).__name__
        if kind == "InputLayer":
            previous = "input"
            continue
        if kind not in KEPT:
            raise ValueError(f"layer {layer.name!r} must be one of {sorted(KEPT)}; got {kind}. Add it to twin.KEPT.")
        config = layer.get_config()
        sources = [previous] if type(model).__name__ == "Sequential" else _sources(layer)
        layers.append(
            {
                "class": kind,
                "name": layer.name,
                "config": {key: config[key] for key in KEPT[kind]},
                "inputs": sources,
            }
        )
        previous = layer.name
    return {"name": model.name, "input_shape": list(model.input_shape[1:]), "layers": layers}


def _sources(layer: Any) -> list[str]:
    """Names of the layers whose outputs feed the layer's first call, `input` for the model's own input."""
    producers = [history.operation for history in (t._keras_history for t in layer._inbound_nodes[0].input_tensors)]
    return ["input" if type(p).__name__ == "InputLayer" else p.name for p in producers]


def build(spec: Mapping[str, Any], layers: Any, model_class: Any) -> Any:
    """Build the described model.

    Args:
        spec: What `describe` returned.
        layers: A `keras.layers` module of either generation.
        model_class: The `keras.Model` of the same generation.

    Returns:
        A functional model; nested lists of the JSON become tuples where Keras wants them.
    """
    source = layers.Input(tuple(spec["input_shape"]), name="input")
    outputs = {"input": source}
    last = source
    for entry in spec["layers"]:
        config = {k: _tuples(v) for k, v in entry["config"].items()}
        layer = getattr(layers, entry["class"])(name=entry["name"], **config)
        feeds = [outputs[name] for name in entry["inputs"]]
        last = outputs[entry["name"]] = layer(feeds[0] if len(feeds) == 1 else feeds)
    return model_class(source, last, name=spec["name"])


def _tuples(value: Any) -> Any:
    """JSON's lists back to the tuples that Keras configurations hold."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def weights_by_order(model: Any) -> dict[str, np.ndarray]:
    """The weights keyed `layer/position`; both generations order a layer's weights alike."""
    return {
        f"{layer.name}/{position}": np.asarray(value)
        for layer in model.layers
        for position, value in enumerate(layer.get_weights())
    }


def load_weights(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Load what `weights_by_order` gave.

    Raises:
        ValueError: If an array is missing or one is left over.
    """
    used = set()
    for layer in model.layers:
        names = [f"{layer.name}/{position}" for position in range(len(layer.get_weights()))]
        absent = [name for name in names if name not in weights]
        if absent:
            raise ValueError(f"weights must hold every array of {layer.name!r}; {absent} missing. Describe it again.")
        if names:
            layer.set_weights([weights[name] for name in names])
        used.update(names)
    if used != set(weights):
        raise ValueError(f"weights must all have a place; {sorted(set(weights) - used)} have none. Describe it again.")
