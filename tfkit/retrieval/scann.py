"""ScaNN: a tree of clusters, short codes that keep inner products, and exact scores for the best of them.

Paper: Guo, Sun, Lindgren, Geng, Simcha, Chern, Kumar. Accelerating large-scale inference with anisotropic vector
quantization. ICML 2020, https://arxiv.org/abs/1908.10396. The search is that of the package `scann`, by its authors.

Differs: this chooses the settings, checks what goes in, calls the compiled searcher without the layers between, and
keeps an index in one file, whose arrays are checked before the package sees any of them. Few items are scanned.

Two distributions offer the package. `scann` is the authors' own; its wheels run kernels for old processors, since they
never ask what the processor can do, but only they bring the TensorFlow operations that `as_layer` needs. `scann-core`
is the same code with the kernels for AVX2 and AVX-512, and answers 1.2 to 2.1 times as many queries in batches
(benchmarks/results/retrieval_peers.json). One of the two can be installed at a time; this class works with either.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.internal.quiet import quiet_stderr
from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, IndexFileError, SearchResult, expect
from tfkit.retrieval.exact import Exact

STRUCTURES = ("auto", "tree", "hashing", "brute_force")
#: Fewer items than this are scanned: there is not enough to learn clusters and codes from.
LEAST_ITEMS = 256
#: From so many items on, "auto" is a tree.
TREE_ITEMS = 10_000
#: Centres of a block of coordinates: codes have 4 bits, which a register can look up.
CENTRES = 16
#: Share of the leaves and multiple of k that reach a recall on data of low rank, about; see `default_effort`.
RECALLS = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
SHARES = (0.03, 0.09, 0.15, 0.22, 0.45, 1.0)
MULTIPLES = (3.0, 8.0, 12.0, 16.0, 30.0, 100.0)
_TRAINING_ITEMS = 100_000
#: The package's own files, and what it calls them.
_ASSETS = {
    "ah_codebook.pb": "AH_CENTERS",
    "serialized_partitioner.pb": "PARTITIONER",
    "datapoint_to_token.npy": "TOKENIZATION_NPY",
    "hashed_dataset.npy": "AH_DATASET_NPY",
    "dataset.npy": "DATASET_NPY",
}


class ScaNN(Index):
    """Looks at the clusters that promise most, by codes of half a byte for each two coordinates.

    Search takes `leaves`, how many clusters are looked at, and `rescore`, for how many of the best by their codes the
    exact inner product is computed; None: what `target_recall` needs by rule of thumb. `retrieval.autotune` measures
    what it needs on your queries. From `rescore` = the number of items on, all items are scanned and the result is
    exact. Hashing takes no `leaves`, and brute force, whose result always is exact, neither.

    Training takes no seed: two indexes of the same items differ a little. One that is loaded is the same. Of fewer than
    about a hundred leaves the package ranks those to open roughly, and a query alone may open others than in a batch;
    neither finds more.

    Memory: the items, once more the items (the package's own copy), and `dimension / (2 * block)` bytes each.

    Args:
        structure: "tree": clusters, codes and exact scores; "hashing": codes of all items and exact scores;
            "brute_force": all items, in the package's own scan; "auto": a tree from 10,000 items on, else hashing.
        clusters: leaves of the tree; None: the square root of the number of items.
        block: coordinates that share a code.
        threshold: T of the anisotropic loss: how much more an error along an item counts than one across it.
        target_recall: share of the true best to find by default, in (0, 1].

    Raises:
        ImportError: neither distribution of the package is installed. `retrieval.default_index` then takes `NSW`.
    """

    def __init__(
        self,
        structure: str = "auto",
        *,
        clusters: int | None = None,
        block: int = 2,
        threshold: float = 0.2,
        target_recall: float = 0.95,
    ) -> None:
        self.structure = checks.choice("structure", structure, STRUCTURES)
        self.clusters = None if clusters is None else checks.integer("clusters", clusters, 1)
        self.block = checks.integer("block", block, 1, 16)
        self.threshold = checks.number("threshold", threshold, 0, 1, open_high=True)
        self.target_recall = checks.number("target_recall", target_recall, 0.01, 1)
        package()

    def _build(self, threads: int) -> None:
        self._layout()
        if self._kind:
            config = self._config()
            with tempfile.TemporaryFile() as log, quiet_stderr(log):  # It tells how its training goes.
                self._searcher = package().scann_pybind.ScannNumpy(self.items, config, threads)

    def _layout(self) -> None:
        """Sets what follows from the settings and the number of items."""
        count = len(self.items)
        self._usual: dict[int, dict[str, int]] = {}
        self._scanner = Exact()
        self._scanner.items = self.items
        self._kind = "" if count < LEAST_ITEMS else self.structure
        if self._kind == "auto":
            self._kind = "tree" if count >= TREE_ITEMS else "hashing"
        wanted = self.clusters or round(math.sqrt(count))
        self._leaves = min(wanted, count) if self._kind == "tree" else 1

    def _config(self) -> str:
        """Returns the settings as the package's own text."""
        builder = package().builder(self.items, 10, "dot_product")
        if self._kind == "brute_force":
            return str(builder.score_brute_force().create_config())
        if self._kind == "tree":
            builder = builder.tree(self._leaves, max(1, self._leaves // 4), training_sample_size=_TRAINING_ITEMS)
        builder = builder.score_ah(self.block, anisotropic_quantization_threshold=self.threshold)
        return str(builder.reorder(100).create_config())

    def default_effort(self, k: int, recall: float | None = None) -> dict[str, int]:
        """Returns the effort that reaches a recall by rule of thumb: the more clusters, the smaller a share of them.

        Args:
            k: items sought.
            recall: wanted; None: `target_recall`.
        """
        held = self._held()
        wanted = self.target_recall if recall is None else checks.number("recall", recall, 0, 1)
        share = float(np.interp(wanted, RECALLS, SHARES))
        # The neighbours of a query lie in a number of leaves that grows more slowly than the leaves.
        leaves = held._leaves if wanted == 1 else share * math.sqrt(150 * held._leaves)
        rescore = float(np.interp(wanted, RECALLS, MULTIPLES)) * k
        count = len(held.items)
        return {
            "leaves": min(max(1, math.ceil(leaves)), held._leaves),
            "rescore": min(max(k, math.ceil(rescore)), max(count - 1, k)),
        }

    def check_effort(self, leaves: int | None, rescore: int | None) -> None:
        """Checks what `search` and `as_layer` take.

        Raises:
            ValueError: an effort is out of range, or the structure has no use for it.
        """
        for name, value, useless in (
            ("leaves", leaves, ("hashing", "brute_force")), ("rescore", rescore, ("brute_force",)),
        ):  # fmt: skip
            if value is not None:
                checks.integer(name, value, 1)
                if self.structure in useless:
                    raise checks.error(name, f"left out where `structure` is {self.structure!r}", value)

    def _search(
        self, queries: np.ndarray, k: int, *, leaves: int | None = None, rescore: int | None = None
    ) -> SearchResult:
        self.check_effort(leaves, rescore)
        if leaves is None or rescore is None:
            usual = self._usual.get(k) or self._usual.setdefault(k, self.default_effort(k))
            leaves = usual["leaves"] if leaves is None else leaves
            rescore = usual["rescore"] if rescore is None else rescore
        leaves, rescore = min(leaves, self._leaves), max(rescore, k)
        if self._kind == "brute_force":
            rescore = k
        elif not self._kind or rescore >= len(self.items):
            return self._scanner._search(queries, k)
        if not len(queries):
            return SearchResult(np.empty((0, k), np.float32), np.empty((0, k), np.int64))
        if len(queries) == 1:
            ids, scores = self._searcher.search(queries[0], k, rescore, leaves)
            ids, scores = ids[None], scores[None]
        else:
            ids, scores = self._searcher.search_batched(queries, k, rescore, leaves, False, 0)
        scores, ids = kernels.ordered(scores, ids, k)
        return SearchResult(scores, ids, np.ones(len(queries), bool) if self._kind == "brute_force" else None)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        if self.structure == "brute_force":
            return [{}]
        held = self._held()
        count = len(held.items)
        steps = ((0.02, 3), (0.04, 4), (0.06, 6), (0.09, 8), (0.13, 12), (0.18, 16), (0.25, 24), (0.4, 40), (0.7, 80))
        ladder = [
            {"leaves": max(1, math.ceil(share * held._leaves)), "rescore": min(k * times, count)}
            for share, times in steps
        ]
        if held._kind != "tree":
            ladder = [{"rescore": effort["rescore"]} for effort in ladder]
        return [*(effort for effort in ladder if effort["rescore"] < count), {"rescore": count}]

    def _memory_bytes(self) -> int:
        count, dimension = self.items.shape
        beside = 0
        if self._kind:
            beside += self.items.nbytes
        if self._kind in ("tree", "hashing"):
            blocks = math.ceil(dimension / self.block)
            beside += count * ((blocks + 1) // 2) + 4 * CENTRES * dimension
        if self._kind == "tree":
            beside += 4 * count + 4 * self._leaves * dimension
        return self.items.nbytes + beside

    # A file holds what was learned as plain arrays; the package's own files are made of them on loading.

    def _arrays(self) -> dict[str, np.ndarray]:
        if self._kind in ("", "brute_force"):
            return {}
        with tempfile.TemporaryDirectory(prefix="tfkit-scann-") as name:
            folder = Path(name)
            self._searcher.serialize(name, True)
            arrays = {
                "codes": np.load(folder / "hashed_dataset.npy", allow_pickle=False),
                "codebook": _read_codebook((folder / "ah_codebook.pb").read_bytes()),
            }
            if self._kind == "tree":
                arrays["leaf"] = np.load(folder / "datapoint_to_token.npy", allow_pickle=False)
                arrays["centres"] = _read_centres((folder / "serialized_partitioner.pb").read_bytes())
        return arrays

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._layout()
        if not self._kind:
            return
        if self._kind == "brute_force":
            self._build(1)
            return
        files = self._files(arrays)
        text = "".join(f'assets {{ asset_type: {_ASSETS[name]} asset_path: "{name}" }}\n' for name in files)
        with tempfile.TemporaryDirectory(prefix="tfkit-scann-") as folder:
            for name, content in {**files, "scann_config.pb": self._config_message()}.items():
                if isinstance(content, bytes):
                    (Path(folder) / name).write_bytes(content)
                else:
                    np.save(Path(folder) / name, content, allow_pickle=False)
            try:
                self._searcher = package().scann_pybind.ScannNumpy(folder, text)
            except RuntimeError as error:
                raise IndexFileError(f"damaged: ScaNN does not take what it holds: {error}") from None

    def _files(self, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes | np.ndarray]:
        """Returns the package's own files, by name, made of checked arrays."""
        count, dimension = self.items.shape
        blocks = math.ceil(dimension / self.block)
        codes = expect(arrays, "codes", np.uint8, (count, blocks), 0, CENTRES - 1)
        codebook = expect(arrays, "codebook", np.float32, (CENTRES * dimension,))
        files: dict[str, bytes | np.ndarray] = {
            "ah_codebook.pb": _codebook_message(codebook, dimension, self.block),
            "hashed_dataset.npy": codes,
            "dataset.npy": self.items,
        }
        if self._kind == "tree":
            centres = expect(arrays, "centres", np.float32, (None, dimension))
            if not 1 <= len(centres) <= count:
                raise IndexFileError("damaged: its array 'centres' has more rows than there are items, or none")
            leaf = expect(arrays, "leaf", np.int32, (count,), 0, len(centres) - 1)
            files |= {"serialized_partitioner.pb": _centres_message(centres), "datapoint_to_token.npy": leaf}
        return files

    @classmethod
    def _message_for(cls, items: np.ndarray) -> bytes:
        """Returns the configuration of a scan of these items."""
        scan = cls("brute_force")
        scan.items, scan._kind = items, "brute_force"
        return scan._config_message()

    def _config_message(self) -> bytes:
        from google.protobuf import text_format

        return bytes(text_format.Parse(self._config(), _messages("proto.scann").ScannConfig()).SerializeToString())

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "A ScaNN index cannot be pickled or copied, as the package's searcher cannot. Write it with `save` and "
            "read it with `ScaNN.load`; threads may share one."
        )

    def as_layer(
        self, k: int = 10, *, leaves: int | None = None, rescore: int | None = None, name: str | None = None
    ) -> Any:
        """Returns a Keras layer that searches this index by ScaNN's TensorFlow operations.

        It takes the output of a query tower, (batch, dimension), and gives `(scores, ids)`, float32 and int64, each
        (batch, k); where fewer items were found, -1 with a score of -inf. A model that ends in it is saved whole, index
        and all, by `layer.export(model, path)`, as a SavedModel for TensorFlow Serving. Few items are searched by exact
        scores of all.

        Args:
            k: items for each query.
            leaves, rescore: as in `search`.
            name: of the layer; None: Keras chooses one.

        Raises:
            ImportError: the package that is installed is not the distribution `scann`, or does not fit TensorFlow.
        """
        from tfkit.retrieval.scann_layer import ScaNNLayer

        return ScaNNLayer(self._held(), k, leaves, rescore, name)


def available() -> bool:
    """Whether a distribution of the package is installed."""
    return importlib.util.find_spec("scann") is not None


def package() -> Any:
    """Returns the package's module of compiled searchers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("scann.scann_ops.py.scann_ops_pybind")
    except ImportError as error:
        raise ImportError(
            "The package `scann` is not installed, or does not fit this Python and TensorFlow: "
            f"{error}. On Linux: pip install 'tfkit[retrieval]', or scann-core where no TensorFlow operations are "
            "needed. Elsewhere use `retrieval.NSW`, which needs nothing."
        ) from None


def _messages(name: str) -> Any:
    return importlib.import_module(f"scann.{name}_pb2")


def _read_codebook(content: bytes) -> np.ndarray:
    """Returns the centres of all blocks, flat: block after block, in each centre after centre."""
    message = _messages("proto.centers").CentersForAllSubspaces.FromString(content)
    parts = [centre.feature_value_float for block in message.subspace_centers for centre in block.center]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])


def _codebook_message(codebook: np.ndarray, dimension: int, block: int) -> bytes:
    centers, data = _messages("proto.centers"), _messages("data_format.features")
    message = centers.CentersForAllSubspaces(quantization_scheme="PRODUCT")
    at = 0
    for first in range(0, dimension, block):
        width = min(block, dimension - first)
        part = message.subspace_centers.add()
        for _ in range(CENTRES):
            values = codebook[at : at + width].tolist()
            part.center.append(data.GenericFeatureVector(feature_type="FLOAT", feature_value_float=values))
            at += width
    return bytes(message.SerializeToString())


def _read_centres(content: bytes) -> np.ndarray:
    """Returns the centres of the leaves, (leaves, dimension)."""
    message = _messages("partitioning.partitioner").SerializedPartitioner.FromString(content)
    return np.array([list(centre.dimension) for centre in message.kmeans.kmeans_tree.root.centers], np.float32)


def _centres_message(centres: np.ndarray) -> bytes:
    message = _messages("partitioning.partitioner").SerializedPartitioner(n_tokens=len(centres))
    root = message.kmeans.kmeans_tree.root
    root.leaf_id, root.learned_spilling_threshold = -1, math.nan
    for number, centre in enumerate(centres.astype(np.float64)):
        root.centers.add().dimension.extend(centre.tolist())
        child = root.children.add()
        child.leaf_id, child.learned_spilling_threshold = number, math.nan
    return bytes(message.SerializeToString())
