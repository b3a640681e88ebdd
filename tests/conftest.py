"""Settings and fixtures that the whole suite shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before TensorFlow is imported: quiet, and on the CPU.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("MPLBACKEND", "Agg")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core: its models are too small to share the others' with profit.
    for variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def digits():
    """All of mnist5k: 3,600 training, 400 validation and 1,000 test digits."""
    from tfkit import data

    return data.load("mnist5k")


@pytest.fixture(scope="session")
def tiny_digits(digits):
    """600 training, 200 validation and 200 test digits, each class in proportion."""
    return digits.subset(600, 200, 200)


@pytest.fixture(scope="session")
def trained_digits_model(tiny_digits):
    """A small convolutional network trained on `tiny_digits`, compiled. Clone it before training it further."""
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((28, 28, 1), name="image")
    x = keras.layers.Conv2D(8, 5, strides=2, activation="relu", name="conv")(inputs)
    x = keras.layers.MaxPooling2D(2, name="pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(32, activation="relu", name="hidden")(x)
    model = keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name="tiny")
    model.compile(
        keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    model.fit(tiny_digits.x_train, tiny_digits.y_train, batch_size=32, epochs=8, verbose=0)
    return model


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder `$TFKIT_DATA`; the test is skipped where there is none."""
    folder = os.environ.get("TFKIT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data sets: set TFKIT_DATA to their folder")
    return Path(folder)
