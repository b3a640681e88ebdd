"""Next item on MovieLens-1M: SASRec with its own loss and with gBCE, NDCG@10 over all items for 512 validation users.

    python benchmarks/sequential.py --cache build/sequential           # an interrupted run goes on by epoch
    python benchmarks/sequential.py --quick                            # does it run?

The 512 users' items before the target are ranked over 3,416 items, none left out, as the split's authors do. The
number of epochs is fixed before; nothing is chosen by these users.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit.recommenders import Interactions, SASRec
from tfkit.recommenders.evaluation import bootstrap_interval

#: What the public checkpoints reach on this split.
WANTED = {"sasrec": 0.143, "gsasrec": 0.197}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--cache", type=Path, default=Path("build/sequential"))
    arguments = parser.parse_args()
    data = np.load(Path(os.environ["TFKIT_DATA"]) / "ml1m_sequences.npz", allow_pickle=False)
    users = np.repeat(np.arange(len(data["train_offsets"]) - 1), np.diff(data["train_offsets"]))
    items = data["train_items"].astype(np.int64) - 1
    log = Interactions.from_arrays(users, items, item_labels=np.arange(3416), duplicates="keep")
    histories = [part.astype(np.int64) - 1 for part in np.split(data["val_items"], data["val_offsets"][1:-1])]
    target = data["val_target"].astype(np.int64) - 1
    length, dimension, epochs = arguments.length, arguments.dimension, arguments.epochs
    if arguments.quick:
        log, histories, target = log.select(log.users < 200), histories[:50], target[:50]
        length, dimension, epochs = 20, 16, 1
    figures, rows = {}, {}
    for name, options in {
        "sasrec": {"loss": "bce"},
        "gsasrec": {"loss": "gbce", "negatives": 256, "calibration": 0.75},
    }.items():
        model = SASRec(dimension, length, blocks=2, heads=1, dropout=0.5, batch_size=128, epochs=epochs, **options)
        model.seen, model._histories = log.seen, log.sequences()
        model.network = model.make(log.num_items)
        kept = arguments.cache / f"{name}_{dimension}_{length}.weights.h5"
        done = 0
        if kept.exists() and not arguments.quick:
            model.network.load_weights(kept)
            done = int(kept.with_suffix(".epoch").read_text())
        for epoch in range(done, epochs):
            loss = model.train_epoch(epoch)
            if not arguments.quick:
                arguments.cache.mkdir(parents=True, exist_ok=True)
                model.network.save_weights(kept)
                kept.with_suffix(".epoch").write_text(str(epoch + 1))
            if epoch % 5 == 4 or epoch + 1 == epochs:
                say(f"{name} epoch {epoch + 1}: loss {loss:.4f}, NDCG@10 {ndcg(model, histories, target).mean():.4f}")
        values = ndcg(model, histories, target)
        figures[f"{name}_ndcg10"] = float(values.mean())
        rows[name] = {"interval": bootstrap_interval(values), "wanted": WANTED[name], **model.get_config()}
    if not arguments.quick:
        evidence = {"data": "MovieLens-1M, 6,040 users, 3,416 items; 512 validation users"}
        common.write_result(common.RESULTS / "sequential.json", figures, models=rows, **evidence)


def ndcg(model: SASRec, histories: list, target: np.ndarray) -> np.ndarray:
    ids = model.recommend(histories, 10, exclude_seen=False).ids
    return ((ids == target[:, None]) / np.log2(np.arange(2, 12))).sum(1)


if __name__ == "__main__":
    main()
