"""The search: what it writes, what it judges by, and what it does when it is interrupted, refused or misused."""

from __future__ import annotations

import json
import math

import keras
import numpy as np
import pytest

from tfkit import data, export, models
from tfkit.compression import search
from tfkit.compression.searching import candidates as table
from tfkit.compression.searching import finetuning, outcome, workspace
from tfkit.compression.searching.finetuning import FineTuning
from tfkit.compression.searching.judging import Measured, judge, pareto
from tfkit.export.runner import Runner

QUICK = search.Settings(epochs=1, train_epochs=1, calibration_samples=50)
CHOSEN = ("dynamic_int8", "int8_qat", "deep_compression")


@pytest.fixture(scope="module", autouse=True)
def briefly():
    """Timing is tested elsewhere; a tenth of a second a file will do here."""
    with pytest.MonkeyPatch.context() as patch:
        measure = export.measure
        patch.setattr(export, "measure", lambda *args, **options: measure(*args, runs=20, min_seconds=0.1, **options))
        yield


@pytest.fixture(scope="module")
def archive(tiny_digits, tmp_path_factory):
    """The data as a user's own file."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    arrays = {f"{axis}_{part}": getattr(tiny_digits, f"{axis}_{part}") for axis in "xy" for part in ("train", "test")}
    np.savez(path, x_validation=tiny_digits.x_validation, y_validation=tiny_digits.y_validation, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def observed():
    """What the fixture `found` saw on its way."""
    return {}


@pytest.fixture(scope="module")
def found(trained_digits_model, archive, tmp_path_factory, observed):
    """A search that was interrupted, and then finished."""
    before = [value.copy() for value in trained_digits_model.get_weights()]
    out = tmp_path_factory.mktemp("search") / "out"
    options = {"out": out, "max_drop": 0.2, "candidates": CHOSEN}

    def interrupt(done, total, text):
        if text.startswith("clustered_90: training, epoch"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.compress(trained_digits_model, archive, settings=QUICK, progress=interrupt, **options)
    observed["left"] = sorted(path.name for path in out.iterdir())
    observed["finished"] = {path: path.stat().st_mtime_ns for path in (out / "candidates").glob("*.tflite")}
    with pytest.raises(FileExistsError, match="another seed"):
        search.compress(trained_digits_model, archive, settings=QUICK, seed=1, **options)
    other = search.Settings(epochs=2, train_epochs=1, calibration_samples=50)
    with pytest.raises(FileExistsError, match="another settings"):
        search.compress(trained_digits_model, archive, settings=other, **options)

    steps, trained = [], []
    train = FineTuning.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "__call__", lambda self, *rest: trained.append(self) or train(self, *rest))
        result = search.compress(
            trained_digits_model, archive, settings=QUICK, progress=lambda *step: steps.append(step), **options
        )
    observed["trained"] = len(trained)
    for old, new in zip(before, trained_digits_model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    return result, steps


def row_of(result, name):
    return next(row for row in result.results["candidates"] if row["name"] == name)


def test_every_file_is_written_and_the_best_is_a_copy(found):
    result, _ = found
    for row in result.results["candidates"]:
        path = result.out / row["path"]
        assert workspace.sha256_of(path) == row["sha256"]
        assert path.stat().st_size == row["size_bytes"]
        assert path.with_suffix(".tfk").stat().st_size == row["packed_bytes"]
    best = result.out / result.best["path"]
    assert (result.out / "best.tflite").read_bytes() == best.read_bytes()
    back = export.unpack(result.out / "best.tfk", result.out.parent / "back.tflite")
    assert back.read_bytes() == best.read_bytes()
    assert not list(result.out.rglob(".*")), "temporary files are left"


def test_accuracies_are_those_of_the_files(found, tiny_digits):
    result, _ = found
    for row in result.results["candidates"]:
        run = Runner(result.out / row["path"])
        for part in ("validation", "test"):
            x, y = getattr(tiny_digits, f"x_{part}"), getattr(tiny_digits, f"y_{part}")
            assert row[f"{part}_accuracy"] == pytest.approx(np.mean(run(x).argmax(axis=-1) == y), abs=1e-9)


def test_weights_are_as_the_methods_promise(found):
    result, _ = found
    row = row_of(result, "deep_compression")
    layers = {item["layer"]: item for item in row["weights"]}
    assert {name: item["elements"] for name, item in layers.items()} == {"conv": 200, "hidden": 9216, "logits": 320}
    assert row["sparsity"] == pytest.approx(0.9, abs=0.005)
    assert all(item["distinct"] <= 32 and item["stored_bits"] == 32 for item in layers.values())
    assert layers["hidden"]["zeros"] > layers["logits"]["zeros"] > 0
    assert all(item["stored_bits"] == 8 for item in row_of(result, "int8_qat")["weights"])
    assert row_of(result, "int8_qat")["parity"]["max_error_steps"] <= 1.001
    assert row["packed_ratio"] == result.results["candidates"][0]["size_bytes"] / row["packed_bytes"] > 4


def test_results_are_plain_json_with_everything(found):
    result, _ = found
    read = json.loads((result.out / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert read == json.loads(json.dumps(result.results))
    assert {"format", "headline", "best", "figures", "model", "data", "max_drop", "objective", "seed", "settings",
            "warnings", "candidates", "machine", "versions", "seconds", "resumed"} <= set(read)  # fmt: skip
    for row in read["candidates"]:
        assert {"name", "summary", "status", "validation_accuracy", "test_accuracy", "size_bytes", "gzip_bytes",
                "packed_bytes", "p50_ms", "p90_ms", "latency_ratio", "parity", "weights", "recipe", "sha256",
                "pareto_size", "pareto_latency", "best"} <= set(row)  # fmt: skip
    assert all(isinstance(value, int | float) for value in read["figures"].values())
    assert (read["data"]["train"], read["data"]["validation"], read["data"]["test"]) == (600, 200, 200)
    assert {"tfkit", "tensorflow", "keras"} <= set(read["versions"])
    assert [row["name"] for row in read["candidates"]] == ["float32", *CHOSEN]


def test_progress_rises_to_the_end(found):
    _, steps = found
    done = [step[0] for step in steps]
    assert done == sorted(done) and done[0] == 0 and steps[-1][0] <= steps[-1][1]
    assert any("epoch 1 of 1" in text for _, _, text in steps)


def test_recipes_make_the_same_files_again(found, tmp_path, monkeypatch):
    result, _ = found
    (tmp_path / "models").mkdir()
    workspace.copy(result.out / "models" / "float32.keras", tmp_path / "models" / "float32.keras")
    monkeypatch.chdir(tmp_path)
    for name in CHOSEN:
        row = row_of(result, name)
        exec(compile(row["recipe"], name, "exec"), {})
        assert workspace.sha256_of(tmp_path / f"{name}.tflite") == row["sha256"]
        assert (tmp_path / f"{name}.tfk").stat().st_size == row["packed_bytes"]


def test_a_finished_folder_is_refused(found, trained_digits_model, archive):
    result, _ = found
    with pytest.raises(FileExistsError, match="finished run.*force"):
        search.compress(trained_digits_model, archive, out=result.out, candidates=CHOSEN, settings=QUICK)


def test_an_interrupted_run_goes_on(found, observed):
    """That it ends where an uninterrupted one would is what `test_recipes_make_the_same_files_again` says."""
    result, _ = found
    assert observed["left"] == ["candidates", "models", "state"]  # no results yet
    assert {path.stem for path in observed["finished"]} == {"float32", "dynamic_int8", "int8_qat"}
    assert result.results["resumed"] and observed["trained"] == 1  # the clustering alone
    assert {path: path.stat().st_mtime_ns for path in observed["finished"]} == observed["finished"]


def test_a_changed_file_is_made_again(tmp_path):
    space = workspace.Workspace(tmp_path / "out", {"seed": 0}, force=False, resume=True)
    path = space.candidate("int8")
    path.write_bytes(b"content")
    path.with_suffix(".tfk").write_bytes(b"packed")
    assert space.record("int8") is None
    space.save_record("int8", {"sha256": workspace.sha256_of(path)})
    again = workspace.Workspace(tmp_path / "out", {"seed": 0}, force=False, resume=True)
    assert again.resumed and again.record("int8")
    path.write_bytes(b"other content")
    assert again.record("int8") is None


def test_force_replaces_our_files_and_leaves_the_users(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "models").mkdir()
    (out / "models" / "thesis.keras").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        workspace.Workspace(out, {"seed": 0}, force=False, resume=True)
    assert (out / "models" / "thesis.keras").exists() and not (out / "state").exists()
    space = workspace.Workspace(out, {"seed": 0}, force=True, resume=True)
    assert not space.resumed and (out / "models" / "thesis.keras").read_text() == "precious"

    ours = tmp_path / "ours"
    space = workspace.Workspace(ours, {"seed": 0}, force=False, resume=True)
    space.candidate("int8").write_bytes(b"old")
    (ours / "notes.txt").write_text("mine")
    assert workspace.Workspace(ours, {"seed": 0}, force=False, resume=True).resumed
    with pytest.raises(FileExistsError, match="same configuration"):
        workspace.Workspace(ours, {"seed": 0}, force=False, resume=False)
    fresh = workspace.Workspace(ours, {"seed": 1}, force=True, resume=True)
    assert not fresh.resumed and not fresh.candidate("int8").exists()
    assert (ours / "notes.txt").read_text() == "mine"
    assert workspace.read_json(ours / "state" / "run.json") == {"seed": 1}


def test_what_cannot_be_made_is_said_and_passed_over(trained_digits_model, tiny_digits, tmp_path, monkeypatch):
    convert = export.convert

    def refusing(model, path, **options):
        if options["quantization"] == "dynamic":
            raise export.ConversionError("no kernel for that")
        return convert(model, path, **options)

    monkeypatch.setattr(export, "convert", refusing)
    result = search.compress(
        trained_digits_model,
        tiny_digits,
        out=tmp_path / "out",
        candidates=["dynamic_int8", "float16", "pruned_90"],
        settings=search.Settings(epochs=1, learning_rate=1e38),  # must diverge
    )
    assert [row["status"] for row in result.results["candidates"]] == ["baseline", "accepted", "failed", "failed"]
    assert "no kernel for that" in row_of(result, "dynamic_int8")["reason"]
    assert "not finite" in row_of(result, "pruned_90")["reason"] or "became" in row_of(result, "pruned_90")["reason"]
    assert len([text for text in result.results["warnings"] if "could not be made" in text]) == 2
    assert result.best["name"] == "float16"
    assert "no kernel for that" in (result.out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blobs():
    """Two clouds of points in four dimensions."""
    rng = np.random.default_rng(0)

    def part(count):
        y = np.arange(count) % 2
        return (rng.normal(size=(count, 4)) + 3.0 * (2 * y[:, None] - 1)).astype(np.float32), y

    arrays = {}
    for name, count in (("train", 200), ("validation", 100), ("test", 100)):
        arrays[f"x_{name}"], arrays[f"y_{name}"] = part(count)
    return data.dataset.from_arrays("blobs", arrays, source="drawn")


def test_a_sigmoid_classifier_and_a_step_without_effect(blobs, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
    model.layers[0].set_weights([np.ones((4, 1)), np.zeros(1)])
    assert finetuning.check_fits(model, blobs) == "sigmoid"
    result = search.compress(model, blobs, out=tmp_path / "o", candidates=["dynamic_int8", "int8_qat"], settings=QUICK)
    assert [row["test_accuracy"] > 0.95 for row in result.results["candidates"]] == [True] * 3
    warnings = " ".join(result.results["warnings"])
    # Four weights are too few for the converter, and an int8 file of them is larger than the float one.
    assert "dynamic_int8: quantization='dynamic' changed nothing" in warnings
    assert "dynamic_int8: not smaller than what it was made from" in warnings
    assert "int8_qat: not smaller than what it was made from" in warnings


def test_an_untrained_model_is_suspected(blobs):
    row = {"name": "float32", "validation_accuracy": 0.52, "warnings": [], "size_bytes": 1, "packed_bytes": 1}
    (warning,) = outcome.warnings_of([row], blobs)
    assert "little more than chance" in warning
    assert outcome.warnings_of([row | {"validation_accuracy": 0.9}], blobs) == []


def test_output_kinds(blobs):
    inputs = keras.Input((4,))
    logits = keras.layers.Dense(2)(inputs)
    kinds = {
        "logits": keras.Model(inputs, logits),
        "softmax": keras.Model(inputs, keras.layers.Softmax()(logits)),
        "sigmoid": keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(inputs)),
    }
    for kind, model in kinds.items():
        assert finetuning.check_fits(model, blobs) == kind


def test_models_that_do_not_fit_are_refused(blobs, tmp_path):
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    inputs = keras.Input((4,))
    wrong_shape = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    for model, message in (
        (Subclassed(), "subclassed"),
        (wrong_shape, r"\(5,\).*\(4,\)"),
        (keras.Model(inputs, keras.layers.Dense(1, activation="relu")(inputs)), "single output"),
        (keras.Model(inputs, [inputs, inputs]), "one output"),
        (keras.Sequential([keras.Input((4,)), keras.layers.Reshape((2, 2))]), "classes"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            search.compress(model, blobs, out=tmp_path / "out")
    good = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    without = data.dataset.from_arrays(
        "blobs",
        {key: getattr(blobs, key) for key in ("x_train", "y_train", "x_test", "y_test")},
        source="",
        validation=0.0,
    )
    with pytest.raises(ValueError, match="validation part"):
        search.compress(good, without, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"one of lenet_300_100"):
        search.compress("lenet6", blobs, out=tmp_path / "out")
    with pytest.raises(ValueError, match="candidates"):
        search.compress(good, blobs, out=tmp_path / "out", candidates=["int9"])
    with pytest.raises(ValueError, match="max_drop"):
        search.compress(good, blobs, out=tmp_path / "out", max_drop=-0.1)
    assert not (tmp_path / "out").exists()


# Judging


def measured(name, accuracy, size=100, latency=1.0):
    return Measured(name, accuracy, size, latency)


def test_the_budget_is_inclusive_and_about_validation():
    items = [measured("float32", 0.97), measured("edge", 0.96, 50), measured("below", 0.9599, 10)]
    verdict = judge(items, max_drop=0.01, objective="size")
    assert verdict.accepted == ("float32", "edge") and verdict.best == "edge"
    assert judge(items, max_drop=0.0, objective="size").best == "float32"
    assert judge(items, max_drop=0.02, objective="size").best == "below"


def test_test_accuracy_decides_nothing():
    def rows(test):
        names = ("float32", "int8", "pruned")
        values = zip(names, (0.95, 0.945, 0.90), (1000, 300, 100), test, strict=True)
        return [
            {"name": name, "status": "made", "validation_accuracy": accuracy, "packed_bytes": size, "size_bytes": size,
             "latency_ratio": 1.0, "test_accuracy": tested}
            for name, accuracy, size, tested in values
        ]  # fmt: skip

    verdicts = []
    for test in ((0.95, 0.95, 0.95), (0.95, 0.10, 0.99), (0.10, 0.99, 0.10)):
        judged = rows(test)
        best = outcome.judge_rows(judged, 0.01, "size")
        verdicts.append((best, [row["status"] for row in judged], [row["pareto_size"] for row in judged]))
    assert verdicts == [("int8", ["baseline", "accepted", "rejected"], [True, True, False])] * 3
    assert "test" not in " ".join(Measured._fields)


def test_the_latency_objective_does_not_split_hairs():
    items = [
        measured("float32", 0.97, 100, 1.0),
        measured("fastest", 0.97, 90, 0.500),
        measured("as fast and smaller", 0.97, 40, 0.512),
        measured("slower and smallest", 0.97, 10, 0.8),
    ]
    assert judge(items, max_drop=0.01, objective="latency").best == "as fast and smaller"
    assert judge(items, max_drop=0.01, objective="size").best == "slower and smallest"


def test_pareto_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        gains, costs = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
        points = [(str(i), float(g), float(c)) for i, (g, c) in enumerate(zip(gains, costs, strict=True))]
        front = [point for point in points if point[0] in pareto(points)]
        for name, gain, cost in points:
            beaten = any(g >= gain and c <= cost and (g > gain or c < cost) for _, g, c in points)
            equal_on_front = any((g, c) == (gain, cost) for _, g, c in front)
            assert equal_on_front != beaten, name
        assert len({point[1:] for point in front}) == len(front)


# The table


def test_sparsity_is_shared_out_as_in_the_paper():
    """Deep Compression, table 3, LeNet-5: 66, 12, 8 and 19 % of the weights are kept, 8 % of all."""
    model = models.lenet5(seed=0)
    shares = table.sparsity_by_layer(model, 0.92)
    sizes = {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "logits": 5_000}
    kept = {name: 1 - shares[name] for name in sizes}
    assert sum(kept[name] * sizes[name] for name in sizes) == pytest.approx(0.08 * 430_500)
    assert kept["conv2"] == pytest.approx(0.12, abs=0.03) and kept["fc1"] == pytest.approx(0.08, abs=0.01)
    assert kept["logits"] == pytest.approx(0.19, abs=0.04) and 0.35 < kept["conv1"] < 0.7
    assert table.sparsity_by_layer(model, 0.0) == {}


def test_small_layers_stay_dense_and_the_total_holds():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2000), keras.layers.Dense(2, name="out[0]")])
    shares = table.sparsity_by_layer(model, 0.3)
    sizes = {"dense": 16_000, "out": 4_000}
    assert list(shares.values()) and "out[[]0]" in {*shares, "out[[]0]"}
    zeros = sum(
        share * next(size for key, size in sizes.items() if name.startswith(key)) for name, share in shares.items()
    )
    assert zeros == pytest.approx(0.3 * 20_000)
    tiny = keras.Sequential([keras.Input((100,)), keras.layers.Dense(200), keras.layers.Dense(1, name="last")])
    assert set(table.sparsity_by_layer(tiny, 0.5)) == {tiny.layers[0].name}


def test_the_table_holds_together():
    names = [stage.name for stage in table.STAGES]
    assert len(set(names)) == len(names)
    for candidate in table.CANDIDATES:
        path = table.lineage(candidate.stage)
        assert [stage.name for stage in path][-1:] == ([candidate.stage] if path else [])
        assert (candidate.quantization == "int8-qat") == (bool(path) and path[-1].method == "QuantizationAware")
    assert table.select(None)[0] == table.BASELINE
    assert [item.name for item in table.select(["int8"])] == ["float32", "int8"]
    model = models.lenet_300_100(seed=0)
    for stage in table.STAGES:
        stage.compressor(model)
        assert math.isclose(stage.epochs_of(1), 1)
