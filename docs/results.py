"""Renders docs/results.md from benchmarks/results/*.json, so that no figure on it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
        parts += [*RENDERERS.get(path.stem, generic)(result), provenance(result, path.name)]
    return "\n\n".join(parts) + "\n"


def generic(result: Result) -> list[str]:
    """A section for a file without a renderer of its own: title, a few sentences, figures and table."""
    parts = [f"## {result['title']}", result["about"], figures(result)]
    if result.get("plot"):
        parts.append(f"![{result['title']}]({result['plot']})")
    return [*parts, table(result["table"])]


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
    return markdown(["figure", "value"], [[f"`{key}`", f"{value:.3f}"] for key, value in result["figures"].items()])


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


def beside(paper: float, ours: float | None) -> str:
    return f"{paper} / {ours:.2f}" if ours is not None else f"{paper} /"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


RENDERERS: dict[str, Callable[[Result], list[str]]] = {
    "deep_compression": deep_compression,
    "compression_peers": compression_peers,
}
