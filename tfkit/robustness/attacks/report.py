"""A report on robustness: accuracy against epsilon, beside the controls that say whether to believe it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfkit.internal.files import write_atomically


class Finding(NamedTuple):
    """What a control found.

    Attributes:
        control: its name.
        passed: whether it found nothing amiss.
        detail: what it saw, and if that is amiss, what to do.
    """

    control: str
    passed: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """Accuracy that the strongest of several attacks left.

    Attributes:
        norm: of the balls.
        epsilons: their radii, ascending.
        clean_accuracy: share of right predictions.
        remaining: share of examples that every attack left right, at each radius. No attack finds everything: the true
            share is at most this.
        by_attack: the same for each attack alone.
        findings: of the controls.
        examples: how many.
        x: the examples, (examples, ...); x_adv: of each, the point that broke it first, or the example itself.
    """

    norm: str
    epsilons: tuple[float, ...]
    clean_accuracy: float
    remaining: tuple[float, ...]
    by_attack: dict[str, tuple[float, ...]]
    findings: tuple[Finding, ...]
    examples: int
    x: np.ndarray = dataclasses.field(repr=False)
    x_adv: np.ndarray = dataclasses.field(repr=False)

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Findings of the controls that did not pass."""
        return tuple(finding for finding in self.findings if not finding.passed)

    @property
    def reliable(self) -> bool:
        """Whether all controls passed."""
        return not self.failed

    @property
    def robust_accuracy(self) -> tuple[float, ...] | None:
        """`remaining`; None while a control fails, for then it measures the attacks and not the model."""
        return self.remaining if self.reliable else None

    def __str__(self) -> str:
        lines = [f"{self.examples} examples, clean accuracy {self.clean_accuracy:.4f}, norm {self.norm}"]
        name = "robust accuracy" if self.reliable else "not robustness; left by attacks that failed a control"
        lines += [
            f"epsilon {e:.4g}: {name} {share:.4f}" for e, share in zip(self.epsilons, self.remaining, strict=True)
        ]
        lines += [f"{'ok' if f.passed else 'FAILED'}: {f.control}: {f.detail}" for f in self.findings]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, as what JSON knows."""
        kept = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("x", "x_adv", "findings")
        }
        findings = [finding._asdict() for finding in self.findings]
        return {
            **kept,
            "reliable": self.reliable,
            "robust_accuracy": self.robust_accuracy,
            "findings": findings,
        }

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the report as JSON.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        return _write(Path(path), (json.dumps(self.to_dict(), indent=2) + "\n").encode(), force)

    def plot(self, path: str | Path, *, force: bool = False) -> Path:
        """Draws accuracy against epsilon, with the controls that failed above it; the suffix says the format.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        radii = (0.0, *self.epsilons)
        for name, shares in self.by_attack.items():
            axes.plot(radii, (self.clean_accuracy, *shares), lw=0.8, alpha=0.6, label=name)
        label = "worst of all" if self.reliable else "worst of all: not robustness"
        axes.plot(radii, (self.clean_accuracy, *self.remaining), color="#b23a48", marker="o", label=label)
        if not self.reliable:
            failed = ", ".join(finding.control for finding in self.failed)
            axes.set_title(f"Controls failed: {failed}", color="#b23a48", fontsize=9, wrap=True)
        axes.set(xlabel=f"epsilon, {self.norm}", ylabel="accuracy under attack", ylim=(0, 1.02), xlim=(0, None))
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        return _write(Path(path), _drawn(figure, path), force)

    def plot_examples(self, path: str | Path, *, count: int = 8, force: bool = False) -> Path:
        """Draws images that were broken: the example, the perturbation stretched to the whole range, and their sum.

        Raises:
            ValueError: the examples are no images, or none was broken.
            FileExistsError: the file is there and `force` is False.
        """
        from matplotlib.figure import Figure

        broken = np.flatnonzero((self.x != self.x_adv).reshape(len(self.x), -1).any(axis=1))[:count]
        if self.x.ndim != 4 or self.x.shape[3] not in (1, 3) or not len(broken):
            raise ValueError("A grid needs images, (examples, height, width, 1 or 3), of which an attack broke some.")
        figure = Figure(figsize=(len(broken), 3), layout="constrained")
        cells = figure.subplots(3, len(broken), squeeze=False)
        for column, at in enumerate(broken):
            delta = self.x_adv[at] - self.x[at]
            stretched = 0.5 + delta / (2 * np.abs(delta).max())
            for row, image in enumerate((_unit(self.x[at], self.x), stretched, _unit(self.x_adv[at], self.x))):
                cells[row, column].imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=1)
                cells[row, column].set_axis_off()
        return _write(Path(path), _drawn(figure, path), force)


def _unit(image: np.ndarray, of: np.ndarray) -> np.ndarray:
    low, high = min(0.0, float(of.min())), max(1.0, float(of.max()))
    return np.clip((image - low) / (high - low), 0, 1)


def _drawn(figure: Any, path: str | Path) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
    return content.getvalue()


def _write(path: Path, content: bytes, force: bool) -> Path:
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists. Choose another path, or pass force=True to overwrite it.")
    write_atomically(path, content)
    return path
