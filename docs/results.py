"""Renders docs/results.md from benchmarks/results/*.json, so that no figure on it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Result = dict[str, Any]


def page(folder: Path) -> str:
    """Returns the page: a section for each result file, by name."""
    parts = [
        "# Results",
        "Written by `make docs` from the files in `benchmarks/results/`, which the programs named below wrote. "
        "Every size is that of a file on disk, every accuracy that of a `.tflite` file over the whole test set.",
    ]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        render = RENDERERS.get(path.stem)
        parts += [*(render(result) if render else generic(result, path.stem)), provenance(result, path.name)]
    return "\n\n".join(parts) + "\n"


class About(NamedTuple):
    """What a section says before its numbers."""

    title: str
    text: str


MNIST = "MNIST, 10,000 training digits and the official test set"
#: Sections without a renderer of their own, by the name of the result file.
SECTIONS: dict[str, About] = {
    "adaptive_quantization": About(
        "Adaptive quantization",
        f"Khoram, Li, ICLR 2018: a precision for each parameter. LeNet-5, {MNIST}. The ratio is that of 32-bit weights "
        "to the bytes of the packed file; `storage` counts bits and the map of widths, as the paper does. The "
        "change of the error is from the float network, trained on for as long; beside it, from the one at the start.",
    ),
    "adversarial_training": About(
        "Adversarial training",
        "Madry et al., <https://arxiv.org/abs/1706.06083>: MNIST at 0.3 in L-infinity, 10,000 training digits where "
        "the paper has 60,000. Robust accuracy: 1,000 test digits under 40 steps from each of 20 random starts.",
    ),
    "attacks_peers": About(
        "Attacks beside foolbox and ART",
        f"The same small network, trained on {MNIST}, and the same test digits, on one thread; times are of the "
        "processor. PGD: 40 steps from the digit itself, the second call. Carlini-Wagner: 9 values of c with 1000 "
        "iterations, Adam's rate chosen on validation digits for both sides. Label attacks: the median of the nearest "
        "point at equal queries, on a `.tflite` file; their time is a query's, of the slowest of ours over its peer.",
    ),
    "certification_peers": About(
        "Certification beside auto_LiRPA and decomon",
        f"The same networks, trained on {MNIST}, m x [1024] having m layers as in Fast-Lin's paper. All sides bound "
        "the margins of the same test digits at the same radii in float64, inputs not clipped, and keep no interval "
        "bounds that are better; the difference is relative to the mean margin. Then each, by its defaults, finds the "
        "radii of the batch in float32 to the same tolerance, on one thread: the time is of the processor, over the "
        "peer's. Every certified ball of two small networks was attacked by PGD with restarts.",
    ),
    "certification_memory": About(
        "Memory of a certificate",
        "A network of four convolutions and two dense layers on 16 images of CIFAR-10, CROWN in L-infinity at 0.25/255 "
        "in one batch. The peak is that of the whole process, TensorFlow and an epoch of training included, in GB.",
    ),
    "certified_training": About(
        "Certified training",
        "Gowal et al., <https://arxiv.org/abs/1810.12715>, and CROWN-IBP, <https://arxiv.org/abs/1906.06316>: "
        f"{MNIST}, of which the first 1,000 digits; epsilon 0.1 in L-infinity. A digit counts as certified if it is "
        "classified right and the bound holds over the whole ball, in float32.",
    ),
    "compare_defenses": About(
        "Defenses compared",
        "The same small network and digits under the same attacks; accuracies in percent. Input transformations stand "
        "there as a warning: with the gradient hidden they seem to resist more than they do when the attack steps over "
        "them. What is left of it here is the digits' own: they are black and white already.",
    ),
    "detection_and_video": About(
        "Attacks on a detector and on clips",
        "A detector of blood cells (BCCD, 160 x 120 pixels) and a classifier of skeleton clips (JHMDB). Figures are "
        "the share of attacked images or clips broken at the largest radius: 8/255 of an image's range, 0.2 of a "
        "skeleton's units.",
    ),
    "poisoning": About(
        "Poisoning",
        "A patch in the corner of 1 % of 9,000 digits, five seeds and targets. The detectors know neither the target "
        "nor the share; recall and precision are those of the worst seed.",
    ),
    "random_self_ensemble": About(
        "Random self-ensemble",
        "Liu et al., <https://arxiv.org/abs/1712.00673>: Fashion-MNIST under Carlini and Wagner's attack at growing c, "
        "through the mean over draws. Points are the mean over all c.",
    ),
    "nsw": About(
        "Navigable small world: how the work grows",
        "Malkov et al., <https://doi.org/10.1016/j.is.2013.10.006>: inner products computed for a query at a recall@10 "
        "over vectors uniform on a sphere of 30 dimensions. `growth over log2` is 1 where the work grows as the square "
        "of the logarithm of the items. `tries` is the paper's graph, `hierarchy` the one of its successor.",
    ),
    "dual": About(
        "The dual approach beside the linear program",
        f"Dvijotham et al., <https://arxiv.org/abs/1803.06567>: {MNIST}; margins of test digits at 1.5 times the radii "
        "that CROWN certifies. The gap is (LP - dual) / (LP - interval), mean over all margins of the worse of "
        "two networks: 0 is the linear program.",
    ),
    "fast_lin": About(
        "Certified radii by method, norm and target",
        "Weng et al., <https://arxiv.org/abs/1804.09699>, tables of networks of 20 and of 1,024 units a layer, trained "
        f"on {MNIST}, where the paper has 60,000 digits: orders and ratios compare with the paper, radii do not. "
        "Counts say how many radii stand against the order of the methods.",
    ),
    "int4_kernels": About(
        "Which layers run with int4 and int2 weights",
        "Each layer in a file of its own, beside the same layer in int8, interleaved, on one thread. XNNPACK runs int4 "
        "weights of fully connected layers, and those only; other layers fall back to slower kernels, where four bits "
        "make a file smaller, not faster.",
    ),
    "greedy_mips": About(
        "Greedy-MIPS beside trees, hashing and sampling",
        "Yu et al., <https://arxiv.org/abs/1610.03317>: how many times faster than a scan each method reaches a "
        "precision: `p5 at 0.75` is the share of the true five best among the five found. Factors of MovieLens-1M and "
        "synthetic vectors, where the paper has Netflix and Yahoo! Music. Nothing: the precision is not reached.",
    ),
    "low_rank": About("Low rank and distillation", f"LeNet-5, {MNIST}."),
    "compare_pruning": About("Ways to choose the zeros", f"LeNet-300-100, {MNIST}; error of the file."),
    "post_training": About("Post-training quantization", "Calibrations, equalization and bias correction compared."),
    "proxquant": About(
        "ProxQuant beside BinaryConnect",
        "Bai, Wang, Liberty, <https://arxiv.org/abs/1810.00861>: binary weights, first and last layer in float. "
        "ResNet-8, 5,000 training and 1,000 test images of CIFAR-10 at 16x16 pixels, both from the same float network "
        "and each at the best of the same grid of scales and learning rates. In 20 epochs of 78 steps BinaryConnect, "
        "whose weights change sign freely, learns more than ProxQuant, which has 1,560 steps to be pulled to its "
        "signs where the paper has 117,000 (300 epochs from a converged network).",
    ),
    "pruning": About(
        "Pruning that is faster",
        "Structured pruning to half the multiply-adds, and 1x4 blocks in fully connected layers, beside the float "
        "files, interleaved, on one thread. The drop is below the float network that was pruned; the drop over trained "
        "on is below that network after as many epochs more, which 4,500 images of CIFAR-10 still improve.",
    ),
    "qnn": About(
        "Quantized neural networks",
        "Hubara et al., <https://arxiv.org/abs/1609.07061>: weights and activations of 1, 2 and 4 bits. LeNet-5 with "
        f"batch normalization, {MNIST}; accuracy of the int8 files that hold these integers.",
    ),
    "recommenders_peers": About(
        "Recommenders beside implicit, cornac and surprise",
        "MovieLens small, one thread. Epochs and NDCG over implicit's are at the same hyper-parameters, medians over "
        "rounds; a ratio below 1 of epochs is in our favour, one above 1 of the full ranking too (6,040 users, 3,416 "
        "films of MovieLens-1M). BPR draws uniform negatives where implicit's are popular; with its negatives and its "
        "one attempt the two agree. RMSE over five folds, and NDCG over the best peer's, are with settings that each "
        "side chose on validation events.",
    ),
    "relaxed_quantization": About(
        "Relaxed quantization",
        "Louizos et al., <https://arxiv.org/abs/1810.01875>, LeNet-5-Caffe at 8, 4 and 2 bits for weights and "
        f"activations; {MNIST}, where the paper has 60,000 digits. Error of the int8 files.",
    ),
    "retrieval_scale": About(
        "Retrieval from 10,000 to 1,000,000 vectors",
        "Synthetic vectors of 128 dimensions, each index built and asked on one thread in a process of its own. The "
        "peak is what building adds to the process, in units of the vectors' own bytes.",
    ),
    "router": About(
        "Router",
        "Queries a second over the best single index and effort, its effort interpolated to the same recall@10, on "
        "queries that decided nothing; choosing is counted. The oracle knows the true recall of each choice for each "
        "query, and pays nothing. A gain of 1 means that no router was worth it: one choice answers all queries.",
    ),
    "xbox": About(
        "PCA tree over the Euclidean transformation",
        "Bachrach et al., <https://doi.org/10.1145/2645710.2645741>: how many times faster than a scan a share of the "
        "ten best is found, in the query's own leaf, with its neighbours (boosted), and by the nearest leaves.",
    ),
    "search": About(
        "The search",
        "Structured pruning, low rank, pruning, clustering and quantization in chains, by successive halving. The "
        "files of the Pareto front stand beside every single method with the same training, all measured together. "
        "Files were chosen on validation examples. ResNet-8: 5,000 and 1,000 images of CIFAR-10.",
    ),
}
#: Kept in the files for those who ask, and too long for a page.
LEFT_OUT = {"runs", "choice", "plan", "paper", "rungs", "sensitivity", "warnings", "rows"}


def generic(result: Result, name: str = "") -> list[str]:
    """A section for a file without a renderer of its own: a title, a few sentences, figures and tables."""
    about = SECTIONS[name] if name in SECTIONS else About(result["title"], result["about"])
    parts = [f"## {about.title}", about.text, figures(result)]
    if result.get("seeds"):
        parts[1] += f" Seeds: {', '.join(map(str, result['seeds']))}."
    if result.get("plot"):
        parts.append(f"![{about.title}]({result['plot']})")
    if "table" in result:
        return [*parts, table([flat(row) for row in result["table"]])]
    for caption, rows in tables(result.get("results", {})):
        parts += [f"**{caption}**" if caption else "", table(rows)]
    return [part for part in parts if part]


def tables(found: Any, caption: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields what is tabular in a nested result: lists of flat records, and records under a common key."""
    if isinstance(found, list):
        rows = [flat(item) for item in found if isinstance(item, dict)]
        if rows:
            yield caption, rows
        return
    if not isinstance(found, dict):
        return
    named = {key: value for key, value in found.items() if isinstance(value, dict) and key not in LEFT_OUT}
    rows = [{"": key.replace("_", " "), **flat(value)} for key, value in named.items() if flat(value)]
    if rows:
        yield caption, rows
    for key, value in found.items():
        if key not in LEFT_OUT and isinstance(value, (dict, list)):
            yield from tables(value, f"{caption}, {key}".strip(", ").replace("_", " "))


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """The plain entries of a record."""
    plain = {key: value for key, value in record.items() if not isinstance(value, (dict, list))}
    return {key.replace("_", " "): value for key, value in plain.items() if key not in LEFT_OUT}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the Markdown table of flat rows; the columns are the keys, in the order of their first appearance."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    return markdown(head, [[cell(row.get(key)) for key in head] for row in rows])


def cell(value: Any) -> str:
    """Whole numbers in full, others to four significant digits; a missing one is empty."""
    if value is None or isinstance(value, (str, bool)):
        return {None: "", True: "yes", False: "no"}.get(value, str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def figures(result: Result) -> str:
    return markdown(["figure", "value"], [[f"`{key}`", figure(value)] for key, value in result["figures"].items()])


def figure(value: float) -> str:
    """Three decimals, or two digits of what they would not show."""
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def provenance(result: Result, name: str) -> str:
    """One paragraph: which program, machine and versions."""
    machine = result["machine"]
    versions = result.get("versions", {})
    if versions and all(isinstance(value, dict) for value in versions.values()):
        versions = {f"{key} ({side})": value for side, found in versions.items() for key, value in found.items()}
    return (
        f"`{result['command']}` wrote `{name}` on {machine['cpu']}, {machine['cores']} cores, Python "
        f"{machine['python']}; " + ", ".join(f"{key} {value}" for key, value in versions.items()) + "."
    )


def deep_compression(result: Result) -> list[str]:
    """The paper's tables beside ours."""
    data, parts = result["data"], ["## Deep Compression, the MNIST tables"]
    parts.append(
        f"Han, Mao, Dally, <https://arxiv.org/abs/1510.00149>, tables 1 to 3, which train on 60,000 digits. Ours: "
        f"{data['name']}, {data['train']:,} training and {data['test']:,} test digits, mean over "
        f"{len(result['seeds'])} seeds. The setting *ours* was picked on held-out training digits, for the smallest "
        "file without a loss."
    )
    rows = []
    for network, found in result["results"].items():
        paper = found["paper"]
        change = paper["error_percent"] - paper["baseline_error_percent"]
        rows.append(
            [
                network,
                "paper's own",
                f"{paper['size_kb']} KB",
                f"{paper['ratio']}x",
                f"{paper['baseline_error_percent']:.2f}",
                f"{paper['error_percent']:.2f}",
                f"{change:+.2f}",
                "",
            ]
        )
        for setting, mean in found["mean"].items():
            base = sum(run["float"]["test_error_percent"] for run in found["runs"]) / len(found["runs"])
            label = "ours, paper's densities" if setting == "paper" else "ours"
            rows.append(
                [
                    network,
                    label,
                    f"{mean['packed_bytes'] / 1000:.1f} KB",
                    f"{mean['ratio']:.1f}x",
                    f"{base:.2f}",
                    f"{mean['test_error_percent']:.2f}",
                    f"{mean['error_change_points']:+.2f}",
                    f"{mean['packed_over_best_general']:.2f}",
                ]
            )
    head = [
        "network",
        "setting",
        "packed",
        "ratio",
        "float error %",
        "error %",
        "change, points",
        "packed / best of gzip, xz, zstd",
    ]
    parts.append(markdown(head, rows))
    for network, found in result["results"].items():
        parts.append(
            f"**{network}**, seed {found['runs'][0]['seed']}: paper / ours. Bits are of one kept weight and of its "
            "position, before and after Huffman coding; P, P+Q and P+Q+H are bytes over those of 32-bit weights."
        )
        rows = []
        for layer, ours in found["runs"][0]["ours"]["layers"].items():
            kept, bits, huffman, index, index_huffman, pq, pqh = found["paper"]["layers"][layer]
            rows.append(
                [
                    layer,
                    f"{ours['weights']:,}",
                    f"{kept} / {ours['weights_kept_percent']:.1f}",
                    beside(bits, ours["weight_bits"]),
                    beside(huffman, ours["weight_bits_huffman"]),
                    beside(index, ours["index_bits"]),
                    beside(index_huffman, ours["index_bits_huffman"]),
                    "" if ours["rate_p_percent"] is None else f"{ours['rate_p_percent']:.2f}",
                    beside(pq, ours["rate_pq_percent"]),
                    beside(pqh, ours["rate_pqh_percent"]),
                    "with the rest" if ours["bytes"] is None else f"{ours['bytes']:,}",
                ]
            )
        head = [
            "layer",
            "weights",
            "kept %",
            "weight bits",
            "with H",
            "index bits",
            "with H",
            "P %",
            "P+Q %",
            "P+Q+H %",
            "bytes",
        ]
        parts.append(markdown(head, rows))
    return parts


def retrieval_peers(result: Result) -> list[str]:
    """Queries a second at each recall, a table for each data set, and the curves."""
    parts = [
        "## Retrieval beside FAISS, hnswlib, usearch and ScaNN",
        "Queries a second of one thread at a recall@10, in batches and, in brackets, one at a time: processor time, "
        "every algorithm in a process of its own, in turns. Efforts are grids, that of ScaNN's trees "
        "widened once after a first run, alike for all its variants. The figures are "
        "ratios, ours over the fastest of the others. Those of ScaNN are the lowest over the sets of 100,000, without "
        "scann-core, which ours calls, and without the sets where a recall is reached by none of its efforts; those of "
        "NSW over hnswlib are of the even norms. `core` is scann-core, `wheel` the "
        "authors' own wheel. Memory is what an index tells, or else what the process grew by.",
        figures(result),
    ]
    for number, (name, row) in enumerate(result["results"].items(), start=1):  # All data sets are there, in order.
        levels = next(entry["batch_qps"] for entry in row["algorithms"].values() if "batch_qps" in entry)
        lines = []
        for label, entry in row["algorithms"].items():
            if "batch_qps" not in entry:
                continue
            cells = [
                "" if entry["batch_qps"][level] is None or entry["single_qps"][level] is None
                else f"{entry['batch_qps'][level]:,.0f} ({entry['single_qps'][level]:,.0f})"
                for level in levels
            ]  # fmt: skip
            lines.append([label, f"{entry['build_s']:.1f}", f"{entry['memory_bytes'] / 2**20:.0f}", *cells])
        parts.append(f"**{name}**, {row['queries']:,} queries, norms vary by {row['norm_variation']:.2f} of their mean")
        parts.append(markdown(["", "build s", "MiB", *(f"at {level}" for level in levels)], lines))
        parts.append(f"![{name}](retrieval_{number}.png)")
    return parts


def compression_peers(result: Result) -> list[str]:
    """tfkit and tfmot side by side."""
    parts = [
        "## Compression beside tensorflow-model-optimization",
        "The same trained network is compressed by tfkit (Keras 3) and by tfmot (Keras 2), with the same data, epochs, "
        "optimizer and settings. Bytes of the `.tflite` file, raw, under the best of gzip -9, xz -9e and zstd -19, and "
        "packed by tfkit; latency over the same side's float file, and a training step over the float step, each "
        "measured in interleaved rounds.",
        *([result["note"]] if result.get("note") else []),
        figures(result),
    ]
    rows = []
    for row in result["table"]:
        start = [row["network"], row["method"], row["side"]]
        if "error" in row:
            rows.append([*start, row["error"]] + [""] * 7)
            continue
        sizes = row["bytes"]
        best = min(sizes[key] for key in ("gzip", "xz", "zstd"))
        step = f"{row['step_over_float']:.2f}" if "step_over_float" in row else ""
        rows.append(
            [
                *start,
                str(row["seeds"]),
                f"{100 * row['accuracy']:.2f}",
                f"{sizes['raw']:,}",
                f"{best:,}",
                f"{sizes['packed']:,}",
                f"{sizes['packed'] / best:.2f}",
                f"{row['latency_over_float']:.2f}",
                step,
            ]
        )
    head = [
        "network",
        "method",
        "side",
        "seeds",
        "accuracy %",
        "raw",
        "best general",
        "packed",
        "packed / best",
        "latency",
        "step",
    ]
    parts.append(markdown(head, rows))
    return parts


EMBEDDING_TABLES = {
    "micro_f1_10": "Micro-F1 in percent with 10 % of the labels",
    "micro_f1_50": "Micro-F1 in percent with 50 % of the labels",
    "micro_f1_90": "Micro-F1 in percent with 90 % of the labels",
    "macro_f1_50": "Macro-F1 in percent with 50 % of the labels",
    "link_auc": "AUC of held-out links, in percent",
    "reconstruction": "Precision of the reconstruction at the degree, in percent",
    "cpu_seconds": "Seconds of the processor for the vectors",
}


def node_embeddings(result: Result) -> list[str]:
    """A table for each figure, methods by graphs; the authors' own figures beside; graphs; and the rule."""
    parts = ["## " + result["title"], result["about"], figures(result)]
    found = {name: row for name, row in result["results"].items() if name != "rule"}
    methods = list(dict.fromkeys(method for row in found.values() for method in row["methods"]))
    for key, caption in EMBEDDING_TABLES.items():
        rows = [
            {"method": method, **{name: row["methods"].get(method, {}).get(key) for name, row in found.items()}}
            for method in methods
        ]
        parts += [f"**{caption}**", table(rows)]
    papers = [
        {"graph": name, "method": method, **dict(zip(("10 %", "50 %", "90 %"), row["paper"], strict=True))}
        for name, graph in found.items()
        for method, row in graph["methods"].items()
        if "paper" in row
    ]
    if papers:
        parts += ["**Micro-F1 in the papers**", table(papers)]
    parts += ["**The graphs**", table([{"graph": name, **flat(row["statistics"])} for name, row in found.items()])]
    if result["results"].get("rule"):
        parts += ["**The rule on graphs it has not seen**", table([flat(row) for row in result["results"]["rule"]])]
    return parts


def beside(paper: float, ours: float | None) -> str:
    return f"{paper} / {ours:.2f}" if ours is not None else f"{paper} /"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


RENDERERS: dict[str, Callable[[Result], list[str]]] = {
    "deep_compression": deep_compression,
    "compression_peers": compression_peers,
    "node_embeddings": node_embeddings,
    "retrieval_peers": retrieval_peers,
}
