"""Compares the objectives of GANs: modes of a grid of Gaussians, and distances on Fashion-MNIST.

    python benchmarks/gans.py                 # everything; hours on one core, resumable
    python benchmarks/gans.py --part grid     # the 25 Gaussians only: about half an hour
    python benchmarks/gans.py --quick         # few steps: does it run?

Every objective has the same networks, optimizers, batches and seeds, and as many steps of the generator; WGAN and
WGAN-GP take five steps of the discriminator for each, as their papers do. On the grid, networks are perceptrons of two
hidden layers, and a mode is covered if 20 of 2,500 points fall to it. On Fashion-MNIST they are DCGAN's, and distances
are on features of a convolutional network trained on the same training images; the real images are the test set.
Nothing was tuned on it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import kept
from tfkit import data, models
from tfkit.training import gans
from tfkit.training.gans import networks, plots

SEEDS = (0, 1, 2)
#: The two that the issue compares, then the others.
IMAGE_OBJECTIVES = ("non_saturating", "hinge", "lsgan", "wgan_gp", "r1", "relativistic")


def on_grid(objective: str, seed: int, steps: int) -> tuple[dict[str, Any], np.ndarray]:
    """Trains on 25 Gaussians; returns the row and 2,500 generated points."""
    mixture = gans.grid()
    keras.utils.set_random_seed(seed)
    gan = gans.GAN(
        networks.mlp_generator(2, 16, 128, 2, seed=seed),
        networks.mlp_discriminator(2, 128, 2, spectral=objective == "hinge", seed=seed + 1),
        objective, ema=0.99, seed=seed, penalty_weight=0.1 if objective in ("r1", "wgan_gp") else None,
    )  # fmt: skip
    gan.compile(
        keras.optimizers.Adam(1e-3, beta_1=0.5), keras.optimizers.Adam(2e-3, beta_1=0.5), steps_per_execution=50
    )
    size = 128 * gan.discriminator_steps
    points = mixture.sample(size * min(steps, 500), seed) / 4  # to about unit scale
    gan.fit(points, batch_size=size, epochs=max(steps // 500, 1), verbose=0)
    made = gan.generate(2500, seed=seed) * 4
    if not np.isfinite(made).all():
        made = np.zeros_like(made)
    found = mixture.coverage(made, least=20)  # a fifth of its share: stray points cover nothing
    return {"objective": objective, "seed": seed, "steps": steps, **found._asdict()}, made


def on_images(objective: str, seed: int, x: np.ndarray, epochs: int, judge: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Trains on images; returns the row and generated images."""
    keras.utils.set_random_seed(seed)
    gan = gans.GAN(
        networks.dcgan_generator(x.shape[1:], 64, 32, seed=seed),
        networks.dcgan_discriminator(x.shape[1:], 32, spectral=objective == "hinge", seed=seed + 1),
        objective, ema=0.995, seed=seed,
    )  # fmt: skip
    gan.compile(keras.optimizers.Adam(2e-4, beta_1=0.5), keras.optimizers.Adam(4e-4, beta_1=0.5))
    history = gan.fit(x, batch_size=64 * gan.discriminator_steps, epochs=epochs * gan.discriminator_steps, verbose=0)
    made = gan.generate(2000, seed=seed)
    row = {"objective": objective, "seed": seed, "epochs": epochs, **judge(made)}
    row["last_d_loss"] = history.history["d_loss"][-1]
    return row, made


def judge_for(dataset: Any, cache: Path, quick: bool) -> Any:
    """Returns what measures generated images against the test set, on a classifier's features."""

    def train() -> keras.Model:
        model = models.get("lenet5")(dataset.input_shape, seed=0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
        model.fit(dataset.x_train, dataset.y_train, batch_size=64, epochs=1 if quick else 5, verbose=0)
        return model

    classifier = kept(None if quick else cache, "classifier", train)
    real = gans.features(classifier, dataset.x_test[:2000])

    def judge(images: np.ndarray) -> dict[str, float]:
        made = gans.features(classifier, images)
        near = gans.precision_recall(real, made)
        return {
            "classifier_kid": gans.classifier_kid(real, made), "classifier_fid": gans.classifier_fid(real, made),
            "precision": near.precision, "recall": near.recall, "duplicates": gans.duplicates(real, made),
        }  # fmt: skip

    return judge


def remembered(path: Path, make: Any) -> dict[str, Any]:
    """The row of a file, or made and kept there."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    row = make()
    common.write_json(path, row)
    return row


def mean_rows(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row an objective: the mean and the range of the first key, means of the others."""
    table = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        mine = [row for row in rows if row["objective"] == objective]
        row: dict[str, Any] = {"objective": objective, "seeds": len(mine)}
        for key in keys:
            values = [each[key] for each in mine if np.isfinite(each[key])]
            row[key] = float(np.mean(values)) if values else None
        row[f"{keys[0]} by seed"] = ", ".join(f"{each[keys[0]]:.4g}" for each in mine)
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps; writes nothing")
    parser.add_argument("--part", choices=("all", "grid", "images"), default="all")
    parser.add_argument("--cache", type=Path, default=Path("build/gans"))
    parser.add_argument("--steps", type=int, default=6000, help="of the generator, on the grid")
    parser.add_argument("--epochs", type=int, default=15, help="on images")
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    cache = Path(tempfile.mkdtemp()) if arguments.quick else arguments.cache
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    steps, epochs = (100, 1) if arguments.quick else (arguments.steps, arguments.epochs)
    grid_rows, image_rows, clouds = [], [], {}
    if arguments.part in ("all", "grid"):
        for seed in seeds:
            for objective in gans.OBJECTIVES:

                def make(objective: str = objective, seed: int = seed) -> dict[str, Any]:
                    row, points = on_grid(objective, seed, steps)
                    if seed == seeds[0]:
                        clouds[objective] = points
                        np.save(cache / f"points_{objective}.npy", points) if cache.exists() else None
                    return row

                grid_rows.append(remembered(cache / f"grid_{steps}_{objective}_{seed}.json", make))
                say(str(grid_rows[-1]))
    if arguments.part in ("all", "images"):
        dataset = data.load("mnist5k" if arguments.quick else "fashion_mnist", seed=0)
        x = dataset.x_train[: 256 if arguments.quick else arguments.images]
        judge = judge_for(dataset, cache, arguments.quick)
        for objective in IMAGE_OBJECTIVES[: 2 if arguments.quick else None]:
            for seed in seeds:

                def make(objective: str = objective, seed: int = seed) -> dict[str, Any]:
                    row, images = on_images(objective, seed, x, epochs, judge)
                    if seed == seeds[0]:
                        plots.sample_grid(images[:32]).savefig(cache / f"samples_{objective}.png", dpi=80)
                    return row

                name = f"images_{len(x)}_{epochs}_{objective}_{seed}.json"
                image_rows.append(remembered(cache / name, make))
                say(str(image_rows[-1]))
    if arguments.quick:
        return
    write(grid_rows, image_rows, clouds)


def write(grid_rows: list[dict[str, Any]], image_rows: list[dict[str, Any]], clouds: dict[str, np.ndarray]) -> None:
    """Writes the result file, with the figures of the parts that were run."""
    figures: dict[str, float] = {}
    results: dict[str, Any] = {}
    if grid_rows:
        least = {name: min(row["modes"] for row in grid_rows if row["objective"] == name) for name in gans.OBJECTIVES}
        figures["objectives_covering_25_modes"] = sum(modes == 25 for modes in least.values())
        figures["minimax_modes"] = float(np.mean([row["modes"] for row in grid_rows if row["objective"] == "minimax"]))
        results["25 Gaussians"] = mean_rows(grid_rows, ("modes", "high_quality", "divergence"))
    if image_rows:
        kid = {
            name: float(np.mean([row["classifier_kid"] for row in image_rows if row["objective"] == name]))
            for name in IMAGE_OBJECTIVES
        }
        figures["sn_hinge_kid_over_ns"] = kid["hinge"] / kid["non_saturating"]
        keys = ("classifier_kid", "classifier_fid", "precision", "recall", "duplicates")
        results["Fashion-MNIST"] = mean_rows(image_rows, keys)
    if clouds:
        plots.points(gans.grid().sample(1000), clouds).savefig(common.RESULTS.parents[1] / "docs" / "gans.png", dpi=80)
    path = common.write_result(
        common.RESULTS / "gans.json", figures, title="GANs", seeds=list(SEEDS), plot="gans.png" if clouds else "",
        about="Every objective with the same networks, optimizers, batches and seeds. On the grid, an objective covers "
        "25 modes if it does with every seed, each hit by at least 20 of 2,500 points. FID and KID are on features of "
        "a classifier trained on Fashion-MNIST, against the test set, and compare with each other only.",
        data=[
            {"name": "grid of 25 Gaussians", "train": "64,000 points a seed", "test": "2,500 generated points"},
            {"name": "Fashion-MNIST", "train": "10,000 images", "test": "2,000 test images"},
        ],
        results=results, versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip
    say(f"wrote {path.name}: {figures}")


if __name__ == "__main__":
    main()
