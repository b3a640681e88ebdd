"""A report on a classifier: accuracy that is certified, radius by radius, beside what attacks leave."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.internal.files import write_atomically
from tfkit.robustness.certification.base import Method, as_method
from tfkit.robustness.certification.margins import check_classes, check_examples
from tfkit.robustness.certification.network import as_network
from tfkit.robustness.certification.radius import certified_radius
from tfkit.robustness.certification.region import Clip, check_clip, norm_order

#: An attack as this report takes it: model, x, y and epsilon to adversarial inputs, (examples, *shape).
Attack = Callable[..., Any]
#: Norms as plots write them.
LABELS = {"linf": "$L_\\infty$", "l2": "$L_2$", "l1": "$L_1$"}


@dataclasses.dataclass(frozen=True)
class CertificationReport:
    """What was certified, of which examples, and how.

    Attributes:
        method, norm, clip, arithmetic: see `CertifiedRadii`.
        radii: certified radius of each example; 0 for wrong predictions.
        accuracy: share of right predictions.
        epsilons: radii at which accuracy is told.
        certified_accuracy: share of examples that are right and certified at each of them.
        attacked_accuracy: share that an attack left right at each of them; None without an attack.
        seconds: that certification took.
    """

    method: str
    norm: str
    clip: Clip
    arithmetic: str
    radii: tuple[float, ...]
    accuracy: float
    epsilons: tuple[float, ...]
    certified_accuracy: tuple[float, ...]
    attacked_accuracy: tuple[float, ...] | None
    seconds: float

    @property
    def mean_radius(self) -> float:
        """Over all examples."""
        return float(np.mean(self.radii))

    @property
    def median_radius(self) -> float:
        """Over all examples."""
        return float(np.median(self.radii))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON knows."""
        return {
            **dataclasses.asdict(self),
            "examples": len(self.radii),
            "mean_radius": self.mean_radius,
            "median_radius": self.median_radius,
        }

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the report as JSON.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        return _write(Path(path), (json.dumps(self.to_dict(), indent=2) + "\n").encode(), force)

    def plot(self, path: str | Path, *, force: bool = False) -> Path:
        """Draws certified and attacked accuracy against epsilon; the suffix says the format.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        import io

        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        ordered = np.sort(np.asarray(self.radii))
        # The whole curve is known: it falls by one example at each radius.
        steps = np.concatenate([[0.0], ordered])
        share = 1 - np.arange(len(ordered) + 1) / len(ordered)
        axes.step(steps, share, where="post", label=f"certified, {self.method}", color="#0b6e4f")
        if self.attacked_accuracy is not None:
            axes.plot(self.epsilons, self.attacked_accuracy, marker="o", ls="--", color="#b23a48", label="attacked")
            # Between the two: at each step its upper and its lower end, and the attacked points.
            inside = steps[steps <= np.max(self.epsilons)]
            radii = np.sort(np.concatenate([inside, np.nextafter(inside, 0), self.epsilons]))
            proven = share[np.searchsorted(steps, radii, side="right") - 1]
            attacked = np.interp(radii, self.epsilons, self.attacked_accuracy)
            axes.fill_between(radii, proven, attacked, alpha=0.12, color="#555555", lw=0)
        axes.axhline(self.accuracy, color="#888888", lw=0.8, ls=":", label="without an attack")
        clip = "not clipped" if self.clip is None else f"inputs in [{self.clip[0]:g}, {self.clip[1]:g}]"
        axes.set(xlabel=f"radius, {LABELS[self.norm]}, {clip}", ylabel="accuracy", ylim=(0, 1.02), xlim=(0, None))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        figure.savefig(content, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
        return _write(Path(path), content.getvalue(), force)


def certify(
    model: Any,
    x: Any,
    y: Any,
    norm: str = "linf",
    method: str | Method = "crown",
    *,
    epsilons: Sequence[float] | None = None,
    attack: Attack | None = None,
    attack_model: Any = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> CertificationReport:
    """Certifies a classifier on examples.

    Args:
        model: to logits: a Keras model, a `Network`, or a network of `read_tflite`.
        x: examples, (examples, *shape).
        y: their classes.
        norm: "linf", "l2" or "l1".
        method: a name, see `method_names`, or a `Method`.
        epsilons: radii at which accuracy is told; None: ten, up to the largest certified one.
        attack: `attack(model, x, y, epsilon=...)` gives adversarial inputs, or a result with `x_adv`; the accuracy that
            it leaves stands beside.
        attack_model: what the attack gets and is judged by; None: `model`.
        progress: called with examples done and in all.
        **options: further arguments of `certified_radius`.

    Returns:
        The report.

    Raises:
        ValueError: an argument breaks its rule, or a layer cannot be bounded.
    """
    started = time.perf_counter()
    network, method = as_network(model), as_method(method)
    clip = check_clip(options.get("clip"))
    x = check_examples(x, network.graph.input_shape, clip)
    y = check_classes("y", y, len(x), network.outputs)
    norm_order(norm)
    found = []
    for at in range(0, len(x), 100):
        found.append(certified_radius(network, x[at : at + 100], y[at : at + 100], norm, method, **options))
        if progress is not None:
            progress(min(at + 100, len(x)), len(x))
    seconds = time.perf_counter() - started
    radii = np.concatenate([part.radius for part in found])
    if epsilons is None:
        levels = np.linspace(0, radii.max(), 11)[1:] if radii.max() > 0 else np.zeros(1)
    else:
        levels = np.asarray([checks.number("epsilons", float(epsilon), 0) for epsilon in epsilons])
    right = network.forward(x).argmax(1) == y
    certified = [float(np.mean(right & (radii >= level) & (radii > 0))) for level in levels]
    attacked = None
    if attack is not None:
        victim = model if attack_model is None else attack_model
        attacked = tuple(_left(attack, victim, x, y, float(level)) for level in levels)
    return CertificationReport(
        method.name, found[0].norm, clip, found[0].arithmetic, tuple(map(float, radii)), float(right.mean()),
        tuple(map(float, levels)), tuple(certified), attacked, seconds,
    )  # fmt: skip


def _left(attack: Attack, model: Any, x: np.ndarray, y: np.ndarray, epsilon: float) -> float:
    """The share of examples that the model still gets right under an attack."""
    made = attack(model, x, y, epsilon=epsilon)
    made = getattr(made, "x_adv", made)
    logits = np.asarray(model(np.asarray(made, np.float32)))
    return float(np.mean(logits.argmax(1) == y))


def summary(reports: Mapping[str, CertificationReport]) -> list[dict[str, Any]]:
    """Rows of a table that compares methods: radii, accuracies and time."""
    return [
        {"method": name, "mean radius": r.mean_radius, "median radius": r.median_radius, "seconds": r.seconds}
        | {f"certified at {e:g}": a for e, a in zip(r.epsilons, r.certified_accuracy, strict=True)}
        for name, r in reports.items()
    ]


def _write(path: Path, content: bytes, force: bool) -> Path:
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists. Choose another path, or pass force=True to overwrite it.")
    write_atomically(path, content)
    return path
