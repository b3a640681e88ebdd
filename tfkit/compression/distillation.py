"""Knowledge distillation: a small model learns from what a large one says, and from how it sees.

Paper: Hinton, Vinyals, Dean. Distilling the knowledge in a neural network. 2015, https://arxiv.org/abs/1503.02531
(outputs softened by a temperature); Romero et al. FitNets: hints for thin deep nets. ICLR 2015,
https://arxiv.org/abs/1412.6550 (features, by a learned regressor).

Differs: the divergence of the softened outputs stands for their cross-entropy; the two differ by the teacher's entropy,
which has no gradient. FitNets trains the student's first half on the hint before the rest; here both losses are
minimised together, and the hint's squares are averaged, so that its weight does not depend on the layer's size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras

from tfkit.compression.base import Fit
from tfkit.internal import checks, surgery

Outputs = Literal["auto", "logits", "probabilities"]
#: Between a softmax and the model's output, these leave probabilities what they are.
PASSING = {"Reshape", "Identity", "FakeQuantize", "Flatten"}
SQUASHING = {"softmax", "sigmoid"}


@keras.saving.register_keras_serializable(package="tfkit")
class DistillationLoss(keras.losses.Loss):
    """T^2 KL(softmax(t / T) || softmax(s / T)) of teacher's logits t and student's logits s.

    Its gradient by s is T (softmax(s / T) - softmax(t / T)): the factor T^2 keeps it of one size whatever T is, so that
    its weight beside other losses need not change. A single output is taken as the logit of the second of two classes.

    Args:
        temperature: T, more than 0; the higher, the more the small probabilities of the teacher count.
        reduction, name: see `keras.losses.Loss`.
    """

    def __init__(
        self, temperature: float = 4.0, reduction: str = "sum_over_batch_size", name: str = "distillation"
    ) -> None:
        super().__init__(reduction=reduction, name=name)
        if checks.number("temperature", temperature, 0) == 0:
            raise checks.error("temperature", "more than 0", temperature, "T=1 leaves the outputs as they are.")
        self.temperature = temperature

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each example, (batch, ...), from logits (batch, ..., classes) of teacher and student."""
        if y_pred.shape[-1] == 1:
            y_true, y_pred = (keras.ops.concatenate([keras.ops.zeros_like(z), z], axis=-1) for z in (y_true, y_pred))
        teacher = keras.ops.log_softmax(y_true / self.temperature)
        student = keras.ops.log_softmax(y_pred / self.temperature)
        return self.temperature**2 * keras.ops.sum(keras.ops.exp(teacher) * (teacher - student), axis=-1)

    def get_config(self) -> dict[str, Any]:
        return {"temperature": self.temperature, **super().get_config()}


@keras.saving.register_keras_serializable(package="tfkit")
class FeatureHint(keras.layers.Layer):
    """The mean squared distance of a student's features from a teacher's, over which it is made a loss.

    Where the numbers of channels differ, a linear map (1x1 convolution) of the student's channels is learned with it;
    where maps differ in height and width, the teacher's are resized. Calling it on (batch, ..., channels) of either
    gives a distance for each example, (batch,). It takes no part in the finished student.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_mask(self, *inputs: Any) -> None:
        """Distances have no mask: what was masked is left out of them."""

    def build(self, student_shape: Sequence[int | None], teacher_shape: Sequence[int | None]) -> None:
        if len(student_shape) != len(teacher_shape) or len(student_shape) < 2:
            raise ValueError(
                "Argument `feature_pairs` must name layers whose outputs have as many axes. Received, for "
                f"'{self.name}': {tuple(student_shape)} of the student, {tuple(teacher_shape)} of the teacher."
            )
        if student_shape[1:-1] != teacher_shape[1:-1] and len(student_shape) != 4:
            raise ValueError(
                "Argument `feature_pairs` must name layers whose outputs are of one size, save for channels; only "
                f"images are resized. Received, for '{self.name}': {tuple(student_shape)} of the student, "
                f"{tuple(teacher_shape)} of the teacher."
            )
        self.projection = None
        if student_shape[-1] != teacher_shape[-1]:
            self.projection = keras.layers.Dense(teacher_shape[-1], name="projection")
            self.projection.build(student_shape)

    def call(self, student: Any, teacher: Any) -> Any:
        mask = getattr(student, "_keras_mask", None)
        teacher = keras.ops.stop_gradient(keras.ops.cast(teacher, self.compute_dtype))
        if self.projection is not None:
            student = self.projection(student)
        if student.shape[1:-1] != teacher.shape[1:-1]:
            teacher = keras.ops.image.resize(teacher, student.shape[1:3], antialias=True, data_format="channels_last")
        distance = keras.ops.mean(keras.ops.square(student - teacher), axis=-1)
        axes = tuple(range(1, len(distance.shape)))
        if mask is None or len(mask.shape) != len(distance.shape):
            return keras.ops.mean(distance, axis=axes) if axes else distance
        valid = keras.ops.cast(mask, distance.dtype)
        return keras.ops.sum(distance * valid, axis=axes) / keras.ops.maximum(keras.ops.sum(valid, axis=axes), 1.0)


class Distiller(keras.Model):
    """Trains a student by `compile` and `fit` as ever, with a teacher's outputs, and features, as further targets.

    The loss of a training step is (1 - alpha) times the compiled one, alpha times `DistillationLoss`, `feature_weight`
    times the mean of the hints, and whatever the student adds by `add_loss` and regularizers. Evaluation and
    `validation_data` see the student's own, compiled loss; metrics are of the student's outputs. Weights of samples and
    classes, and masks, count in all parts. The student's weights are trained in place; the teacher's are only read.

    The student may be of any kind, prepared by a compressor for one; its callbacks find its layers through the
    distiller. To use distillation in `compressor.apply`, see `distill`. Save `distiller.student`; weights alone may be
    saved by the distiller too.

    >>> def network(units):
    ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(3)])
    >>> distiller = Distiller(network(2), network(8), temperature=2.0, alpha=0.7)
    >>> distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = distiller.fit(keras.ops.ones((6, 4)), keras.ops.zeros((6,)), verbose=0)
    >>> student = distiller.student

    Args:
        student: the model to train.
        teacher: a trained Keras model on the same inputs, with outputs of the same shapes.
        temperature: see `DistillationLoss`.
        alpha: share of the teacher's outputs in the loss, in [0, 1]. At 0 training is that of the student alone, bit
            for bit, unless there are hints; at 1 no labels are needed.
        feature_pairs: names of layers, (the student's, the teacher's), whose outputs are to be alike.
        feature_weight: of the hints.
        student_outputs, teacher_outputs: `"logits"`, or `"probabilities"` after a softmax (or a sigmoid, for a single
            output), or `"auto"`: probabilities where the last layer says so. Write it where a subclassed model gives
            probabilities.
        name: of the model.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        *,
        temperature: float = 4.0,
        alpha: float = 0.5,
        feature_pairs: Sequence[tuple[str, str]] = (),
        feature_weight: float = 1.0,
        student_outputs: Outputs = "auto",
        teacher_outputs: Outputs = "auto",
        name: str = "distiller",
    ) -> None:
        super().__init__(name=name)
        for argument, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, keras.Model):
                raise TypeError(f"Argument `{argument}` must be a Keras 3 model. Received: {type(model).__name__}.")
        if student is teacher:
            raise ValueError(
                "Argument `teacher` must be another model than `student`. Received: the same. "
                "Copy it first: `keras.models.clone_model`, then `set_weights`."
            )
        self.alpha = checks.number("alpha", alpha, 0, 1)
        self.feature_weight = checks.number("feature_weight", feature_weight, 0)
        self.distillation_loss = DistillationLoss(temperature)
        self.student = student
        self._student_kind = _kind("student_outputs", student_outputs, student)
        self._teacher_kind = _kind("teacher_outputs", teacher_outputs, teacher)
        # Behind a plain object Keras does not see it: it is neither trained nor saved, nor is its `trainable` touched.
        self._hidden = _Hidden(teacher)
        self._hidden.student_layers = [_find("student", student, pair[0]) for pair in feature_pairs]
        self._hidden.teacher_layers = [_find("teacher", teacher, pair[1]) for pair in feature_pairs]
        self.hints = [FeatureHint(name=f"hint_{i}") for i in range(len(feature_pairs))]
        self.supports_masking = True

    @property
    def teacher(self) -> keras.Model:
        """The teacher, which is only read."""
        return self._hidden.teacher

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns the student's outputs."""
        with _captured(self._hidden.student_layers) as features:
            outputs = self.student(inputs, training=training)
        self._hidden.features = features
        if not all(hint.built for hint in self.hints):
            _, taught = self._teach(inputs)
            self._distances(features, taught)
        return outputs

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return self.student.compute_mask(inputs, previous_mask)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Returns the loss of a batch: see the class. In evaluation it is the student's own."""
        hinting = bool(self.hints) and self.feature_weight > 0
        if not training or (self.alpha == 0 and not hinting):
            return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        added = sum((keras.ops.sum(loss) for loss in self.losses), start=keras.ops.zeros(()))
        total = added
        if self.alpha < 1:
            own = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
            total = added + (1 - self.alpha) * (own - added)
        features = self._hidden.features
        taught_outputs, taught = self._teach(x)
        if self.alpha > 0:
            total = total + self.alpha * self._soft_loss(taught_outputs, y_pred, sample_weight)
        if hinting:
            weight = _example_weight(sample_weight)
            for distance in self._distances(features, taught):
                weighted = distance if weight is None else distance * keras.ops.cast(weight, distance.dtype)
                total = total + self.feature_weight / len(self.hints) * keras.ops.mean(weighted)
        return total

    def _teach(self, inputs: Any) -> tuple[Any, list[Any]]:
        with _captured(self._hidden.teacher_layers) as features:
            outputs = self._hidden.teacher(inputs, training=False)
        return keras.tree.map_structure(keras.ops.stop_gradient, outputs), features

    def _distances(self, features: Sequence[Any], taught: Sequence[Any]) -> list[Any]:
        return [hint(ours, theirs) for hint, ours, theirs in zip(self.hints, features, taught, strict=True)]

    def _soft_loss(self, taught: Any, outputs: Any, sample_weight: Any) -> Any:
        theirs, ours = keras.tree.flatten(taught), keras.tree.flatten(outputs)
        if [tuple(t.shape[1:]) for t in theirs] != [tuple(t.shape[1:]) for t in ours]:
            raise ValueError(
                "Argument `teacher` must give outputs of the shapes of the student's. Received: "
                f"{[tuple(t.shape) for t in theirs]} of the teacher, {[tuple(t.shape) for t in ours]} of the student."
            )
        weights = keras.tree.flatten(sample_weight)
        if len(weights) != len(ours):
            weights = [sample_weight] * len(ours)
        total = 0.0
        for teacher, student, weight in zip(theirs, ours, weights, strict=True):
            logits = _logits(student, self._student_kind)
            mask = getattr(student, "_keras_mask", None)
            if mask is not None:
                logits._keras_mask = mask  # The loss leaves masked positions out.
            total = total + self.distillation_loss(_logits(teacher, self._teacher_kind), logits, weight)
        return total

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError(
            "A Distiller is for training only, and is not saved. Save `distiller.student`; in ModelCheckpoint, pass "
            "save_weights_only=True."
        )


def distill(teacher: keras.Model, fit: Fit, **settings: Any) -> Fit:
    """Returns a function that trains a model as `fit` does, with a teacher: for `compressor.apply(model, ...)`.

    Args:
        teacher: often the model before its compression.
        fit: compiles and trains a model: `fit(model, callbacks)`. It receives the distiller.
        **settings: of `Distiller`.

    >>> from tfkit.compression import MagnitudePruning
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> def fit(model, callbacks):
    ...     model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ...     model.fit(keras.ops.ones((6, 4)), keras.ops.zeros((6,)), callbacks=callbacks, verbose=0)
    >>> pruned = MagnitudePruning(0.5).apply(model, distill(model, fit, alpha=0.9))
    """

    def train(model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> Any:
        return fit(Distiller(model, teacher, **settings), callbacks)

    return train


class _Hidden:
    """What Keras must not take for parts of the distiller."""

    def __init__(self, teacher: keras.Model) -> None:
        self.teacher = teacher
        self.student_layers: list[keras.Layer] = []
        self.teacher_layers: list[keras.Layer] = []
        self.features: list[Any] = []


@contextlib.contextmanager
def _captured(layers: Sequence[Any]) -> Iterator[list[Any]]:
    """Gives a list that holds, afterwards, the last output of each layer in what was called meanwhile.

    It works inside any model, subclassed and nested ones too, and needs no second pass.
    """
    found: dict[int, Any] = {}
    features: list[Any] = []

    def recording(layer: Any) -> Any:
        original = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            found[id(layer)] = original(*args, **kwargs)
            return found[id(layer)]

        return call

    try:
        for layer in layers:
            if "call" not in vars(layer):
                vars(layer)["call"] = recording(layer)
        yield features
    finally:
        for layer in layers:
            vars(layer).pop("call", None)
    missing = [layer.name for layer in layers if id(layer) not in found]
    if missing:
        raise ValueError(f"Argument `feature_pairs` must name layers that the model calls. Received: {missing}.")
    features.extend(keras.tree.flatten(found[id(layer)])[0] for layer in layers)


def _find(side: str, model: keras.Model, name: str) -> keras.Layer:
    layers = [layer for layer in model._flatten_layers(include_self=False) if layer.name == name]
    if not layers:
        names = [layer.name for layer in model._flatten_layers(include_self=False)]
        raise ValueError(
            f"Argument `feature_pairs` must name a layer of the {side} there. Received: '{name}'. Its layers: {names}."
        )
    return layers[0]  # A wrapper comes before the layer of the same name in it.


def _kind(argument: str, given: str, model: Any) -> str:
    checks.choice(argument, given, ("auto", "logits", "probabilities"))
    if given != "auto" or not surgery.is_graph(model) or not model.built:
        return given
    for tensor in keras.tree.flatten(surgery.as_functional(model).output):
        while True:
            operation = tensor._keras_history.operation
            if surgery.is_graph(operation):
                return _kind(argument, given, operation)
            layer = surgery.source(operation)
            kind = type(layer).__name__
            if surgery.activation_name(layer) in SQUASHING or kind.lower() in SQUASHING:
                return "probabilities"
            node = operation._inbound_nodes[tensor._keras_history.node_index]
            linear = kind == "Activation" and surgery.activation_name(layer) == "linear"
            if not (kind in PASSING or linear) or len(node.input_tensors) != 1:
                break
            tensor = node.input_tensors[0]
    return "auto"


def _logits(outputs: Any, kind: str) -> Any:
    """Returns logits in single precision; Keras keeps those that went into a softmax with what came out."""
    kept = getattr(outputs, "_keras_logits", None)
    if kind != "logits" and kept is not None:
        return keras.ops.cast(kept, "float32")
    outputs = keras.ops.cast(outputs, "float32")
    if kind != "probabilities":
        return outputs
    small = keras.config.epsilon()
    log = keras.ops.log(keras.ops.clip(outputs, small, 1.0))
    return log - keras.ops.log(keras.ops.clip(1 - outputs, small, 1.0)) if outputs.shape[-1] == 1 else log


def _example_weight(sample_weight: Any) -> Any:
    """Returns one weight an example, (batch,), from the weights of the first output, or None."""
    weights = [w for w in keras.tree.flatten(sample_weight) if w is not None]
    if not weights:
        return None
    axes = tuple(range(1, len(weights[0].shape)))
    return keras.ops.mean(weights[0], axis=axes) if axes else weights[0]
