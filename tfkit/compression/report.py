"""What a compression did, in words, tables and a page to look at."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import keras
from markupsafe import Markup

from tfkit import export
from tfkit.compression.fake_quantize import FakeQuantize
from tfkit.compression.searching import plots, workspace
from tfkit.compression.searching.file_weights import FileWeight, file_weights, total_sparsity
from tfkit.compression.searching.judging import LATENCY_TIE
from tfkit.data import Dataset, load
from tfkit.export import runner
from tfkit.internal import surgery

TEMPLATE = "report.html.j2"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two that are compared; everything is counted in, or run from, its `.tflite` file.

    Attributes:
        name: of the model or file.
        size_bytes, gzip_bytes, packed_bytes: the file as it is, by gzip -9, and by `tfkit.export.pack`.
        accuracy: on the test data, in 0..1.
        p50_ms: median latency of one example.
        weights: layer by layer.
    """

    name: str
    size_bytes: int
    gzip_bytes: int
    packed_bytes: int
    accuracy: float
    p50_ms: float
    weights: tuple[FileWeight, ...]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all the weights, in 0..1."""
        return total_sparsity(list(self.weights))


@dataclasses.dataclass(frozen=True)
class Report:
    """Two models or files side by side.

    Attributes:
        before, after: the two.
        latency_ratio: of `after` over `before`, the median over rounds in which both ran.
        test_samples: size of the test data.
    """

    before: Side
    after: Side
    latency_ratio: float
    test_samples: int

    @property
    def ratio(self) -> float:
        """How many times smaller `after`, packed, is than the file of `before`."""
        return self.before.size_bytes / self.after.packed_bytes

    @property
    def accuracy_drop(self) -> float:
        """Test accuracy lost, in 0..1; negative if some was gained."""
        return self.before.accuracy - self.after.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "before": {**dataclasses.asdict(self.before), "weights": [w._asdict() for w in self.before.weights]},
            "after": {**dataclasses.asdict(self.after), "weights": [w._asdict() for w in self.after.weights]},
        }

    def __str__(self) -> str:
        lines = [f"{'':14}{'before':>12}{'after':>12}{'':>10}"]
        for label, attribute in (
            ("file, bytes", "size_bytes"),
            ("gzip, bytes", "gzip_bytes"),
            ("packed, bytes", "packed_bytes"),
        ):
            before, after = getattr(self.before, attribute), getattr(self.after, attribute)
            lines.append(f"{label:14}{before:>12,}{after:>12,}{before / after:>9.1f}x")
        drop = 100 * self.accuracy_drop
        lines.append(f"{'accuracy':14}{self.before.accuracy:>12.4f}{self.after.accuracy:>12.4f}{-drop:>+8.2f} points")
        lines.append(f"{'p50, ms':14}{self.before.p50_ms:>12.3f}{self.after.p50_ms:>12.3f}{self.latency_ratio:>9.2f}x")
        lines.append(f"{'zeros':14}{self.before.sparsity:>12.1%}{self.after.sparsity:>12.1%}")
        for item in self.after.weights:
            lines.append(
                f"  {item.layer}: {item.elements:,} weights, {item.zeros:.1%} zeros, {item.distinct} distinct values, "
                f"{item.stored_bits} bits each"
            )
        return "\n".join(lines)


def compare(
    before: keras.Model | str | os.PathLike[str],
    after: keras.Model | str | os.PathLike[str],
    data: Dataset | str,
    *,
    threads: int = 1,
    runs: int = 50,
    min_seconds: float = 1.0,
) -> Report:
    """Compares two classifiers by their `.tflite` files: bytes, test accuracy, latency and weights.

    Args:
        before, after: Keras models, which are exported (in int8 if they were trained for it, in float32 if not), or
            `.tflite` files.
        data: a data set, or what `tfkit.data.load` takes; its test part is used.
        threads, runs, min_seconds: see `tfkit.export.measure`.

    Returns:
        The report; print it.
    """
    data = data if isinstance(data, Dataset) else load(data)
    with tempfile.TemporaryDirectory(prefix="tfkit-compare-") as folder:
        files, models = [], []
        for position, side in enumerate((before, after)):
            models.append(side if isinstance(side, keras.Model) else None)
            files.append(_file_of(side, Path(folder) / f"{position}.tflite"))
        measured = export.compare_latency(
            files,
            data.x_test[:64],
            threads=threads,
            runs=runs,
            min_seconds=min_seconds,
            accuracy_data=(data.x_test, data.y_test),
        )
        sides = []
        for given, model, file, result in zip((before, after), models, files, measured, strict=True):
            one = result.measurement
            assert one.accuracy is not None
            sides.append(
                Side(
                    name=given.name if isinstance(given, keras.Model) else Path(given).name,
                    size_bytes=one.size_bytes,
                    gzip_bytes=one.gzip_bytes,
                    packed_bytes=one.packed_bytes,
                    accuracy=one.accuracy,
                    p50_ms=one.p50_ms,
                    weights=tuple(file_weights(file, model)),
                )
            )
    return Report(sides[0], sides[1], measured[1].ratio, len(data.x_test))


def _file_of(side: keras.Model | str | os.PathLike[str], path: Path) -> Path:
    if not isinstance(side, keras.Model):
        runner.check_file(side)
        return Path(side)
    trained_for_int8 = any(isinstance(layer, FakeQuantize) for layer in surgery.leaf_layers(side))
    return export.convert(side, path, quantization="int8-qat" if trained_for_int8 else "float32")


def headline(base: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """Returns the result in one sentence, from the rows of the baseline and of the best file."""
    if best["name"] == base["name"]:
        return (
            f"Nothing within the accuracy budget beats the float32 file: {size(base['size_bytes'])}, "
            f"{percent(base['test_accuracy'])} right on the test data."
        )
    return (
        f"{size(base['size_bytes'])} → {size(best['packed_bytes'])} ({times(best['packed_ratio'])} smaller), "
        f"accuracy {percent(base['test_accuracy'])} → {percent(best['test_accuracy'])}, "
        f"{speed(best['latency_ratio'])}"
    )


def write_html(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the report of a search as one self-contained page: no script, style, font or image from elsewhere.

    Args:
        results: the content of `results.json`.
        path: the file to write; replaced if it exists.

    Returns:
        The path.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "size": size,
        "percent": percent,
        "points": _points,
        "times": times,
        "speed": speed,
        "parity": _parity,
    }
    rows = results["candidates"]
    finished = [row for row in rows if row["status"] != "failed"]
    names = list(dict.fromkeys(weight["layer"] for row in finished for weight in row["weights"]))
    options = {"max_drop": results["max_drop"]}
    size_plot = plots.scatter(
        plots.points(rows, "packed_bytes", "pareto_size"), xlabel="packed size", unit="B", salt="size", **options
    )
    latency_plot = plots.scatter(
        plots.points(rows, "latency_ratio", "pareto_latency"),
        xlabel="latency, times that of float32",
        unit="×",
        salt="latency",
        **options,
    )
    page = environment.get_template(TEMPLATE).render(
        results=results,
        rows=rows,
        finished=finished,
        base=rows[0],
        best=next(row for row in finished if row["best"]),
        layers=names,
        cells={row["name"]: _cells(row["weights"]) for row in finished},
        # matplotlib escapes what it writes; the names in it are those of the table of candidates.
        size_plot=Markup(size_plot),
        latency_plot=Markup(latency_plot),
        one_example=1.0 / results["data"]["validation"],
    )
    workspace.write_text(Path(path), page)
    return Path(path)


def _cells(weights: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Brings the weights of one layer (an LSTM has two) together in one cell."""
    cells: dict[str, dict[str, Any]] = {}
    for weight in weights:
        cell = cells.setdefault(weight["layer"], {"elements": 0, "zeros": 0.0, "distinct": 0, "bits": 0, "stored": 0})
        cell["zeros"] = (cell["zeros"] * cell["elements"] + weight["zeros"] * weight["elements"]) / (
            cell["elements"] + weight["elements"]
        )
        cell["elements"] += weight["elements"]
        for key, source in (("distinct", "distinct"), ("bits", "index_bits"), ("stored", "stored_bits")):
            cell[key] = max(cell[key], weight[source])
    return cells


def size(size_bytes: float) -> str:
    """Writes a number of bytes.

    >>> size(999), size(34_210), size(1_725_432)
    ('999 B', '34.2 kB', '1,725 kB')
    """
    return f"{size_bytes:,.0f} B" if size_bytes < 1000 else f"{size_bytes / 1000:,.{1 if size_bytes < 1e5 else 0}f} kB"


def percent(fraction: float) -> str:
    """Writes an accuracy.

    >>> percent(0.9725)
    '97.25 %'
    """
    return f"{100 * fraction:.2f} %"


def _points(fraction: float) -> str:
    """A change of accuracy in points, with a true minus sign; a drop is negative."""
    return f"{-100 * fraction:+.2f}".replace("-", "−") if abs(fraction) >= 5e-5 else "±0.00"


def times(ratio: float) -> str:
    """Writes a ratio, with fewer decimals the larger it is.

    >>> times(0.5), times(3.96), times(51.2)
    ('0.50×', '4.0×', '51×')
    """
    return f"{ratio:,.0f}×" if ratio >= 19.95 else (f"{ratio:.1f}×" if ratio >= 1.995 else f"{ratio:.2f}×")


def speed(ratio: float) -> str:
    """Says what a latency, as a multiple of another, means.

    >>> speed(0.4), speed(1.0), speed(2.0)
    ('2.5× faster', 'as fast', '2.0× slower')
    """
    if abs(ratio - 1.0) <= LATENCY_TIE:
        return "as fast"
    return f"{times(1 / ratio)} faster" if ratio < 1 else f"{times(ratio)} slower"


def _parity(parity: Mapping[str, Any]) -> str:
    if parity["max_abs_error"] is None:
        return "not finite"
    if parity["max_error_steps"] is not None:
        return f"{parity['max_error_steps']:.2f} steps"
    return f"{parity['max_abs_error']:.1g}"
