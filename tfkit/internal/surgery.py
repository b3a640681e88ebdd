"""Model surgery: copy a Keras model while replacing layers and intercepting calls.

Every method that changes a model's structure goes through `rebuild`, so that nested models, shared layers, multiple
inputs and structured outputs are handled in one place, and the model that was given is never touched.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

Replace = Callable[[keras.Layer], keras.Layer | None]
Call = Callable[..., Any]

#: Layers whose weights are worth compressing, and the names those weights carry in Keras.
WEIGHT_LAYERS: tuple[type[keras.Layer], ...] = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    keras.layers.LSTMCell,
    keras.layers.GRUCell,
    keras.layers.SimpleRNNCell,
    keras.layers.Embedding,
)
WEIGHT_NAMES = frozenset({"kernel", "depthwise_kernel", "pointwise_kernel", "recurrent_kernel", "embeddings"})


def source(layer: Any) -> Any:
    """Returns the layer behind a `Reparameterized` wrapper, or the layer itself."""
    return layer.layer if getattr(layer, "is_reparameterized", False) else layer


def is_graph(model: Any) -> bool:
    """Whether `model` is a functional or sequential Keras 3 model, i.e. a graph of layers that can be rebuilt."""
    return isinstance(model, keras.Sequential) or (isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth"))


def as_functional(model: keras.Model) -> keras.Model:
    """Returns a functional view of a functional or built sequential model; the layers are shared, not copied.

    Raises:
        TypeError: if `model` is not a Keras 3 model, or is a subclassed one.
        ValueError: if a sequential model has not been built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Argument `model` must be a Keras 3 model. Received: {type(model).__module__}.{type(model).__name__}. "
            "Load a tf_keras model's weights into a Keras 3 model of the same architecture first."
        )
    if not is_graph(model):
        raise TypeError(
            f"Argument `model` must be a functional or sequential model, since its layers are replaced one by one. "
            f"Received: the subclassed model '{model.name}' of type {type(model).__name__}. If its `call` only chains "
            "layers, write `inputs = keras.Input(shape); model = keras.Model(inputs, model.call(inputs))`; pass that."
        )
    if not model.built or not getattr(model, "inputs", None):
        raise ValueError(
            f"Argument `model` must be built. Received: the unbuilt sequential model '{model.name}'. "
            "Start it with `keras.Input(shape)`, or call it once on data."
        )
    # The constructor of the base class gives a model without the compile state, loss and metrics of the original.
    if isinstance(model, keras.Sequential):
        # `input` and `output` of a nested sequential model are those of the place where it is called.
        return keras.Model(_single(model.inputs), _single(model.outputs), name=model.name)
    return keras.Model(model.input, model.output, name=model.name)


def _single(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors


def unbuilt_copy(layer: keras.Layer, **overrides: Any) -> Any:
    """Returns a new layer of the same configuration, without weights.

    Args:
        layer: any layer with a complete `get_config`.
        **overrides: configuration entries to change.

    Raises:
        TypeError: the layer cannot be made from its configuration; the message says what it takes.
    """
    # A Lambda's function is already in memory, so there is nothing to be safe from.
    options = {"safe_mode": False} if isinstance(layer, keras.layers.Lambda) else {}
    try:
        config = layer.get_config()
        for name in ("activation", "recurrent_activation"):
            function = getattr(layer, name, None)
            # As it is: a lambda or a function that is not registered could not be made from its name.
            if name in config and callable(function) and not isinstance(function, keras.Layer):
                config[name] = function
        return layer.__class__.from_config({**config, **overrides}, **options)
    except Exception as error:  # A layer of the user's own raises what it will.
        raise TypeError(
            f"Argument `model` must hold layers that can be made anew from their configuration. Received: layer "
            f"'{layer.name}' of type {type(layer).__name__}, which cannot "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Give a class of your own a `get_config` "
            "with all the arguments of its constructor, and register what it holds with "
            "`keras.saving.register_keras_serializable`; lambdas cannot be."
        ) from error


def copy_layer(layer: keras.Layer, **overrides: Any) -> keras.Layer:
    """Returns a new layer of the same configuration, built and with the same weights, if `layer` was built.

    Args:
        layer: any layer with a complete `get_config`.
        **overrides: configuration entries to change; they must not change the shapes of the weights.
    """
    clone = unbuilt_copy(layer, **overrides)
    build_config = layer.get_build_config()
    if layer.built and build_config and layer.weights:
        clone.build_from_config(build_config)
        copy_weights(layer, clone)
    return clone


def copy_weights(source: keras.Layer, target: keras.Layer) -> None:
    """Copies all weights, and what layers such as Normalization derive from them."""
    target.set_weights(source.get_weights())
    if hasattr(target, "finalize_state"):
        target.finalize_state()


def rebuild(
    model: keras.Model, replace: Replace | None = None, call: Call | None = None, *, inline: bool = False
) -> keras.Model:
    """Copies a model layer by layer; weights are copied too, and nothing is shared with the original.

    Args:
        model: a functional or built sequential model; nested models are rebuilt in the same way, and a layer used
            several times is replaced once and stays shared.
        replace: gives the layer to use instead of the one it receives, or None for a plain copy. The result must be
            built and carry its own weights.
        call: `call(original_layer, new_layer, *args, **kwargs)` gives the outputs of one node of the graph; by default
            `new_layer(*args, **kwargs)`. Insert layers, or drop one by returning its input, here.
        inline: put the layers of nested models into one flat graph; a name that occurs twice gets its model's in front.

    Returns:
        A new, uncompiled functional model with the same name, inputs and outputs.
    """
    originals: dict[int, keras.Layer] = {}
    copies: dict[int, keras.Layer] = {}
    fresh: list[tuple[keras.Layer, keras.Layer]] = []
    names: set[str] = set()

    def clone(layer: Any, scope: str) -> Any:
        if id(layer) in copies:
            return copies[id(layer)]
        if not isinstance(layer, keras.Layer):
            return layer  # A keras.ops operation: it has no state to copy.
        if is_graph(layer):
            new = layer if inline else run(as_functional(layer), scope)
        else:
            new = replace(layer) if replace is not None else None
            if new is None:
                new = unbuilt_copy(layer)
                fresh.append((layer, new))
            if inline and new.name in names:
                new.name = f"{scope}_{new.name}"
            names.add(new.name)
        copies[id(layer)] = new
        originals[id(new)] = layer
        return new

    def run(graph: keras.Model, scope: str, inputs: Any = None) -> Any:
        def invoke(new: Any, *args: Any, **kwargs: Any) -> Any:
            if is_graph(new):
                return run(as_functional(new), new.name, args[0]) if inline else new(*args, **kwargs)
            if call is None:
                return new(*args, **kwargs)
            original = originals.get(id(new), new)
            if not args and isinstance(original, keras.Layer):
                first = original.call_signature_parameters[0]
                args, kwargs = (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}
            return call(original, new, *args, **kwargs)

        tensors = inputs
        if inputs is None:
            tensors = keras.tree.map_structure(
                lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name), graph.input
            )
        # What `keras.models.clone_model` does, without its compile step and with nested models under our control.
        outputs = graph._run_through_graph(tensors, operation_fn=lambda layer: clone(layer, scope), call_fn=invoke)
        return outputs if inputs is not None else keras.Model(tensors, outputs, name=graph.name)

    view = as_functional(model)
    if type(model).train_step is not keras.Model.train_step:
        warnings.warn(
            f"The copy of model '{model.name}' is a plain functional model: the `train_step` of "
            f"{type(model).__name__} does not come with it.",
            UserWarning,
            stacklevel=3,
        )
    result = run(view, view.name)
    for layer, new in fresh:
        if layer.weights and new.built:  # A layer that `call` dropped was never built.
            copy_weights(layer, new)
    return result


def sole_consumers(model: keras.Model) -> dict[int, Any]:
    """Maps `id(layer)` to the one operation that reads the output of a layer.

    Layers that are called more than once, or read by one that is, whose output is read by several operations, or whose
    output leaves the graph are left out. Nested models are opened.
    """
    graphs = _graphs(as_functional(model))
    calls = collections.Counter(id(node.operation) for graph in graphs for node in _nodes(graph))
    consumers: dict[int, Any] = {}
    for graph in graphs:
        readers: dict[int, list[Any]] = {}
        for node in _nodes(graph):
            for tensor in node.input_tensors:
                readers.setdefault(id(tensor), []).append(node.operation)
        leaving = {id(tensor) for tensor in graph.outputs}
        for node in _nodes(graph):
            reading = readers.get(id(node.outputs[0]), [])
            alone = len(node.outputs) == len(reading) == 1 and id(node.outputs[0]) not in leaving
            if alone and not is_graph(node.operation) and calls[id(node.operation)] == calls[id(reading[0])] == 1:
                consumers[id(node.operation)] = reading[0]
    return consumers


def _nodes(graph: keras.Model) -> list[Any]:
    return [node for depth in graph._nodes_by_depth.values() for node in depth if not node.is_input]


def _graphs(graph: keras.Model) -> list[keras.Model]:
    """Returns a graph and the nested ones, each once."""
    found, seen = [graph], set()
    for outer in found:  # Grows while it is walked.
        for node in _nodes(outer):
            if is_graph(node.operation) and id(node.operation) not in seen:
                seen.add(id(node.operation))
                found.append(as_functional(node.operation))
    return found


def leaf_layers(model: keras.Model) -> Iterator[keras.Layer]:
    """Yields each layer of a model once, nested models opened, input layers left out, in graph order."""
    seen: set[int] = set()

    def walk(graph: keras.Model) -> Iterator[keras.Layer]:
        for layer in graph.layers:
            if id(layer) in seen or isinstance(layer, keras.layers.InputLayer):
                continue
            seen.add(id(layer))
            if is_graph(layer):
                yield from walk(layer)
            else:
                yield layer

    yield from walk(model)


def compressible_weights(layer: keras.Layer) -> dict[str, keras.Variable]:
    """Returns the weights of a layer, or of the layers inside it, that compression may transform.

    The keys are paths of attributes: `kernel`, `_query_dense/kernel`, `forward_layer/cell/recurrent_kernel`; a layer in
    a list goes by its position. Unlike the names of inner layers, they are the same in every copy. Biases,
    normalisation parameters and statistics are left out: they are few, and TFLite stores them in 32 bits anyway.
    """
    found: dict[str, keras.Variable] = {}
    seen: set[int] = set()

    def walk(owner: keras.Layer, prefix: str) -> None:
        seen.add(id(owner))
        if isinstance(owner, WEIGHT_LAYERS):
            for variable in (*owner._trainable_variables, *owner._non_trainable_variables):
                if variable.name in WEIGHT_NAMES:
                    found[prefix + variable.name] = variable
        attributes = {id(value): name for name, value in reversed(list(vars(owner).items()))}
        for position, child in enumerate(owner._layers):
            if id(child) not in seen:
                walk(child, f"{prefix}{attributes.get(id(child), position)}/")

    walk(layer, "")
    return found


def constraint_name(layer: keras.Layer, weight: str) -> str:
    """Returns the constructor argument that sets the constraint of a layer's own weight."""
    depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
    return "depthwise_constraint" if depthwise else f"{weight}_constraint"


def activation_name(layer: Any) -> str:
    """Returns the name of a layer's own activation; "linear" where it has none."""
    return function_name(getattr(layer, "activation", None))


def function_name(activation: Any) -> str:
    """Returns the name of an activation: of a function as Keras writes it, of a layer its class."""
    if activation is None:
        return "linear"
    return (
        type(activation).__name__
        if isinstance(activation, keras.Layer)
        else str(keras.activations.serialize(activation))
    )
