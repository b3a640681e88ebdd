"""Attacks on a detector of blood cells and on a classifier of skeleton clips: success against epsilon.

    python benchmarks/detection_and_video.py            # about 10 minutes on one core
    python benchmarks/detection_and_video.py --quick    # few images and steps: does it run?

BCCD: photographs at 160 x 120; a small convolutional network says for each cell of a grid of 20 x 15, by class, whether
a box has its centre there. Its threshold is the one of the best F1 on validation images; a detection counts if a true
centre of its class lies within one cell, and a centre is found if a detection does. Attacked are test images for which
the goal is not reached already. JHMDB, split 1: skeletons of 15 joints, in units of the normalised body, 32 frames a
clip, attacked where the classifier is right. Needs $TFKIT_DATA.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
from PIL import Image

from benchmarks import common
from benchmarks.common import say
from tfkit.robustness.attacks import PGD, DetectorTask, Square, VideoPGD

LAYERS = keras.layers
WIDTH, HEIGHT, CELL = 160, 120, 8
CELLS = ("RBC", "WBC", "Platelets")
PIXELS = tuple(level / 255 for level in (0.5, 1, 2, 4, 8))
LENGTHS = (0.01, 0.02, 0.05, 0.1, 0.2)
FRAMES = 32
GOALS: dict[str, dict[str, Any]] = {
    "WBC vanish": {"goal": "vanish", "classes": [1]},
    "all vanish": {"goal": "vanish"},
    "platelets appear": {"goal": "appear", "classes": [2]},
    "WBC become platelets": {"goal": "change", "classes": [1], "target": [2]},
}
CLIPS: dict[str, dict[str, Any]] = {
    "per frame": {},
    "shared": {"perturbation": "shared"},
    "8 frames": {"frames": 8},
    "1 frame": {"frames": 1},
}


def blood(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns images, (count, height, width, 3), and which cells hold a centre, (count, rows, columns, 3), by split."""
    with zipfile.ZipFile(path) as archive:
        boxes = list(csv.DictReader(io.TextIOWrapper(archive.open("annotations.csv"), "utf-8")))
        parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for split in ("train", "val", "test"):
            names = sorted({box["image"] for box in boxes if box["split"] == split})
            x = np.zeros((len(names), HEIGHT, WIDTH, 3), np.float32)
            y = np.zeros((len(names), HEIGHT // CELL, WIDTH // CELL, len(CELLS)), np.float32)
            for at, name in enumerate(names):
                with Image.open(io.BytesIO(archive.read(f"images/{name}"))) as image:
                    scale = np.array([HEIGHT / image.height, WIDTH / image.width])
                    x[at] = np.asarray(image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)) / 255
                for box in boxes:
                    if box["image"] == name:
                        centre = np.array([(float(box[a + "min"]) + float(box[a + "max"])) / 2 for a in "yx"])
                        row, column = (centre * scale // CELL).astype(int)
                        y[at, min(row, y.shape[1] - 1), min(column, y.shape[2] - 1), CELLS.index(box["label"])] = 1
            parts[split] = x, y
    return parts


def detector(parts: dict[str, tuple[np.ndarray, np.ndarray]], epochs: int) -> keras.Model:
    """Logits for each cell and class."""
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((HEIGHT, WIDTH, 3))
    for filters, stride in ((16, 2), (32, 2), (48, 2), (48, 1), (48, 1)):
        x = LAYERS.Conv2D(filters, 3, stride, "same", use_bias=False)(x)
        x = LAYERS.ReLU()(LAYERS.BatchNormalization()(x))
    prior = keras.initializers.Constant(-4.0)  # Few cells hold a centre.
    model = keras.Model(inputs, LAYERS.Conv2D(len(CELLS), 1, bias_initializer=prior)(x))
    x_train, y_train = parts["train"]
    mirrored = [x_train, x_train[:, :, ::-1], x_train[:, ::-1]]
    labels = [y_train, y_train[:, :, ::-1], y_train[:, ::-1]]
    loss = keras.losses.BinaryFocalCrossentropy(from_logits=True, gamma=1.0)
    steps = epochs * -(-3 * len(x_train) // 16)
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)), loss)
    model.fit(np.concatenate(mirrored), np.concatenate(labels), batch_size=16, epochs=epochs, verbose=0)
    return model


def near(cells: np.ndarray) -> np.ndarray:
    """Returns which cells, (count, rows, columns, classes), have a marked one within one cell."""
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = cells.shape[1:3]
    return np.any([padded[:, a : a + rows, b : b + columns] for a in range(3) for b in range(3)], axis=0)


def f1(detected: np.ndarray, true: np.ndarray) -> float:
    precision = (detected & near(true)).sum() / max(detected.sum(), 1)
    recall = (true & near(detected)).sum() / max(true.sum(), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def detection(path: Path, quick: bool) -> dict[str, Any]:
    """Success of each goal at each radius, with gradients; and of the first with scores alone."""
    parts = blood(path)
    if quick:
        parts = {split: (x[:16], y[:16]) for split, (x, y) in parts.items()}
    model = detector(parts, 1 if quick else 25)
    true = {split: y > 0 for split, (_, y) in parts.items()}
    scores = {split: model.predict(parts[split][0], verbose=0) for split in ("val", "test")}
    grid = np.linspace(-3, 2, 26)
    threshold = float(grid[np.argmax([f1(scores["val"] >= t, true["val"]) for t in grid])])
    rows: dict[str, Any] = {
        "threshold": threshold,
        "f1": f1(scores["test"] >= threshold, true["test"]),
        "epsilons": PIXELS,
        "success": {},
        "images": {},
    }
    images = parts["test"][0][: 4 if quick else None]

    def read(outputs: Any) -> Any:
        return keras.ops.reshape(outputs, (-1, HEIGHT // CELL * (WIDTH // CELL), len(CELLS)))

    for name, goal in GOALS.items():
        task = DetectorTask(model, read=read, threshold=threshold, **goal)
        x = images[task.attackable(images)]
        rows["images"][name] = len(x)
        if not len(x):
            continue
        attacks: dict[str, Any] = {name: PGD(3 if quick else 40, batch_size=24)}
        if name == "WBC vanish":
            attacks[f"{name}, scores alone"] = Square(max_queries=20 if quick else 500, batch_size=24)
        for label, attack in attacks.items():
            found = [attack(task, x, np.zeros(len(x), int), epsilon=e).success.mean() for e in PIXELS]
            rows["success"][label] = [float(share) for share in found]
            say(f"{label}, {len(x)} images: {rows['success'][label]}")
    return rows


def skeletons(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns clips, (count, FRAMES, 15, 2), and their classes, by split."""
    parts = {}
    with np.load(path, allow_pickle=False) as stored:
        for split in ("train", "test"):
            frames, offsets = stored[f"{split}_frames"], stored[f"{split}_offsets"]
            places = [
                np.linspace(first, last - 1, FRAMES).round().astype(int)
                for first, last in zip(offsets[:-1], offsets[1:], strict=True)
            ]
            parts[split] = frames[np.stack(places)].astype(np.float32), stored[f"{split}_label"].astype(np.int64)
    return parts


def clip_classifier(x: np.ndarray, y: np.ndarray, epochs: int) -> keras.Model:
    """Convolutions over time, to the logits of 14 classes."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(x.shape[1:])
    h = LAYERS.GaussianNoise(0.02)(LAYERS.Reshape((FRAMES, 30))(inputs))
    for filters in (64, 96, 128):
        h = LAYERS.Conv1D(filters, 5, padding="same", use_bias=False)(h)
        h = LAYERS.MaxPooling1D(2)(LAYERS.ReLU()(LAYERS.BatchNormalization()(h)))
    h = LAYERS.Dropout(0.5)(LAYERS.GlobalAveragePooling1D()(h))
    model = keras.Model(inputs, LAYERS.Dense(14)(h))
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, epochs * -(-len(x) // 32))),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    mirrored = x * np.array([-1, 1], np.float32)
    for _ in range(epochs):
        turned = np.where(np.random.random((len(x), 1, 1, 1)) < 0.5, x, mirrored)  # noqa: NPY002  (seeded above)
        model.fit(turned, y, batch_size=32, epochs=1, verbose=0)
    return model


def video(path: Path, quick: bool) -> dict[str, Any]:
    """Success of each kind of perturbation at each radius."""
    parts = skeletons(path)
    model = clip_classifier(*parts["train"], 2 if quick else 80)
    x, y = parts["test"]
    right = model.predict(x, verbose=0).argmax(axis=1) == y
    rows: dict[str, Any] = {"accuracy": float(right.mean()), "epsilons": LENGTHS, "success": {}}
    x, y = x[right], y[right]
    if quick:
        x, y = x[:8], y[:8]
    rows["clips"] = len(x)
    limit = float(np.ceil(max(np.abs(clips).max() for clips, _ in parts.values()) + max(LENGTHS)))
    for label, settings in CLIPS.items():
        attack = VideoPGD(steps=3 if quick else 40, bounds=(-limit, limit), **settings)
        rows["success"][label] = [float(attack(model, x, y, epsilon=e).success.mean()) for e in LENGTHS]
        say(f"{label}, {len(x)} clips: {rows['success'][label]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images and steps; writes no result")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "detection_and_video.json")
    arguments = parser.parse_args()
    if "TFKIT_DATA" not in os.environ:
        parser.error("set TFKIT_DATA to the folder that holds bccd.zip and jhmdb_skeletons.npz")
    folder = Path(os.environ["TFKIT_DATA"])
    results = {
        "video": video(folder / "jhmdb_skeletons.npz", arguments.quick),
        "detection": detection(folder / "bccd.zip", arguments.quick),
    }
    say(json.dumps({name: rows["success"] for name, rows in results.items()}))
    if arguments.quick:
        return
    wanted = {
        "detection": {"vanish": "WBC vanish", "appear": "platelets appear", "change": "WBC become platelets"},
        "video": {"per_frame": "per frame", "shared": "shared", "one_frame": "1 frame"},
    }
    figures = {"detector_f1": results["detection"]["f1"], "clip_accuracy": results["video"]["accuracy"]}
    for task, rows in wanted.items():
        success = results[task]["success"]  # A goal that every image has reached already has no row.
        figures |= {f"{key}_success": success[row][-1] for key, row in rows.items() if row in success}
    common.write_result(
        arguments.out, figures, results=results, seeds=[0],
        data={"detection": "BCCD, 160 x 120 pixels", "video": "JHMDB split 1, skeletons"},
        versions=common.versions("tensorflow", "keras", "numpy", "pillow"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
