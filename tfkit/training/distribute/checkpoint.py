"""Checkpoints from which a run goes on at the very step: weights, optimizers, metrics, epoch and step."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks, files

FORMAT = "tfkit training state 1"


class Position(NamedTuple):
    """Where a run stands.

    Attributes:
        epoch: the epoch that is under way, from 0.
        step: the steps of it that are done.
    """

    epoch: int
    step: int


START = Position(0, 0)


def variables_of(model: keras.Model) -> list[Any]:
    """Returns all that a step changes: weights, seeds, metrics, and the variables of every optimizer of the model."""
    optimizers = [each for each in vars(model).values() if isinstance(each, keras.optimizers.Optimizer)]
    found = [*model.variables, *model.metrics_variables, *(each for one in optimizers for each in one.variables)]
    return list({id(each): each for each in found}.values())


def value_of(variable: Any) -> np.ndarray:
    """Returns the value of a Keras variable under any strategy; a metric's is summed over the workers."""
    return tf.convert_to_tensor(variable.value).numpy()


def save(model: keras.Model, path: Path, position: Position, *, write: bool = True) -> None:
    """Writes the state, whole or not at all.

    Args:
        model: the model, built, with its optimizer built.
        path: the file; its folder is made.
        position: where the run stands.
        write: whether this worker writes; all must call, since metrics are summed over them.
    """
    arrays = {f"v{index}": value_of(each) for index, each in enumerate(variables_of(model))}
    if not write:
        return
    arrays["about"] = np.array(json.dumps({"format": FORMAT, **position._asdict()}))
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, buffer.getvalue())


def restore(model: keras.Model, path: Path) -> Position | None:
    """Sets the state of the model to that of the file; returns where the run stood, None if there is no file.

    Raises:
        ValueError: the file is not such a state, or that of another model; nothing was changed then.
    """
    if not path.exists():
        return None
    variables = variables_of(model)
    try:
        with np.load(path, allow_pickle=False) as archive:
            about = json.loads(str(archive["about"]))
            arrays = [archive[f"v{index}"] for index in range(len(archive.files) - 1)]
        if about["format"] != FORMAT:
            raise ValueError(about["format"])
        position = Position(checks.integer("epoch", about["epoch"], 0), checks.integer("step", about["step"], 0))
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a training state: {error}. Remove it to start anew.") from None
    shapes = [tuple(each.shape) for each in variables]
    if [each.shape for each in arrays] != shapes or any(each.dtype.kind not in "fiub" for each in arrays):
        raise ValueError(
            f"{path} is the state of another model or optimizer: {len(arrays)} variables for {len(shapes)}, or other "
            "shapes. Remove it to start anew."
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return position


class Checkpointing(keras.callbacks.Callback):
    """Saves the state every so many steps, and after each epoch.

    Args:
        path: the file, on a disk that all workers see.
        every: steps between two saves; None: after each epoch only.
        write: whether this worker writes.
        resumed: the position the run goes on from: its first epoch lacks the steps that are done.
    """

    def __init__(self, path: Path, every: int | None, write: bool, resumed: Position = START) -> None:
        super().__init__()
        self.path, self.every, self.write, self.resumed = path, every, write, resumed
        self.epoch, self.offset, self.saved = resumed.epoch, 0, 0
        self.metrics: list[np.ndarray] | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        self.offset = self.saved = self.resumed.step if epoch == self.resumed.epoch else 0
        if self.metrics is not None:  # `fit` has just reset them: the epoch's averages go on where they were.
            for variable, value in zip(self.model.metrics_variables, self.metrics, strict=True):
                variable.assign(value)
            self.metrics = None

    def on_train_begin(self, logs: Any = None) -> None:
        if self.resumed.step:
            self.metrics = [value_of(each) for each in self.model.metrics_variables]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        done = self.offset + batch + 1
        if self.every is not None and done - self.saved >= self.every:
            self.saved = done
            save(self.model, self.path, Position(self.epoch, done), write=self.write)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        save(self.model, self.path, Position(epoch + 1, 0), write=self.write)
