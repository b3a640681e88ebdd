"""Pictures of what a GAN makes, and of how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sample_grid(images: np.ndarray, columns: int = 8) -> Figure:
    """Draws images (count, height, width, 1 or 3) in [0, 1] in rows."""
    import matplotlib.pyplot as plt

    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.7 * columns, 0.7 * rows), squeeze=False, layout="constrained")
    for place, axis in enumerate(axes.flat):
        axis.axis("off")
        if place < len(images):
            image = np.clip(images[place], 0, 1)
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
    return figure


def losses(history: Mapping[str, Sequence[float]]) -> Figure:
    """Draws the losses that `fit` returned as `history`, by epoch."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, label in (("d_loss", "discriminator"), ("g_loss", "generator")):
        axes.plot(history[name], label=label)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend()
    return figure


def points(real: np.ndarray, made: Mapping[str, np.ndarray]) -> Figure:
    """Draws generated points (count, 2) over real ones, a panel for each generator."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(made), figsize=(2.4 * len(made), 2.6), squeeze=False, layout="constrained")
    for axis, (name, cloud) in zip(axes.flat, made.items(), strict=True):
        axis.scatter(*real[:1000].T, s=2, color="0.8")
        axis.scatter(*cloud[:1000].T, s=2, color="tab:red")
        axis.set(title=name, xticks=[], yticks=[], aspect="equal")
        span = 1.3 * np.abs(real).max()
        axis.set(xlim=(-span, span), ylim=(-span, span))
    return figure
