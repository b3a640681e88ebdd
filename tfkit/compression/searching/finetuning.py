"""How `tfkit compress` and `tfkit search` train: one recipe, Adam with a cosine decay, for every candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.data import Dataset
from tfkit.internal import checks, surgery

#: Sums of probabilities within this of 1 are taken for a softmax.
SUM_TOLERANCE = 1e-3


#: `augment(x, seed)`: a batch (examples, ...) and an int32 tensor of shape (2,) for `tf.random.stateless_*`.
Augment = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Mirrors and moves images while training; the same seed draws the same.

    Attributes:
        flip: mirror every other image, left to right.
        shift: move each image by up to this many pixels in each direction; what comes into view is zero.
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        checks.integer("shift", self.shift, 0)

    def __call__(self, x: Any, seed: Any) -> Any:
        """Returns a batch of images (examples, height, width, channels), changed; `seed` is int32 of shape (2,)."""
        if self.flip:
            mirrored = tf.random.stateless_uniform((tf.shape(x)[0], 1, 1, 1), seed) < 0.5
            x = tf.where(mirrored, tf.reverse(x, [2]), x)
        if self.shift:
            height, width = x.shape[1], x.shape[2]
            padded = tf.pad(x, [[0, 0], [self.shift] * 2, [self.shift] * 2, [0, 0]])
            start = tf.random.stateless_uniform(
                (2, tf.shape(x)[0], 1), seed + 1, maxval=2 * self.shift + 1, dtype=tf.int32
            )
            rows = tf.gather(padded, start[0] + tf.range(height)[None], batch_dims=1, axis=1)
            x = tf.gather(rows, start[1] + tf.range(width)[None], batch_dims=1, axis=2)
        return x


def describe_function(augment: Augment | None) -> str | None:
    """Returns what stands for an augmentation in a file: its code if it is ours, its name if it is the user's."""
    if augment is None or isinstance(augment, Augmentation):
        return None if augment is None else repr(augment)
    return f"{getattr(augment, '__module__', '')}.{getattr(augment, '__qualname__', type(augment).__name__)}"


class DivergenceError(RuntimeError):
    """Training gave a loss that is not finite."""


class FineTuning:
    """Trains a classifier; call it as `fit(model, callbacks)`, which is what `Compressor.apply` takes.

    Args:
        data: the data set; its training part is used, nothing else.
        epochs: passes over the training part.
        learning_rate: of Adam at the first step; it falls to zero along a cosine.
        batch_size: examples a step.
        loss: `"logits"`, `"softmax"` or `"sigmoid"`: what the model gives; see `output_kind`.
        seed: of the order of the examples, of dropout and of the augmentation.
        augment: changes each batch, `augment(x, seed)`; `Augmentation`, or a function of TensorFlow operations.
        on_epoch: called with the number of epochs done after each.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        epochs: int = 8,
        learning_rate: float = 1e-3,
        batch_size: int = 64,
        loss: str = "logits",
        seed: int = 0,
        augment: Augment | None = None,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        self.data = data
        self.epochs = checks.integer("epochs", epochs, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.loss = checks.choice("loss", loss, ("logits", "softmax", "sigmoid"))
        self.seed = checks.integer("seed", seed, 0)
        self.augment = augment
        self.on_epoch = on_epoch

    def __call__(self, model: keras.Model, callbacks: Sequence[keras.callbacks.Callback] = ()) -> None:
        """Trains `model` in place.

        Raises:
            DivergenceError: if the loss becomes NaN or infinite.
        """
        keras.utils.set_random_seed(self.seed)
        steps = self.epochs * -(-len(self.data.x_train) // self.batch_size)
        schedule = keras.optimizers.schedules.CosineDecay(self.learning_rate, steps)
        loss: keras.losses.Loss = keras.losses.SparseCategoricalCrossentropy(from_logits=self.loss == "logits")
        if self.loss == "sigmoid":
            loss = keras.losses.BinaryCrossentropy()
        model.compile(keras.optimizers.Adam(schedule), loss)
        examples: dict[str, Any] = {
            "x": self.data.x_train, "y": self.data.y_train, "batch_size": self.batch_size
        }  # fmt: skip
        if self.augment is not None:
            steps_per_epoch = steps // self.epochs
            examples = {"x": self._augmented(self.augment), "steps_per_epoch": steps_per_epoch, "shuffle": False}
        model.fit(**examples, epochs=self.epochs, callbacks=[*callbacks, _Watch(self.on_epoch)], verbose=0)

    def _augmented(self, augment: Augment) -> tf.data.Dataset:
        def change(step: Any, example: Any) -> Any:
            # Every step of the training has numbers of its own; two of them, as `Augmentation` uses the next as well.
            seed = tf.stack([tf.constant(self.seed, tf.int32), 2 * tf.cast(step, tf.int32)])
            return augment(example[0], seed), example[1]

        examples = tf.data.Dataset.from_tensor_slices((self.data.x_train, self.data.y_train))
        batches = examples.shuffle(len(self.data.x_train), seed=self.seed).batch(self.batch_size).repeat(self.epochs)
        return batches.enumerate().map(change).prefetch(2)


class _Watch(keras.callbacks.Callback):
    """Stops on a loss that is not finite, and passes the progress on."""

    def __init__(self, on_epoch: Callable[[int], None] | None) -> None:
        super().__init__()
        self.on_epoch = on_epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not np.isfinite(loss):
            raise DivergenceError(
                f"The loss became {loss} in epoch {epoch + 1}. Lower the learning rate, or look for NaN in the data."
            )
        if self.on_epoch is not None:
            self.on_epoch(epoch + 1)


def output_kind(model: keras.Model, x: np.ndarray) -> str:
    """Tells what a classifier gives, from what it gives.

    Args:
        model: a model with one output (batch, classes), or (batch, 1) for two classes.
        x: some inputs, (samples, ...).

    Returns:
        `"logits"`, `"softmax"` (rows of non-negative numbers that sum to 1) or `"sigmoid"` (one column in [0, 1]).
    """
    y = np.asarray(model(x, training=False), dtype=np.float64)
    probabilities = bool((y >= 0).all() and (y <= 1).all())
    if y.shape[-1] == 1:
        return "sigmoid" if probabilities else "logits"
    return "softmax" if probabilities and np.allclose(y.sum(axis=-1), 1.0, atol=SUM_TOLERANCE) else "logits"


def check_fits(model: Any, data: Dataset) -> str:
    """Checks that a model is a classifier of this data set.

    Returns:
        What its output is; see `output_kind`.

    Raises:
        TypeError, ValueError: if the model cannot be rebuilt, or does not fit the data; the message says how.
    """
    model = surgery.as_functional(model)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"Argument `model` must have one input and one output. Received: {len(model.inputs)} inputs and "
            f"{len(model.outputs)} outputs. Use tfkit.compression and tfkit.export directly for such a model."
        )
    wanted = tuple(model.inputs[0].shape[1:])
    fits = len(wanted) == len(data.input_shape) and all(
        n in (None, m) for n, m in zip(wanted, data.input_shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"Argument `model` must take the inputs of the data. Received: model '{model.name}' for inputs of shape "
            f"{wanted}, data '{data.name}' of shape {data.input_shape}. Reshape the data, or name the data set the "
            "model was trained on."
        )
    width = model.outputs[0].shape
    if len(width) != 2 or width[-1] is None:
        raise ValueError(
            f"Argument `model` must be a classifier with outputs of shape (batch, classes). Received: outputs of shape "
            f"{tuple(width)}. End the model in a Dense layer with one unit a class."
        )
    for part in ("train", "validation", "test"):
        if not len(getattr(data, f"x_{part}")):
            raise ValueError(
                f"Argument `data` must have a {part} part. Received: '{data.name}' without one."
                + (" Load it with validation=0.1." if part == "validation" else "")
            )
    kind = output_kind(model, data.x_train[:64])
    highest = max(int(getattr(data, f"y_{part}").max()) for part in ("train", "validation", "test"))
    classes = 2 if width[-1] == 1 else int(width[-1])
    if highest >= classes:
        raise ValueError(
            f"Argument `model` must have an output for each class. Received: model '{model.name}' with "
            f"{width[-1]} outputs, data '{data.name}' with label {highest}."
        )
    if width[-1] == 1 and kind != "sigmoid":
        raise ValueError(
            "Argument `model` must end in a sigmoid if it has a single output, whose label is then output > 0.5. "
            "Received: a single output beyond [0, 1]. Add keras.layers.Activation('sigmoid')."
        )
    return kind
