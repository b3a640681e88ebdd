"""What benchmarks that train networks share: networks kept on disk, and digits shifted at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np


def kept(folder: Path | None, name: str, make: Callable[[], keras.Model]) -> keras.Model:
    """Returns the network kept in a folder under this name, or makes and keeps it; without a folder, makes it."""
    path = folder / f"{name}.keras" if folder else None
    if path is not None and path.exists():
        return keras.saving.load_model(path)
    model = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return model


class Shifted(keras.utils.PyDataset):
    """Batches of digits, each digit moved by up to so many pixels either way, anew in each epoch."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int, batch_size: int = 64, pixels: int = 2) -> None:
        super().__init__()
        self.pixels = pixels
        self.rng = np.random.default_rng(seed)
        self.original, self.labels, self.batch_size = x, y, batch_size
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        moves = self.rng.integers(-self.pixels, self.pixels + 1, (len(self.original), 2))
        self.moved = np.empty_like(self.original)
        for move in np.unique(moves, axis=0):
            here = (moves == move).all(axis=1)
            self.moved[here] = np.roll(self.original[here], move, axis=(1, 2))  # The border is black.
        self.order = self.rng.permutation(len(self.original))

    def __len__(self) -> int:
        return -(-len(self.original) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.moved[chosen], self.labels[chosen]
