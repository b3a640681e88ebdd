"""A peer's attack on a model file, measured. Started by attacks.py, in the peers' environment.

    python attacks_worker.py task.json answer.json

A task of kind "labels" attacks a `.tflite` file example by example, every query counted, and stops at the budget; its
distance is that of the nearest adversarial point among all asked about. It keeps each finished example in the answer,
and goes on from there when it is started again. Kinds "pgd" and "cw" attack a `.keras` file with gradients.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "export"))

from benchmarks import common

FAILED = 1e9


class BudgetSpentError(Exception):
    """The example has used its queries, or its time."""


class Counted:
    """The model for one example: counts rows, keeps the nearest adversarial one at each checkpoint."""

    def __init__(self, model: Any, x: np.ndarray, y: int, checkpoints: list[int]) -> None:
        self.model, self.x, self.y, self.checkpoints = model, x, y, checkpoints
        self.queries, self.nearest, self.found = 0, np.inf, dict.fromkeys(checkpoints, np.inf)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        left = self.checkpoints[-1] - self.queries
        if left <= 0:
            raise BudgetSpentError
        points = np.asarray(points, np.float32)
        scores = np.asarray(self.model(points))
        # Rows beyond the budget are answered, for the attack cannot take fewer, and kept by nobody.
        wrong = (np.argmax(scores, axis=1) != self.y)[:left]
        length = np.sqrt(((points[:left].astype(np.float64) - self.x) ** 2).sum(axis=(1, 2, 3)))
        nearest = np.minimum.accumulate(np.where(wrong, length, np.inf))
        for checkpoint in self.checkpoints:
            within = min(checkpoint - self.queries, len(nearest))
            if within > 0:
                self.found[checkpoint] = min(self.nearest, nearest[within - 1])
        if len(nearest):
            self.nearest = min(self.nearest, nearest[-1])
        self.queries += min(len(points), left)
        return scores

    def distances(self) -> list[float]:
        """The nearest at each checkpoint; an attack that ended before it keeps what it has."""
        values = [self.found[c] if self.queries >= c else self.nearest for c in self.checkpoints]
        return [float(np.nan_to_num(value, posinf=FAILED)) for value in values]


def foolbox_labels(name: str, queries: int) -> Callable[[Counted, np.ndarray, np.ndarray], None]:
    import foolbox

    made = {
        "Boundary": lambda: foolbox.attacks.BoundaryAttack(steps=queries),
        "HopSkipJump": lambda: foolbox.attacks.HopSkipJumpAttack(steps=queries),
    }[name]()

    def attack(model: Counted, x: np.ndarray, y: np.ndarray) -> None:
        made.run(foolbox.models.NumPyModel(model, bounds=(0, 1)), x, foolbox.criteria.Misclassification(y))

    return attack


def art_labels(name: str, queries: int) -> Callable[[Counted, np.ndarray, np.ndarray], None]:
    from art.attacks.evasion import BoundaryAttack, HopSkipJump, SignOPTAttack
    from art.estimators.classification import BlackBoxClassifier

    def attack(model: Counted, x: np.ndarray, y: np.ndarray) -> None:
        classifier = BlackBoxClassifier(model, x.shape[1:], 10, clip_values=(0, 1))
        made = {
            "Boundary": lambda: BoundaryAttack(classifier, targeted=False, max_iter=queries, verbose=False),
            "HopSkipJump": lambda: HopSkipJump(classifier, max_iter=queries, verbose=False),
            "SignOPT": lambda: SignOPTAttack(
                classifier, targeted=False, query_limit=queries, max_iter=queries, verbose=False
            ),
        }[name]()
        made.generate(x, y=np.eye(10)[y])

    return attack


def labels(task: dict[str, Any], x: np.ndarray, y: np.ndarray, answer: Path) -> None:
    """Attacks each example that the answer does not hold yet."""
    import runner

    checkpoints = task["checkpoints"]
    attack = {"foolbox": foolbox_labels, "art": art_labels}[task["library"]](task["name"], checkpoints[-1])
    model = runner.Runner(task["model"])
    rows = json.loads(answer.read_text())["examples"] if answer.exists() else []

    def late(*_: Any) -> None:
        raise BudgetSpentError

    signal.signal(signal.SIGALRM, late)
    for at in range(len(rows), len(x)):
        np.random.seed(at)  # noqa: NPY002  (the peers draw from it)
        counted, out_of_time = Counted(model, x[at], int(y[at]), checkpoints), False
        start, began = time.process_time(), time.monotonic()
        signal.alarm(task["seconds_an_example"])
        try:
            attack(counted, x[at : at + 1], y[at : at + 1])
        except BudgetSpentError:
            out_of_time = time.monotonic() - began >= task["seconds_an_example"]
        finally:
            signal.alarm(0)
        rows.append(
            {
                "distances": counted.distances(),
                "queries": counted.queries,
                "cpu_s": time.process_time() - start,
                "out_of_time": out_of_time,
            }
        )
        common.write_json(answer, {"examples": rows, "versions": VERSIONS})


def art_classifier(model: Any) -> Any:
    import keras
    import tensorflow as tf
    from art.estimators.classification import TensorFlowV2Classifier

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Logits, for the attack of Carlini and Wagner; ART hands one-hot labels to no loss but this.
    return TensorFlowV2Classifier(
        model, nb_classes=10, input_shape=(28, 28, 1), loss_object=lambda t, p: loss(tf.argmax(t, 1), p)
        if len(t.shape) == 2 else loss(t, p), clip_values=(0, 1),
    )  # fmt: skip


def gradients(task: dict[str, Any], x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Attacks all examples at once; PGD twice, so that the second time is without what is made once."""
    import keras
    import tensorflow as tf

    model = keras.saving.load_model(task["model"], compile=False)
    library = task["library"]
    if library == "foolbox":
        import foolbox

        opened, images, classes = foolbox.TensorFlowModel(model, bounds=(0, 1)), tf.constant(x), tf.constant(y)
    else:
        from art.attacks.evasion import CarliniL2Method, ProjectedGradientDescent

        opened = art_classifier(model)
    found: dict[str, Any] = {}
    if task["kind"] == "pgd":
        steps, step = task["steps"], task["relative_step"]
        for epsilon in task["epsilons"]:
            times = []
            for _ in range(2):
                start = time.process_time()
                if library == "foolbox":
                    attack = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=step, random_start=False)
                    x_adv = attack(opened, images, classes, epsilons=epsilon)[1].numpy()
                else:
                    x_adv = ProjectedGradientDescent(
                        opened, eps=epsilon, eps_step=epsilon * step, max_iter=steps, num_random_init=0,
                        batch_size=512, verbose=False,
                    ).generate(x, y=y)  # fmt: skip
                times.append(time.process_time() - start)
            left = float(np.mean(model.predict(x_adv, verbose=0).argmax(axis=1) == y))
            found[str(epsilon)] = {"robust_accuracy": left, "first_cpu_s": times[0], "cpu_s": times[1]}
        return found
    start = time.process_time()
    if library == "foolbox":
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=task["search_steps"], steps=task["steps"], stepsize=task["rate"]
        )
        x_adv = attack(opened, images, classes, epsilons=None)[1].numpy()
    else:
        x_adv = CarliniL2Method(opened, batch_size=len(x), verbose=False).generate(x, y=np.eye(10, dtype=np.float32)[y])
    spent = time.process_time() - start
    wrong = model.predict(x_adv, verbose=0).argmax(axis=1) != y
    # Where foolbox finds nothing it returns a black image, which is no find even if the network gets it wrong.
    wrong &= (x_adv != 0).any(axis=(1, 2, 3))
    lengths = np.sqrt(((x_adv.astype(np.float64) - x) ** 2).sum(axis=(1, 2, 3)))
    return {"distances": np.where(wrong, lengths, FAILED).tolist(), "cpu_s": spent}


VERSIONS = common.versions("foolbox", "adversarial-robustness-toolbox", "tensorflow", "keras", "numpy")


def main() -> None:
    task, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    examples = np.load(task["examples"])
    x, y = examples["x"], examples["y"]
    if task["kind"] == "labels":
        labels(task, x, y, answer)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    common.write_json(answer, {**gradients(task, x, y), "versions": VERSIONS})


if __name__ == "__main__":
    main()
