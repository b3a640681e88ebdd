"""Activations of a layer inside a model, as the detectors and the attacks on features see them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tfkit.internal import checks


def feature_model(model: keras.Model, layer: str | None = None) -> keras.Model:
    """Returns the part of a model up to a layer, with shared weights, as rows (examples, features).

    Args:
        model: functional or sequential, with one input.
        layer: name of the layer whose output is meant; None: what the last layer with weights receives.

    Raises:
        ValueError: there is no such layer, or the model is not such.
    """
    if not isinstance(model, keras.Model) or len(model.inputs or ()) != 1:
        raise checks.error("model", "a built functional or sequential Keras model with one input", model)
    if layer is not None:
        names = [inner.name for inner in model.layers]
        output = model.get_layer(checks.choice("layer", layer, names)).output
    else:
        weighted = [inner for inner in model.layers if inner.weights]
        if not weighted:
            raise checks.error("model", "one with weights", model)
        output = weighted[-1].input
    if len(output.shape) > 2:
        output = keras.layers.Flatten()(output)
    return keras.Model(model.inputs, output)


def features(model: keras.Model, x: Any, layer: str | None = None, *, batch_size: int = 256) -> np.ndarray:
    """Returns the activations of a layer, float64, (examples, features); see `feature_model` for the arguments."""
    found = feature_model(model, layer).predict(np.asarray(x), batch_size=batch_size, verbose=0)
    return np.asarray(found, np.float64)
