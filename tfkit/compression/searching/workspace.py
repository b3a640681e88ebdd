"""The output folder of a search: what is finished is kept, so that an interrupted run goes on where it stopped.

Every file is written whole or not at all, and `results.json` last: a folder that has it is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfkit.data import Dataset
from tfkit.export.pack import SUFFIX

CANDIDATES, MODELS, STATE = "candidates", "models", "state"
RUN = "run.json"
RESULTS, REPORT, BEST, BEST_PACKED = "results.json", "report.html", "best.tflite", f"best{SUFFIX}"


class Workspace:
    """The folder of one search.

    Args:
        folder: where to write; made if absent.
        configuration: all that shapes a candidate, as plain values; a run with the same one is resumed.
        force: replace the results that are there.
        resume: go on with an interrupted run of the same configuration; otherwise it counts as results that are there.

    Raises:
        FileExistsError: the folder is not empty, is not such a run, and `force` is False.
    """

    def __init__(
        self, folder: str | os.PathLike[str], configuration: Mapping[str, Any], *, force: bool, resume: bool
    ) -> None:
        self.folder = Path(folder)
        self.resumed = False
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"Argument `out` must be a folder. Received: the file {self.folder}.")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self.resumed = resume and self._is_interrupted(configuration)
            if not self.resumed:
                if not force:
                    raise FileExistsError(self._refusal(configuration))
                self._clear()
        for name in (CANDIDATES, MODELS, STATE):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            write_json(self.folder / STATE / RUN, configuration)

    def _is_interrupted(self, configuration: Mapping[str, Any]) -> bool:
        return not (self.folder / RESULTS).exists() and self._earlier() == json.loads(json.dumps(configuration))

    def _earlier(self) -> Any:
        return read_json(self.folder / STATE / RUN)

    def _refusal(self, configuration: Mapping[str, Any]) -> str:
        remedy = "Pass force=True (--force) to replace them, or choose another folder."
        earlier = self._earlier()
        if not isinstance(earlier, dict):
            return f"The folder {self.folder} is not empty. Choose another folder, or pass force=True (--force)."
        if (self.folder / RESULTS).exists():
            return f"The folder {self.folder} holds the results of a finished run. {remedy}"
        wanted = json.loads(json.dumps(configuration))
        differing = [key for key in sorted({*earlier, *wanted}) if earlier.get(key) != wanted.get(key)]
        what = f"with another {', '.join(differing)}" if differing else "of the same configuration"
        return f"The folder {self.folder} holds an interrupted run {what}. {remedy}"

    def _clear(self) -> None:
        if self._earlier() is None:
            return  # Not a folder of ours: its other files are not ours to remove.
        # The mark that this folder is ours goes last, so that a clearing cut short can be taken up again.
        for name in (RESULTS, REPORT, BEST, BEST_PACKED):
            (self.folder / name).unlink(missing_ok=True)
        for name in (CANDIDATES, MODELS, STATE):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def candidate(self, name: str) -> Path:
        """Returns the path of a candidate's file."""
        return self.folder / CANDIDATES / f"{name}.tflite"

    def record(self, name: str) -> dict[str, Any] | None:
        """Returns what was saved of a finished candidate; None if it is not finished or its file has changed."""
        record = read_json(self.folder / STATE / f"{name}.json")
        path = self.candidate(name)
        if not isinstance(record, dict) or not path.is_file() or not path.with_suffix(SUFFIX).is_file():
            return None
        return record if record.get("sha256") == sha256_of(path) else None

    def save_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Marks a candidate as finished."""
        write_json(self.folder / STATE / f"{name}.json", record)

    def note(self, name: str) -> Any:
        """Returns what was noted of a run; None if nothing was."""
        return read_json(self.folder / STATE / f"_{name}.json")

    def save_note(self, name: str, value: Any) -> None:
        """Notes something that a run which goes on must find as it was."""
        write_json(self.folder / STATE / f"_{name}.json", value)

    def has_model(self, name: str) -> bool:
        """Whether the model of a stage is there."""
        return (self.folder / MODELS / f"{name}.keras").is_file()

    def load_model(self, name: str) -> keras.Model | None:
        """Returns the model of a finished stage; None if there is none that can be read."""
        path = self.folder / MODELS / f"{name}.keras"
        if not path.is_file():
            return None
        try:
            return keras.saving.load_model(path, compile=False)
        except Exception:  # Whatever is wrong with it, training it again is right.
            return None

    def save_model(self, name: str, model: keras.Model) -> None:
        """Saves the model of a finished stage."""
        with _replacing(self.folder / MODELS / f"{name}.keras") as temporary:
            model.save(temporary)


def hash_of_model(model: keras.Model) -> str:
    """Returns the SHA-256 of a model's architecture and weights."""
    digest = hashlib.sha256(json.dumps(json.loads(model.to_json())["config"], sort_keys=True).encode())
    for value in model.get_weights():
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def hash_of_data(data: Dataset) -> str:
    """Returns the SHA-256 of all the arrays of a data set."""
    digest = hashlib.sha256()
    for part in ("train", "validation", "test"):
        for array in (getattr(data, f"x_{part}"), getattr(data, f"y_{part}")):
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; None if there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all."""
    with _replacing(target) as temporary:
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    # Keras looks at the suffix, so the temporary name keeps it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
