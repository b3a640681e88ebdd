"""A serving bundle: the query tower as a `.tflite` file, the items as an index, and what their numbers mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tfkit.data import npz
from tfkit.internal import checks
from tfkit.internal.files import write_atomically
from tfkit.recommenders.base import Recommender
from tfkit.retrieval import Exact, Index, SearchResult


def export_bundle(
    model: Recommender,
    folder: str | os.PathLike[str],
    *,
    index: Index | None = None,
    item_labels: Any = None,
    force: bool = False,
) -> Path:
    """Writes what a service or a phone needs: `items.index`, the queries, and `bundle.json`.

    A network's query tower becomes `query.tflite`; of a model of factors, the users' vectors become `users.npz`.

    Args:
        model: fitted, a product of two vectors: factors, two towers or a sequential network.
        folder: to write into; made if it is not there.
        index: to build of the items, such as `retrieval.ScaNN()`; None: `Exact`.
        item_labels: (items,): what the numbers stand for; None: the labels of the interactions.
        force: overwrite.

    Returns:
        The folder.

    Raises:
        FileExistsError: it holds a bundle and `force` is False.
        ValueError: the labels are not one an item.
    """
    target = Path(folder)
    if (target / "bundle.json").exists() and not force:
        raise FileExistsError(f"{target / 'bundle.json'} exists. Choose another folder, or pass force=True.")
    known = model.item_labels if item_labels is None else item_labels
    labels = np.arange(model.num_items) if known is None else np.asarray(known)
    if labels.shape != (model.num_items,):
        raise checks.error("item_labels", f"{model.num_items} labels, one an item", labels)
    built = model.index(Exact() if index is None else index)
    target.mkdir(parents=True, exist_ok=True)
    built.save(target / "items.index", force=True)
    described: dict[str, Any] = {"model": type(model).__name__, "items": labels.tolist()}
    tower = _query_tower(model)
    if tower is None:
        npz.write(target / "users.npz", {"vectors": model.user_vectors(np.arange(model.num_users))})
        described["query"] = "users.npz"
    else:
        from tfkit.export import convert

        convert(tower, target / "query.tflite", force=True)
        described["query"] = "query.tflite"
    write_atomically(target / "bundle.json", json.dumps(described).encode())
    return target


def search_bundle(folder: str | os.PathLike[str], query: Any, k: int = 10, *, exclude: Any = ()) -> SearchResult:
    """Answers a query by the files of a bundle alone.

    Args:
        folder: that `export_bundle` wrote.
        query: the number of a user; for a sequential network its tokens, (length,), see `sequential.pad`.
        k: how many items.
        exclude: numbers of items to leave out, such as those seen.

    Returns:
        Scores and ids, (k,); where fewer items are left, -inf and -1.
    """
    left_out = np.unique(np.asarray(exclude, np.int64))
    source = Path(folder)
    described = json.loads((source / "bundle.json").read_text())
    index = Index.load(source / "items.index")
    if described.get("query") == "users.npz":
        return _best(index, npz.read(source / "users.npz")["vectors"][int(query)], k, left_out)
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(source / "query.tflite"))
    interpreter.allocate_tensors()
    wanted = interpreter.get_input_details()[0]
    interpreter.set_tensor(wanted["index"], np.asarray(query, wanted["dtype"]).reshape(wanted["shape"]))
    interpreter.invoke()
    answer = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return _best(index, answer.reshape(-1, index.dimension)[-1], k, left_out)


def _best(index: Index, vector: np.ndarray, k: int, left_out: np.ndarray) -> SearchResult:
    count = checks.integer("k", k, 1, len(index))
    found = index.search(vector, min(count + len(left_out), len(index)))
    kept = ~np.isin(found.ids, left_out)
    scores, ids = np.full(count, -np.inf, np.float32), np.full(count, -1, np.int64)
    best = found.ids[kept][:count]
    ids[: len(best)], scores[: len(best)] = best, found.scores[kept][:count]
    return SearchResult(scores, ids)


def _query_tower(model: Recommender) -> Any:
    network = getattr(model, "network", None)
    if network is None:
        return None
    return getattr(network, "user_tower", getattr(network, "encoder", None))
