"""Bounds and radii by auto_LiRPA, in its own environment; `certification.py` starts this and reads what it prints.

    python certification_lirpa.py task.npz answer.json

The task holds the weights of a sequential network, examples, rows of margins, and radii; without these it searches for
them. Nothing of tfkit is imported.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import auto_LiRPA  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from auto_LiRPA import BoundedModule, BoundedTensor  # noqa: E402
from auto_LiRPA.perturbations import PerturbationLpNorm  # noqa: E402
from certification_search import cpu_seconds, radii  # noqa: E402

SLOPES = {"fast_lin": "same-slope", "crown": "adaptive", "alpha_crown": "adaptive"}


def network(task: Any) -> torch.nn.Sequential:
    """Builds the network from arrays layer0/kind, layer0/kernel and so on; images are (channels, height, width)."""
    layers: list[torch.nn.Module] = []
    for number in range(int(task["layers"])):
        kind = str(task[f"{number}/kind"])
        if kind == "relu":
            layers.append(torch.nn.ReLU())
        elif kind == "flatten":
            layers.append(torch.nn.Flatten())
        else:
            kernel, bias = (torch.tensor(task[f"{number}/{name}"]) for name in ("kernel", "bias"))
            if kind == "dense":
                layer: Any = torch.nn.Linear(kernel.shape[1], kernel.shape[0])
            else:
                stride = int(task[f"{number}/stride"])
                layer = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride=stride)
            layer.weight.data, layer.bias.data = kernel, bias
            layers.append(layer)
    return torch.nn.Sequential(*layers).eval()


class Bounder:
    """Lower bounds of margins at radii, one for each example."""

    def __init__(self, task: Any, method: str, dtype: torch.dtype) -> None:
        self.method, self.dtype = method, dtype
        self.x = torch.tensor(task["x"], dtype=dtype)
        self.rows = torch.tensor(task["rows"], dtype=dtype)
        self.norm = float(task["norm"])
        # Its convolutions take one radius for a batch, but for boxes.
        kinds = [str(task[f"{number}/kind"]) for number in range(int(task["layers"]))]
        self.alone = not np.isinf(self.norm) and "conv" in kinds
        options: dict[str, Any] = {"activation_bound_option": SLOPES[method]}
        options["optimize_bound_args"] = {"iteration": int(task["steps"]), "lr_alpha": 0.1, "early_stop_patience": 1000}
        self.model = BoundedModule(network(task).to(dtype), self.x[:1], bound_opts=options, verbose=False)
        # Its shortcut for a first convolution takes every ball but a box for one of L2: it is to go backwards there.
        first = [node.name for node in self.model.nodes() if self.norm == 1 and "Conv" in type(node).__name__]
        self.model.bound_opts["optimize_bound_args"]["directly_optimize"] = first

    def margins(self, chosen: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
        if self.alone and len(chosen) > 1:
            return np.concatenate([self.margins(chosen[[i]], epsilon[[i]]) for i in range(len(chosen))])
        x = self.x[chosen]
        radius = torch.tensor(epsilon, dtype=self.dtype).reshape(-1, *[1] * (x.dim() - 1))
        if np.isinf(self.norm):
            ball = PerturbationLpNorm(norm=np.inf, x_L=x - radius, x_U=x + radius)
        else:
            size = float(epsilon[0]) if self.alone else radius.reshape(-1, 1)
            ball = PerturbationLpNorm(norm=self.norm, eps=size)
        name = "CROWN-Optimized" if self.method == "alpha_crown" else "CROWN"
        bounded = BoundedTensor(x, ball)
        optimised = self.method == "alpha_crown"
        with torch.set_grad_enabled(optimised):
            low, _ = self.model.compute_bounds(x=(bounded,), C=self.rows[chosen], method=name, bound_upper=False)
        return low.detach().numpy().astype(np.float64)


def main() -> None:
    torch.set_num_threads(1)
    task = np.load(sys.argv[1], allow_pickle=False)
    answer: dict[str, Any] = {"versions": {"auto_LiRPA": auto_LiRPA.__version__, "torch": torch.__version__}}
    everything = np.arange(len(task["x"]))
    for method in str(task["methods"]).split():
        if "epsilon" in task:
            exact = Bounder(task, method, torch.float64)
            answer[method] = {"margins": exact.margins(everything, task["epsilon"]).tolist()}
        else:
            plain = Bounder(task, method, torch.float32)
            plain.margins(everything[:2], np.full(2, task["first"]))
            wall, cpu = time.perf_counter(), cpu_seconds()
            found = radii(plain.margins, len(everything), float(task["first"]), float(task["tolerance"]))
            answer[method] = {
                "radii": found.tolist(), "seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu
            }  # fmt: skip
        print(method, answer[method].get("cpu_seconds"), file=sys.stderr, flush=True)
    with open(sys.argv[2], "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
