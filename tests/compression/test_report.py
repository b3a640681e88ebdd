"""The report: what is read from the files, the comparison of two models, and a page that stands alone."""

from __future__ import annotations

import copy
import html.parser
import re
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest

from tfkit import compression, export
from tfkit.compression import report
from tfkit.compression.searching import candidates as table
from tfkit.compression.searching import plots
from tfkit.compression.searching.file_weights import file_weights, total_sparsity
from tfkit.compression.searching.finetuning import FineTuning

HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{7*7}}"


def made_up_results():
    """Results of the form that a search writes, with plausible numbers for every candidate."""
    rng = np.random.default_rng(0)
    rows = []
    for position, candidate in enumerate(table.CANDIDATES):
        size = 1_727_096 / (1 if position == 0 else 1.6**position)
        accuracy = 0.975 - 0.002 * rng.integers(0, 4) - (0.05 if candidate.name == "deep_compression_96" else 0)
        rows.append(
            {
                "name": candidate.name,
                "summary": candidate.summary,
                "status": "baseline" if position == 0 else ("accepted" if accuracy > 0.96 else "rejected"),
                "reason": "",
                "validation_accuracy": float(accuracy),
                "test_accuracy": float(accuracy) - 0.01,
                "validation_drop": 0.975 - float(accuracy),
                "validation_drop_error": 0.002,
                "test_drop": 0.975 - float(accuracy),
                "size_bytes": int(size),
                "gzip_bytes": int(size),
                "packed_bytes": int(size),
                "packed_ratio": 1_727_096 / size,
                "p50_ms": 0.1,
                "p90_ms": 0.12,
                "latency_ratio": 1.0 if position % 3 else 0.4 + position / 1000,
                "latency_ratio_range": [0.9, 1.1],
                "sparsity": 0.5,
                "parity": {"max_abs_error": 1e-5, "max_error_steps": None, "argmax_agreement": 1.0, "agrees": True},
                "weights": [
                    {"layer": "conv", "elements": 100, "zeros": 0.5, "distinct": 9, "stored_bits": 8, "index_bits": 4}
                ],
                "recipe": "print('<b>')",
                "kernels": "xnnpack",
                "pareto_size": position in (4, 9),
                "pareto_latency": position == 6,
                "best": position == 9,
            }
        )
    return {
        "headline": "a headline",
        "model": {"name": "net", "parameters": 431_080},
        "data": {"name": "digits", "source": "embedded", "train": 3200, "validation": 800, "test": 1000},
        "max_drop": 0.01,
        "objective": "size",
        "seed": 0,
        "settings": {"epochs": 8, "threads": 1},
        "figures": {"accepted": 10},
        "candidates": rows,
        "warnings": ["one"],
        "seconds": 100.0,
        "machine": {"cpu": "cpu", "cores": 2, "platform": "Linux", "runtime": "ai_edge_litert", "runtime_version": "2"},
        "versions": {"tfkit": "0.1"},
    }


class Page(html.parser.HTMLParser):
    """Collects the elements with their attributes, and sees that they are closed in order."""

    EMPTY = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write(results, tmp_path):
    return report.write_html(results, tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone_and_names_every_candidate(tmp_path):
    text = write(made_up_results(), tmp_path)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert (
        "http:" not in text
        and "https:" not in text
        and "@import" not in text
        and "url(" not in text.replace("url(#", "")
    )
    assert sum(tag == "svg" for tag, _ in page.elements) == 2
    body = text[text.index('<table id="files">') :]
    for candidate in table.CANDIDATES:
        assert body.count(f">{candidate.name}<") >= 3, candidate.name  # files, weights, recipes
        assert text.count(f"<title>{candidate.name}</title>") == 2  # both plots
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text


def test_names_of_strangers_stay_text(tmp_path):
    results = made_up_results()
    harmless = [tag for tag, _ in Page(write(results, tmp_path)).elements]
    for place, key in (
        (results["model"], "name"),
        (results["data"], "name"),
        (results["data"], "source"),
        (results, "headline"),
        (results["machine"], "cpu"),
        (results["versions"], "tfkit"),
        (results["candidates"][3], "recipe"),
        (results["candidates"][3], "reason"),
        (results["candidates"][3]["weights"][0], "layer"),
    ):
        place[key] = HOSTILE
    results["warnings"] = [HOSTILE]
    text = write(results, tmp_path)
    extra = list(Page(text).elements)
    # One more column for the new layer's name, its empty cells, and a bar; no script and no image.
    assert {tag for tag, _ in extra} == set(harmless)
    assert sum(tag == "script" for tag, _ in extra) == 1
    assert "<script>alert" not in text and "onerror" in text and "{{7*7}}" in text
    assert not any(name.startswith("on") for _, attributes in extra for name in attributes)


def test_failed_candidates_and_a_lonely_baseline(tmp_path):
    results = made_up_results()
    failed = {"name": "int8", "summary": "s", "status": "failed", "reason": "no <kernel>", "best": False, "recipe": ""}
    results["candidates"] = [
        results["candidates"][0] | {"best": True, "pareto_size": True, "pareto_latency": True},
        failed,
    ]
    text = write(results, tmp_path)
    Page(text)
    assert "no &lt;kernel&gt;" in text


def labels_of(svg):
    root = ElementTree.fromstring(svg)
    found = []
    for element in root.iter("text"):
        style = element.get("style")
        size = float(re.search(r"font-size: ([\d.]+)px", style)[1])
        if (element.text or "").split(" (")[0] in {item.name for item in table.CANDIDATES}:
            width = 0.52 * size * len(element.text)
            anchor = re.search(r"text-anchor: (\w+)", style)
            shift = {"middle": 0.5, "end": 1.0, "start": 0.0}[anchor[1] if anchor else "start"]
            x, y = float(element.get("x")) - shift * width, float(element.get("y"))
            found.append((element.text, (x, y - 0.7 * size, x + width, y)))
    return root, found


def test_labels_do_not_cover_each_other():
    rows = made_up_results()["candidates"]
    for cost, front in (("packed_bytes", "pareto_size"), ("latency_ratio", "pareto_latency")):
        svg = plots.scatter(plots.points(rows, cost, front), xlabel="x", unit="B", max_drop=0.01, salt="a")
        root, labels = labels_of(svg)
        assert len(labels) == len(rows)
        _, _, width, height = map(float, root.get("viewBox").split())
        for position, (name, box) in enumerate(labels):
            assert box[0] > 0 and box[2] < width and box[1] > 0 and box[3] < height, name
            for other, second in labels[:position]:
                assert plots._overlap(box, second) == 0, (name, other)


def test_a_point_far_below_the_budget_is_drawn_at_the_edge_with_its_value():
    points = [
        plots.Point("float32", 100, 97.0, "baseline", True, True),
        plots.Point("int8", 10, 12.5, "rejected", False, False),
    ]
    _, labels = labels_of(plots.scatter(points, xlabel="x", unit="B", max_drop=0.01, salt="a"))
    assert "int8 (12.5 %)" in dict(labels)


@pytest.mark.parametrize(("quantization", "bits"), [("float32", 32), ("float16", 16), ("dynamic", 8)])
def test_weights_are_read_from_the_file(tmp_path, quantization, bits):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(16, 3, name="conv", use_bias=False)(inputs)  # 288 weights
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x))  # 2,304 weights
    kernel = np.zeros(2304, dtype=np.float32)
    # A quarter is not zero, in four values that every format holds apart; each channel has all of them.
    kernel[:576] = np.concatenate([np.roll([0.25, 0.5, 1.0, -1.0], row) for row in range(144)])
    model.get_layer("head").kernel.assign(kernel.reshape(576, 4))
    path = export.convert(model, tmp_path / "m.tflite", quantization=quantization)
    found = {item.layer: item for item in file_weights(path, model)}
    head = found["head"]
    assert (head.elements, head.zeros, head.distinct, head.index_bits) == (2304, 0.75, 5, 3)
    assert head.stored_bits == bits
    assert found["conv"].elements == 288 and found["conv"].zeros < 0.05
    assert total_sparsity(list(found.values())) == pytest.approx((0.75 * 2304 + found["conv"].zeros * 288) / 2592)


def test_compare_counts_the_files(trained_digits_model, tiny_digits, tmp_path):
    pruning = compression.MagnitudePruning(0.8, schedule="constant")
    pruned = pruning.apply(trained_digits_model, FineTuning(tiny_digits, epochs=1, learning_rate=1e-4))
    options = {"runs": 10, "min_seconds": 0.05}
    result = compression.compare(trained_digits_model, pruned, tiny_digits, **options)
    assert result.before.sparsity < 0.01 and result.after.sparsity == pytest.approx(0.8, abs=1e-3)
    assert result.before.size_bytes == result.after.size_bytes  # zeros take their place; packing takes them out
    assert result.ratio == result.before.size_bytes / result.after.packed_bytes > 2.5
    for side, model in ((result.before, trained_digits_model), (result.after, pruned)):
        expected = np.mean(np.argmax(model(tiny_digits.x_test), axis=-1) == tiny_digits.y_test)
        assert side.accuracy == pytest.approx(expected, abs=0.0051)  # one digit of 200 may tip
    assert result.accuracy_drop == pytest.approx(result.before.accuracy - result.after.accuracy)
    text = str(result)
    assert f"{result.after.packed_bytes:,}" in text and "hidden: 9,216 weights, 80.0% zeros" in text
    assert copy.deepcopy(result.to_dict())["after"]["weights"][0]["layer"] == "conv"

    quantized = compression.QuantizationAware().apply(
        trained_digits_model, FineTuning(tiny_digits, epochs=1, learning_rate=1e-4)
    )
    file = export.convert(quantized, tmp_path / "q.tflite", quantization="int8-qat")
    result = compression.compare(file, quantized, tiny_digits, **options)
    assert result.after.weights[0].stored_bits == 8  # a model trained for int8 is exported so
    assert result.before.packed_bytes == pytest.approx(result.after.packed_bytes, abs=64)


def test_a_headline_says_what_was_won():
    base = {"name": "float32", "size_bytes": 1_727_096, "test_accuracy": 0.957}
    best = {"name": "b", "packed_bytes": 31_300, "packed_ratio": 55.2, "test_accuracy": 0.956, "latency_ratio": 0.4}
    assert report.headline(base, best) == "1,727 kB → 31.3 kB (55× smaller), accuracy 95.70 % → 95.60 %, 2.5× faster"
    assert report.headline(base, base).startswith("Nothing within the accuracy budget beats the float32 file")
