"""How important each channel is, from the weights or from the gradient of the loss; see `structured_pruning`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfkit.internal import surgery
from tfkit.internal.channels import ChannelGraph, Slice


def norm_scores(graph: ChannelGraph, role: str, order: int) -> np.ndarray:
    """Returns the norm of the weights of each set of tied channels.

    Args:
        graph: the channels of a model.
        role: `"kernel"` for the weights that make the channels, `"scale"` for the gammas of normalizations.
        order: 1 for the sum of absolute values, 2 for the Euclidean norm.

    Returns:
        One number for each id of the graph, at the root of its set (ids,); 0 at the others.
    """
    total = np.zeros(len(graph.root))
    for cut in graph.slices:
        if cut.role == role:
            array = np.abs(keras.ops.convert_to_numpy(cut.variable).astype("float64")) ** order
            np.add.at(total, graph.root[cut.ids], _sum_but(array, cut.axis))
    return total ** (1 / order)


def taylor_scores(
    graph: ChannelGraph, data: tuple[Any, Any] | None, loss: Any, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first-order Taylor importance: the mean over batches of (sum of gradient * weight)**2.

    That sum, over the weights that make a channel or over gamma and beta of its normalization, is the derivative of the
    loss by a gate on the channel, so its negative is the change of the loss to first order when the channel goes.
    Layers that are tied are added up.

    Args:
        graph: the channels of a model.
        data: (inputs, targets).
        loss: a Keras loss or its name, or a list or dictionary of them for several outputs.
        batch_size: examples a gradient.

    Returns:
        Two arrays as of `norm_scores`: by the gates on batch normalizations, and by those on the weights.
    """
    import tensorflow as tf

    assert data is not None
    x, y = data
    model = surgery.as_functional(graph.model)  # Compiling it leaves the user's model alone.
    model.compile(loss=loss)
    scale, kernel = (_by_layer(graph, roles) for roles in (("scale", "shift"), ("kernel", "bias")))
    cuts = [cut for layer in (*scale, *kernel) for cut in layer]
    variables = {id(cut.variable): cut.variable for cut in cuts}

    @tf.function
    def gradients(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in variables.values()])
            value = model.compute_loss(inputs, targets, model(inputs, training=False), training=False)
            value -= sum(keras.ops.sum(loss) for loss in model.losses)  # Regularization is none of the data's.
        return tape.gradient(value, [variable.value for variable in variables.values()])

    count = len(keras.tree.flatten(x)[0])
    totals = [np.zeros(len(graph.root)), np.zeros(len(graph.root))]
    starts = range(0, count, batch_size)
    for start in starts:
        batch = slice(start, start + batch_size)
        inputs, targets = keras.tree.map_structure(lambda array, part=batch: tf.convert_to_tensor(array[part]), (x, y))
        found = dict(zip(variables, gradients(inputs, targets), strict=True))
        for total, layers in zip(totals, (scale, kernel), strict=True):
            for layer in layers:
                gate = np.zeros(len(graph.root))
                for cut in layer:
                    gradient = found[id(cut.variable)]
                    if gradient is not None:
                        product = np.asarray(gradient, "float64") * keras.ops.convert_to_numpy(cut.variable)
                        np.add.at(gate, graph.root[cut.ids], _sum_but(product, cut.axis))
                total += gate**2
    if not all(np.isfinite(total).all() for total in totals):
        raise ValueError(
            "Argument `data` must give a finite loss and finite gradients. Received: NaN or infinity. Look for them in "
            "the inputs, the targets and the model's weights."
        )
    return totals[0] / len(starts), totals[1] / len(starts)


def _by_layer(graph: ChannelGraph, roles: Sequence[str]) -> list[list[Slice]]:
    """Returns the slices of these roles, those of one layer together; of normalizations only batch normalizations."""
    found: dict[tuple[int, int], list[Slice]] = {}
    for cut in graph.slices:
        other = cut.role == "scale" or cut.role == "shift"
        if cut.role in roles and (not other or isinstance(cut.layer, keras.layers.BatchNormalization)):
            found.setdefault((id(cut.layer), id(cut.ids)), []).append(cut)
    return list(found.values())


def _sum_but(array: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(array.sum(axis=tuple(a for a in range(array.ndim) if a != axis)))
