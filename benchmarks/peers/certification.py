"""Certified radii beside auto_LiRPA and decomon, on the same weights, and certificates put to the test by attacks.

    python benchmarks/peers/certification.py --peer-python PEER/bin/python --auto-lirpa CHECKOUT \\
        --decomon-python OTHER/bin/python
    python benchmarks/peers/certification.py --networks small_cnn mlp2_1024 --examples 100
    python benchmarks/peers/certification.py --quick

Networks as Fast-Lin counts them: m x [1024] has m layers, the last one the output. Trained on 10,000 digits of MNIST.
For each norm both sides bound the margins at the same radii, in float64, in the same mode (`same-slope` is Fast-Lin,
`adaptive` CROWN; neither keeps interval bounds that are better), on inputs that are not clipped. Then each finds the
radii of the whole batch in float32, by its defaults, to the same tolerance, on one thread. Times are of the processor,
since other work shares the machine. Each side has bounded two of the examples before its time is taken; tfkit's first
search of a network, in which passes are not compiled yet or are being compiled, stands beside it. decomon, which takes
flat inputs, joins for the perceptrons in Linf. Peers run in environments of their own; one that is not installed is
skipped by name. Every certified ball of the small networks is attacked: PGD with restarts, on the float32 network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np
import tensorflow as tf

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import kept
from benchmarks.peers.certification_search import cpu_seconds
from tfkit import data
from tfkit.robustness.certification import AlphaCrown, Crown, FastLin, Network, certified_radius
from tfkit.robustness.certification.margins import margin_rows
from tfkit.robustness.certification.radius import FIRST
from tfkit.robustness.certification.region import NORMS

LAYERS = keras.layers
NETWORKS = ("mlp2_20", "small_cnn", "mlp2_1024", "mlp3_1024")
METHODS = ("fast_lin", "crown")
STAGES = ("searches", "bounds", "attacks")
TOLERANCE, ALPHA_STEPS = 1e-3, 20
HERE = Path(__file__).resolve().parent


def network(name: str, digits: Any, epochs: int, cache: Path | None) -> keras.Model:
    """A trained network; no layer has weights that the peer cannot be given."""

    def make() -> keras.Model:
        keras.utils.set_random_seed(0)
        if name == "small_cnn":
            body = [LAYERS.Conv2D(width, 4, strides=2, activation="relu") for width in (8, 16)]
            body += [LAYERS.Flatten(), LAYERS.Dense(64, activation="relu")]
        else:
            depth, width = int(name[3]), int(name.split("_")[1])
            body = [LAYERS.Flatten(), *(LAYERS.Dense(width, activation="relu") for _ in range(depth - 1))]
        model = keras.Sequential([keras.Input((28, 28, 1)), *body, LAYERS.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
        model.fit(digits.x_train, digits.y_train, batch_size=100, epochs=epochs, verbose=0)
        return model

    return kept(cache, f"{name}_{len(digits.x_train)}_{epochs}", make)


def as_task(model: keras.Model, x: np.ndarray) -> dict[str, Any]:
    """The network as arrays, in PyTorch's layouts."""
    task: dict[str, Any] = {}
    shape: tuple[int, ...] = (28, 28, 1)
    flat = False
    count = 0

    def put(kind: str, **arrays: Any) -> None:
        nonlocal count
        task[f"{count}/kind"] = kind
        task.update({f"{count}/{key}": value for key, value in arrays.items()})
        count += 1

    for layer in model.layers:
        if isinstance(layer, LAYERS.Flatten):
            put("flatten")
            flat = True
        elif isinstance(layer, LAYERS.Conv2D):
            kernel = np.asarray(layer.kernel).transpose(3, 2, 0, 1)
            put("conv", kernel=kernel, bias=np.asarray(layer.bias), stride=layer.strides[0])
            shape = layer.output.shape[1:]
        elif isinstance(layer, LAYERS.Dense):
            kernel = np.asarray(layer.kernel)
            if flat:  # Its inputs are channels last; the peer's image is channels first.
                kernel = kernel.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(len(kernel), -1)
                flat = False
            put("dense", kernel=np.ascontiguousarray(kernel.T), bias=np.asarray(layer.bias))
        if getattr(layer, "activation", None) is keras.activations.relu:
            put("relu")
    return {**task, "layers": count, "x": np.ascontiguousarray(x.transpose(0, 3, 1, 2))}


def peer(arguments: argparse.Namespace, task: dict[str, Any], side: str) -> dict[str, Any]:
    """Runs a peer on a task."""
    name = {"auto_LiRPA": "lirpa", "decomon": "decomon"}[side]
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "task.npz", Path(folder) / "answer.json"
        np.savez(given, **task)
        checkout = str(arguments.auto_lirpa.resolve()) if name == "lirpa" and arguments.auto_lirpa else ""
        environment = os.environ | {"PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"}
        python = arguments.peer_python if name == "lirpa" else arguments.decomon_python
        command = [str(python.absolute()), str(HERE / f"certification_{name}.py"), str(given), str(answer)]
        subprocess.run(command, check=True, env=environment, cwd=folder)
        return json.loads(answer.read_text())


def task_of(model: keras.Model, x: np.ndarray, rows: np.ndarray, norm: str, methods: tuple[str, ...]) -> dict[str, Any]:
    """What a peer is given: without radii, to search for them."""
    task = as_task(model, x) | {"rows": rows, "norm": NORMS[norm], "steps": ALPHA_STEPS}
    return task | {"methods": " ".join(methods), "tolerance": TOLERANCE, "first": FIRST[NORMS[norm]]}


def compare_bounds(model: keras.Model, x: np.ndarray, row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Bounds of margins by both sides at nine tenths of Fast-Lin's radii; puts into a row how far they are apart."""
    ready, norm = Network(model), row["norm"]
    labels = ready.forward(x).argmax(1)
    rows = margin_rows(labels, 10)
    epsilon = 0.9 * certified_radius(ready, x, labels, norm, "fast_lin", TOLERANCE, arithmetic="real").radius
    problem = ready.fresh().problem(x, epsilon, NORMS[norm], None, "real")
    kinds = {"fast_lin": FastLin, "crown": Crown}
    margins = {method: kinds[method](intersect=False).lower(ready, problem, rows, {}) for method in METHODS}
    for side in sides(arguments, row):
        theirs = peer(arguments, task_of(model, x, rows, norm, METHODS) | {"epsilon": epsilon}, side)
        for method, ours in margins.items():
            their = np.array(theirs[method]["margins"])
            difference = float(np.max(np.abs(ours - their)) / np.abs(their).mean())
            row.setdefault(side, {}).setdefault(method, {})["difference"] = difference


def compare_searches(model: keras.Model, x: np.ndarray, row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Radii of both sides, and times where the norm's are taken; puts them into a row."""
    norm, name = row["norm"], row["network"]
    labels = Network(model).forward(x).argmax(1)
    rows = margin_rows(labels, 10)
    ours = row["tfkit"] = {}
    timed = norm in arguments.timed
    for method in METHODS:
        cold = Network(model)
        times = []
        for again in range(2 if timed else 1):
            for _ in range(3 * again):  # After these few passes have been compiled.
                certified_radius(cold, x[:2], labels[:2], norm, method, TOLERANCE, arithmetic="real")
            wall, cpu = time.perf_counter(), cpu_seconds()
            radii = certified_radius(cold, x, labels, norm, method, TOLERANCE, arithmetic="real")
            times.append((time.perf_counter() - wall, cpu_seconds() - cpu))
        ours[method] = {
            "mean_radius": float(radii.radius.mean()), "first_cpu_seconds": times[0][1], "seconds": times[-1][0],
            "cpu_seconds": times[-1][1],
        }  # fmt: skip
    # Beside three wide layers the peer's optimiser of slopes takes hours.
    alpha = norm == "linf" and name != "mlp3_1024"
    few = slice(0, arguments.alpha_examples)
    if alpha:
        method = AlphaCrown(ALPHA_STEPS)
        radii = certified_radius(model, x[few], labels[few], norm, method, TOLERANCE, arithmetic="real")
        ours["alpha_crown"] = {"mean_radius": float(radii.radius.mean()), "examples": len(radii.radius)}
    if not timed:
        return
    for side in sides(arguments, row):
        theirs = peer(arguments, task_of(model, x, rows, norm, METHODS), side)
        row["versions"] |= theirs.pop("versions")
        if alpha and side == "auto_LiRPA":
            theirs |= peer(arguments, task_of(model, x[few], rows[few], norm, ("alpha_crown",)), side)
            del theirs["versions"]
        for method, answer in theirs.items():
            row.setdefault(side, {}).setdefault(method, {}).update(
                {key: answer[key] for key in ("seconds", "cpu_seconds")},
                mean_radius=float(np.mean(answer["radii"])),
            )


def sides(arguments: argparse.Namespace, row: dict[str, Any]) -> list[str]:
    """The peers of a row: decomon takes flat inputs, and is asked for Linf."""
    flat = row["norm"] == "linf" and row["network"].startswith("mlp")
    asked = {"auto_LiRPA": arguments.peer_python, "decomon": arguments.decomon_python if flat else None}
    return [side for side, python in asked.items() if python]


def attack(model: keras.Model, x: np.ndarray, labels: np.ndarray, radii: np.ndarray, order: float, seed: int) -> int:
    """How many balls hold a point of another class that PGD finds: 20 steps from 3 random starts."""
    generator = np.random.default_rng(seed)
    inside = radii > 0
    x, labels, radii = x[inside].astype(np.float64), labels[inside], radii[inside]
    size = radii[:, None, None, None]
    refuted = np.zeros(len(x), bool)
    axes = (1, 2, 3)

    def project(move: np.ndarray) -> np.ndarray:
        if np.isinf(order):
            return np.clip(move, -size, size)
        length = (np.abs(move) ** order).sum(axes, keepdims=True) ** (1 / order)
        return move * np.minimum(1, size / np.maximum(length, 1e-30))

    @tf.function
    def gradient(points: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(points)
            logits = model(points)
            right = tf.gather(logits, labels, batch_dims=1)
            other = tf.reduce_max(logits - 1e9 * tf.one_hot(labels, 10), 1)
            loss = tf.reduce_sum(other - right)
        return other - right, tape.gradient(loss, points)

    for _ in range(3):
        move = project(size * generator.normal(size=x.shape))
        for step in range(20):
            ahead, slope = gradient(tf.constant(x + move, tf.float32))
            refuted |= ahead.numpy() > 0
            slope = slope.numpy().astype(np.float64)
            if np.isinf(order):
                slope = np.sign(slope)
            elif order == 2:
                slope /= np.maximum(np.sqrt((slope**2).sum(axes, keepdims=True)), 1e-30)
            else:  # The steepest coordinates.
                flat = np.abs(slope).reshape(len(slope), -1)
                most = np.partition(flat, -5)[:, -5][:, None, None, None]
                slope = np.sign(slope) * (np.abs(slope) >= most) / 5
            move = project(move + size * slope * (2.5 / 20 if step < 15 else 1.0))
        refuted |= gradient(tf.constant(x + move, tf.float32))[0].numpy() > 0
    return int(refuted.sum())


def put_to_the_test(digits: Any, arguments: argparse.Namespace, epochs: int) -> dict[str, int]:
    """Certifies and attacks many balls of the two small networks."""
    attacked = refuted = 0
    for name in ("mlp2_20", "small_cnn"):
        model = network(name, digits, epochs, arguments.cache)
        count = arguments.balls // (6 if name == "mlp2_20" else 12)
        x = digits.x_test[:count]
        labels = Network(model).forward(x).argmax(1)
        methods = ("fast_lin", "crown") if name == "mlp2_20" else ("crown_ibp",)
        for norm, order in NORMS.items():
            for method in methods:
                radii = certified_radius(model, x, labels, norm, method, TOLERANCE)
                attacked += int((radii.radius > 0).sum())
                refuted += attack(model, x, labels, radii.radius, order, attacked)
                say(f"attacked {attacked}, refuted {refuted} ({name}, {norm}, {method})")
    return {"balls_attacked": attacked, "refuted_certificates": refuted}


def figures_of(results: dict[str, Any], tested: dict[str, int]) -> dict[str, float]:
    """The numbers owed; those of a peer that was skipped are left out."""
    rows = [row for found in results.values() for row in found.values()]
    figures: dict[str, float] = dict(tested)

    def pairs(side: str, key: str, methods: tuple[str, ...]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        both = [(row["tfkit"][method], row.get(side, {}).get(method, {})) for row in rows for method in methods
                if method in row["tfkit"]]  # fmt: skip
        return [(ours, theirs) for ours, theirs in both if key in theirs]

    for method in METHODS:
        found = [theirs["difference"] for _, theirs in pairs("auto_LiRPA", "difference", (method,))]
        if found:
            figures[f"{method}_bound_relative_difference"] = max(found)
    for side in ("auto_LiRPA", "decomon"):
        ratios = [ours["cpu_seconds"] / theirs["cpu_seconds"] for ours, theirs in pairs(side, "cpu_seconds", METHODS)]
        if ratios:
            figures[f"time_over_{side.lower()}"] = float(np.exp(np.mean(np.log(ratios))))
            figures[f"time_over_{side.lower()}_worst"] = max(ratios)
            first = [ours["first_cpu_seconds"] / theirs["cpu_seconds"]
                     for ours, theirs in pairs(side, "cpu_seconds", METHODS)]  # fmt: skip
            figures[f"first_time_over_{side.lower()}"] = float(np.exp(np.mean(np.log(first))))
    alphas = [ours["mean_radius"] / theirs["mean_radius"]
              for ours, theirs in pairs("auto_LiRPA", "mean_radius", ("alpha_crown",))]  # fmt: skip
    if alphas:
        figures["alpha_crown_radius_over_peer"] = min(alphas)
    return figures


def table_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each network, norm and method: ours, then the peers'."""
    table = []
    for name, found in results.items():
        for norm, row in found.items():
            for method, ours in row["tfkit"].items():
                line = {"network": name, "norm": norm, "method": method,
                        "examples": ours.get("examples", row["examples"]), "mean radius": ours["mean_radius"],
                        "cpu s": ours.get("cpu_seconds"), "first cpu s": ours.get("first_cpu_seconds")}  # fmt: skip
                for side in ("auto_LiRPA", "decomon"):
                    theirs = row.get(side, {}).get(method, {})
                    line |= {
                        f"{side}: {label}": theirs.get(key)
                        for label, key in (
                            ("radius", "mean_radius"),
                            ("cpu s", "cpu_seconds"),
                            ("bounds differ", "difference"),
                        )
                    }
                table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="of the environment with auto_LiRPA")
    parser.add_argument("--auto-lirpa", type=Path, help="a checkout, where it is not installed")
    parser.add_argument("--decomon-python", type=Path, help="of the environment with decomon")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--norms", nargs="+", choices=list(NORMS), default=list(NORMS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="the others keep their rows")
    parser.add_argument("--timed", nargs="+", choices=list(NORMS), default=["linf"], help="norms whose search is timed")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--alpha-examples", type=int, default=20)
    parser.add_argument("--balls", type=int, default=12_000, help="that are attacked, about")
    parser.add_argument("--cache", type=Path, help="folder that keeps networks and finished rows")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "certification_peers.json")
    arguments = parser.parse_args()
    digits, epochs = data.load("mnist5k" if arguments.quick else "mnist", validation=0), 1 if arguments.quick else 6
    if arguments.quick:
        arguments.networks, arguments.examples, arguments.alpha_examples = ["mlp2_20"], 4, 2
        arguments.balls = min(arguments.balls, 60)
    options = {"auto_LiRPA": "peer_python", "decomon": "decomon_python"}
    skipped = [side for side, option in options.items() if getattr(arguments, option) is None]
    for side in skipped:
        say(f"{side}: skipped, pass --{options[side].replace('_', '-')}")
    results: dict[str, Any] = {}
    if arguments.out.exists() and not arguments.quick:  # Networks may be measured one at a time.
        results = json.loads(arguments.out.read_text())["results"]
    tested = results.pop("attacks", {"balls_attacked": 0, "refuted_certificates": 0})

    def write() -> None:
        figures = figures_of(results, tested)
        for key, value in figures.items():
            say(f"{key}: {value:.3g}")
        if not arguments.quick:
            common.write_result(
                arguments.out, figures, data={"name": digits.name, "train": len(digits.x_train), "epochs": epochs},
                seeds=[0], table=table_of(results), results={**results, "attacks": tested},
                skipped=skipped,
                settings={"tolerance": TOLERANCE, "alpha_steps": ALPHA_STEPS, "clip": None, "arithmetic": "real"},
                versions=common.versions("tensorflow", "keras", "numpy"),
            )  # fmt: skip

    x = digits.x_test[: arguments.examples]
    for name in arguments.networks:
        model = network(name, digits, epochs, arguments.cache)
        for norm in arguments.norms:
            row = results.setdefault(name, {}).setdefault(norm, {"tfkit": {}, "versions": {}})
            row |= {"network": name, "norm": norm, "examples": len(x)}
            for stage, compare in {"searches": compare_searches, "bounds": compare_bounds}.items():
                if stage in arguments.stages:
                    compare(model, x, row, arguments)
            say(f"{name} {norm}: {json.dumps(row)}")
            write()
    if "attacks" in arguments.stages:
        tested = put_to_the_test(digits, arguments, epochs)
        write()


if __name__ == "__main__":
    main()
