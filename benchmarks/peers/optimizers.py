"""Records what optax's LARS and LAMB do, for tests/training/test_optimizers.py; runs in the peers' environment.

    pip install -r benchmarks/peers/requirements-training.txt
    python benchmarks/peers/optimizers.py    # writes tests/training/optax.json

optax takes the norm of the gradient with the decay added to it, the paper the sum of the two norms: LARS is recorded
without decay, where both are one, LAMB with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common

PATH = Path(__file__).resolve().parents[2] / "tests" / "training" / "optax.json"
STEPS, SHAPE = 3, (3, 2)
#: Class here, function there, and the arguments of each.
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "lars": (
        "LARS",
        {"learning_rate": 2.0, "momentum": 0.9, "trust_coefficient": 0.01},
        lambda: optax.lars(2.0, trust_coefficient=0.01, momentum=0.9),
    ),
    "lars with nesterov": (
        "LARS",
        {"learning_rate": 2.0, "momentum": 0.9, "trust_coefficient": 0.01, "nesterov": True},
        lambda: optax.lars(2.0, trust_coefficient=0.01, momentum=0.9, nesterov=True),
    ),
    "lamb": (
        "LAMB",
        {"learning_rate": 0.1, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-6, "weight_decay": 0.2},
        lambda: optax.lamb(0.1, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.2),
    ),
}


def main() -> None:
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=SHAPE).round(3), rng.normal(size=(STEPS, *SHAPE)).round(3)
    cases = []
    for name, (kind, settings, make) in CASES.items():
        optimizer, weight, after = make(), jnp.asarray(start, jnp.float32), []
        state = optimizer.init(weight)
        for gradient in gradients:
            update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, weight)
            weight = optax.apply_updates(weight, update)
            after.append(np.asarray(weight, np.float64).tolist())
        cases.append({"name": name, "class": kind, "settings": settings, "weights": after})
    versions = common.versions("optax", "jax")
    content = {"versions": versions, "start": start.tolist(), "gradients": gradients.tolist(), "cases": cases}
    common.write_json(PATH, content)


if __name__ == "__main__":
    main()
