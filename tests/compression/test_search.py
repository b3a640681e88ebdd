"""The search: what it writes, what it judges by, and what it does when it is interrupted, refused or misused."""

from __future__ import annotations

import importlib
import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit import compression, data, export, models
from tfkit.compression.searching import candidates as table
from tfkit.compression.searching import finetuning, halving, outcome, sensitivity, trials, workspace
from tfkit.compression.searching.finetuning import Augmentation, FineTuning
from tfkit.compression.searching.judging import Measured, judge, pareto, standard_error_of_drop
from tfkit.compression.searching.trials import Step, Trial
from tfkit.export.runner import Runner

# The package gives the function of this name; this is the module that holds it.
search = importlib.import_module("tfkit.compression.search")

QUICK = search.Settings(epochs=1, train_epochs=1, calibration_samples=50)
CHOSEN = ("dynamic_int8", "int8_qat", "pruned_80_dynamic")


@pytest.fixture(scope="module", autouse=True)
def briefly():
    """Timing is tested elsewhere; a tenth of a second a file will do here."""
    with pytest.MonkeyPatch.context() as patch:
        measure = export.measure
        brief = {"runs": 20, "min_seconds": 0.1}
        patch.setattr(export, "measure", lambda *args, **options: measure(*args, **(options | brief)))
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
        if text.startswith("pruned_80: training, epoch"):
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
    row = row_of(result, "pruned_80_dynamic")
    layers = {item["layer"]: item for item in row["weights"]}
    assert {name: item["elements"] for name, item in layers.items()} == {"conv": 200, "hidden": 9216, "logits": 320}
    assert row["sparsity"] >= 0.795  # and what rounds to zero in eight bits
    assert layers["hidden"]["stored_bits"] == 8 and layers["hidden"]["distinct"] <= 255
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


@pytest.mark.parametrize("name", ["pruned_80_dynamic", "prune60_cluster_r0"])
def test_recipes_make_the_same_files_again(found, searched, name, tmp_path, monkeypatch):
    result = found[0] if name in CHOSEN else searched[0]
    (tmp_path / "models").mkdir()
    workspace.copy(result.out / "models" / "float32.keras", tmp_path / "models" / "float32.keras")
    monkeypatch.chdir(tmp_path)
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
    assert result.results["resumed"] and observed["trained"] == 1  # the pruning alone
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


def test_what_cannot_be_made_is_said_and_passed_over(mlp, blobs, tmp_path, monkeypatch):
    convert = export.convert

    def refusing(model, path, **options):
        if options["quantization"] == "dynamic":
            raise export.ConversionError("no kernel for that")
        return convert(model, path, **options)

    monkeypatch.setattr(export, "convert", refusing)
    result = search.compress(
        mlp,
        blobs,
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


@pytest.fixture(scope="module")
def mlp():
    """A network that tells the clouds of `blobs` apart."""
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(64, "relu", name="hidden"), keras.layers.Dense(2, name="logits")]
    )
    signs = np.where(np.arange(64) % 2, 1.0, -1.0)
    hidden = 0.1 * rng.normal(size=(4, 64)) + 0.5 * signs
    logits = 0.02 * rng.normal(size=(64, 2)) + 0.05 * np.stack([-signs, signs], axis=1)
    model.set_weights([hidden, 0.1 * rng.normal(size=64), logits, np.zeros(2)])
    return model


def test_a_sigmoid_classifier_and_a_step_without_effect(blobs, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
    model.layers[0].set_weights([np.ones((4, 1)), np.zeros(1)])
    assert finetuning.check_fits(model, blobs) == "sigmoid"
    result = search.compress(model, blobs, out=tmp_path / "o", candidates=["dynamic_int8", "int8"], settings=QUICK)
    assert [row["test_accuracy"] > 0.95 for row in result.results["candidates"]] == [True] * 3
    warnings = " ".join(result.results["warnings"])
    # Four weights are too few for the converter, and an int8 file of them is larger than the float one.
    assert "dynamic_int8: quantization='dynamic' changed nothing" in warnings
    assert "dynamic_int8: not smaller than what it was made from" in warnings
    assert "int8: not smaller than what it was made from" in warnings


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
             "latency_ratio": 1.0, "test_accuracy": tested, "validation_right": {"count": 3, "bits": "e0"}}
            for name, accuracy, size, tested in values
        ]  # fmt: skip

    verdicts = []
    for test in ((0.95, 0.95, 0.95), (0.95, 0.10, 0.99), (0.10, 0.99, 0.10)):
        judged = rows(test)
        best = outcome.judge_rows(judged, 0.01, "size")
        verdicts.append((best, [row["status"] for row in judged], [row["pareto_size"] for row in judged]))
    assert verdicts == [("int8", ["baseline", "accepted", "rejected"], [True, True, False])] * 3
    assert "test" not in " ".join(Measured._fields)


def test_the_error_of_a_drop_is_that_of_paired_answers():
    rng = np.random.default_rng(0)
    base = rng.random(2000) < 0.97
    other = np.where(rng.random(2000) < 0.01, ~base, base)
    drops = [np.mean(base[rows].astype(float) - other[rows]) for rows in rng.integers(0, 2000, (4000, 2000))]
    assert standard_error_of_drop(base, other) == pytest.approx(np.std(drops), rel=0.05)
    assert standard_error_of_drop(base, base) == 0.0


def test_a_budget_finer_than_the_judge_is_said():
    row = {"name": "small", "validation_drop_error": 0.002}
    (warning,) = outcome.doubt(row, 0.001, 2000)
    assert "0.20 points" in warning and "2,000" in warning
    assert outcome.doubt(row, 0.002, 2000) == []


def test_a_near_miss_is_trained_for_longer(mlp, blobs, tmp_path, monkeypatch):
    chains = (Trial((pruning("prune60", 0.6),)), Trial((pruning("prune99", 0.99),)))
    monkeypatch.setattr(trials, "FORMATS", ())
    options = {"chains": chains, "rungs": 1, "settings": QUICK}
    plain = compression.search(mlp, blobs, 0.0, out=tmp_path / "plain", **options)
    rows = {row["name"]: row for row in plain.results["search"]["rungs_made"][0]["trials"]}
    base = row_of(plain, "float32")["validation_accuracy"]
    missed = base - rows["prune99"]["validation_accuracy"]
    assert missed > base - rows["prune60"]["validation_accuracy"] and missed > 0
    result = compression.search(mlp, blobs, 0.9 * missed, out=tmp_path / "out", **options)
    _, longer = result.results["search"]["rungs_made"]
    assert [row["name"] for row in longer["trials"]] == ["prune99_longer"] and longer["share"] == 2.0
    epochs = {name: row_of(result, name)["recipe"].count(f"epochs={count}") for name, count in
              (("prune99", QUICK.epochs), ("prune99_longer", 2 * QUICK.epochs))}  # fmt: skip
    assert epochs == {"prune99": 1, "prune99_longer": 1}


def test_the_latency_objective_does_not_split_hairs():
    items = [
        measured("float32", 0.97, 100, 1.0),
        measured("fastest", 0.97, 90, 0.500),
        measured("as fast and smaller", 0.97, 40, 0.512),
        measured("slower and smallest", 0.97, 10, 0.8),
    ]
    assert judge(items, max_drop=0.01, objective="latency").best == "as fast and smaller"
    assert judge(items, max_drop=0.01, objective="size").best == "slower and smallest"


def test_the_size_objective_does_not_split_hairs():
    items = [
        measured("float32", 0.970, 10_000),
        measured("smallest", 0.961, 1_000),
        measured("a few bytes more", 0.968, 1_009),
        measured("a tenth more", 0.970, 1_100),
    ]
    assert judge(items, max_drop=0.01, objective="size").best == "a few bytes more"


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
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(30), keras.layers.Dense(4)])
    for stage in table.STAGES:
        stage.compressor(model)
        assert math.isclose(stage.epochs_of(1), 1)


# The search


def pruning(label, sparsity):
    return Step(label, "MagnitudePruning", {"sparsity": sparsity})


CLUSTERING = Step("cluster", "WeightClustering", {"bits": 3, "entropy": 0.05, "short_biases": True}, 1.0, 0.3)
TRIALS = (
    Trial((pruning("prune60", 0.6), CLUSTERING)),
    Trial((pruning("prune60", 0.6),), "dynamic"),
    Trial((Step("nothing", "NoEffectWarning", {}),)),  # cannot be made
)


@pytest.fixture(scope="module")
def searched(mlp, blobs, tmp_path_factory):
    """A search that was interrupted in its second round, and went on."""
    out = tmp_path_factory.mktemp("halving") / "out"
    # Given by name, the data can be named in the recipes.
    path = tmp_path_factory.mktemp("blobs") / "blobs.npz"
    arrays = {f"{axis}_{part}": getattr(blobs, f"{axis}_{part}") for axis in "xy" for part in ("train", "test")}
    np.savez(path, x_validation=blobs.x_validation, y_validation=blobs.y_validation, **arrays)
    options = {"out": out, "chains": TRIALS, "rungs": 2, "reduction": 3.0, "settings": QUICK}

    def interrupt(done, total, text):
        if text.startswith(("prune60: training", "prune60_dynamic: ")):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "FORMATS", ("int8",))
        with pytest.raises(KeyboardInterrupt):
            compression.search(mlp, str(path), 0.2, progress=interrupt, **options)
        before = {path: path.stat().st_mtime_ns for path in (out / "candidates").glob("*.tflite")}
        steps = []
        result = compression.search(mlp, str(path), 0.2, progress=lambda *step: steps.append(step), **options)
    return result, before, steps


def test_the_search_halves_and_goes_on_where_it_stopped(searched):
    result, before, steps = searched
    first, last = result.results["search"]["rungs_made"]
    assert [row["name"] for row in first["trials"]] and len(first["trials"]) == 3 and first["share"] == 1 / 3
    assert sorted(row["status"] for row in first["trials"]) == ["failed", "made", "made"]
    kept = [row["name"] for row in first["trials"] if row["promoted"]]
    assert [row["name"] + "_r0" for row in last["trials"]] == kept and len(kept) == 1 and last["share"] == 1.0
    assert result.results["resumed"]
    assert {path.stem for path in before} >= {"float32", "int8", "prune60_cluster_r0", "prune60_dynamic_r0"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert any(" left" in text for _, _, text in steps)
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)
    assert len([text for text in result.results["warnings"] if text.startswith("nothing_r0 could not be made")]) == 1
    assert [row["layer"] for row in result.results["search"]["sensitivity"]] == ["hidden", "logits"]


def test_every_claim_of_the_search_is_of_a_file(searched, blobs):
    result, _, _ = searched
    rungs = result.results["search"]["rungs_made"]
    claims = [row for rung in rungs for row in rung["trials"] if row["status"] != "failed"]
    for row in [*result.results["candidates"], *claims]:
        path = result.out / "candidates" / f"{row['name']}.tflite"
        assert workspace.sha256_of(path) == row["sha256"]
        assert export.unpack_bytes(path.with_suffix(".tfk").read_bytes()) == path.read_bytes()
        assert path.with_suffix(".tfk").stat().st_size == row["packed_bytes"]
        right = Runner(path)(blobs.x_validation).argmax(axis=-1) == blobs.y_validation
        assert row["validation_accuracy"] == pytest.approx(right.mean(), abs=1e-9)
    clustered = row_of(result, "prune60_cluster_r0" if "prune60_cluster_r0" in names(result) else "prune60_cluster")
    assert all(item["distinct"] <= 8 for item in clustered["weights"])


def names(result):
    return [row["name"] for row in result.results["candidates"]]


def test_the_front_is_what_no_file_beats(searched):
    result, _, _ = searched
    front = result.front
    good = [row for row in result.results["candidates"] if row["status"] in ("accepted", "baseline")]
    for row in good:
        beaten = [
            one["name"]
            for one in front
            if one["packed_bytes"] <= row["packed_bytes"] and one["validation_accuracy"] >= row["validation_accuracy"]
        ]
        assert beaten, row["name"]
    sizes = [row["packed_bytes"] for row in front]
    assert sizes == sorted(sizes) and result.best["name"] in [row["name"] for row in front]
    page = (result.out / "report.html").read_text(encoding="utf-8")
    assert "How they were found" in page and "prune60_cluster_r0" in page


def test_search_is_a_function_and_a_module():
    program = (
        "from tfkit import compression\n"
        "import tfkit.compression.search\n"
        "from tfkit.compression.search import SearchResult, search\n"
        "assert compression.search is search is tfkit.compression.search and callable(search)\n"
        "assert SearchResult.__name__ == 'SearchResult'\n"
    )
    assert compression.search is search.search and compression.search.__name__ == "search"
    assert "search" in compression.__all__
    exec(compile(program, "fresh", "exec"), {})


def test_a_time_budget_makes_the_search_smaller(tmp_path, monkeypatch):
    """Planned on paper: 100 s an epoch, so a whole search of 9 trials takes 9 * 3 * (1 + 1) epochs and more."""
    steps = tuple(Trial((pruning(f"prune{share}", share / 100),)) for share in range(10, 100, 10))
    asked = []

    def plan(budget):
        job = search._Job(None, workspace.Workspace(tmp_path / str(budget), {}, force=False, resume=True), None, 0.01,
                          "size", 0, {}, 0.0)  # fmt: skip
        clock = search._Clock(job.space, budget)
        halved = search._Halving(job, clock, steps, None, 9, 2, 3.0)
        halved.maker = type("Maker", (), {"epoch_seconds": 100.0, "settings": search.Settings(epochs=9)})()
        return halved._plan(9, lambda count: asked.append(count) or steps[:count])

    epochs = 100 * search.METHOD_COST
    assert len(plan(None).names) == 9 and plan(None).scale == 1.0
    assert len(plan(54 * epochs + 200).names) == 9
    fewer = plan(30 * epochs + 200)
    assert 3 <= len(fewer.names) < 9 and fewer.scale == 1.0
    least = plan(10 * epochs)
    assert len(least.names) == 3 and least.scale < 1.0
    assert plan(10 * epochs) == least  # A run that goes on keeps its plan.


def test_what_the_search_refuses(trained_digits_model, tiny_digits, tmp_path):
    step = pruning("prune", 0.5)
    for arguments, message in (
        ({"chains": [Trial((step._replace(label="a-b"),))]}, "`label` must be made of letters"),
        ({"chains": [Trial((step._replace(method="Magic"),))]}, "`method` must be the name of"),
        ({"chains": [Trial((step,)), Trial((step,))]}, "`chains` must be different"),
        ({"chains": [Trial((step,)), Trial((pruning("prune", 0.6),))]}, "`label` must be that of one step only"),
        ({"chains": [Trial((step,), "int4")]}, "quantization"),
        ({"chains": []}, "`chains` must be at least one"),
        ({"formats": ["int9"]}, "formats"),
        ({"time_budget": 0.0}, "time_budget"),
        ({"rungs": 0}, "rungs"),
        ({"objective": "beauty"}, "objective"),
    ):
        with pytest.raises(ValueError, match=message):
            compression.search(trained_digits_model, tiny_digits, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_promotion_is_non_dominated_sorting_with_crowding():
    points = [
        halving.Point("small", 0.90, 10.0),
        halving.Point("middle", 0.92, 20.0),
        halving.Point("near", 0.921, 21.0),
        halving.Point("large", 0.95, 80.0),
        halving.Point("beaten", 0.91, 30.0),
        halving.Point("lost", 0.20, 1.0),
    ]
    assert halving.promote(points, 9, floor=0.85) == ["small", "large", "near", "middle", "beaten", "lost"]
    assert halving.promote(points, 2, floor=0.85) == ["small", "large"]
    assert halving.promote(points, 2)[0] == "lost"
    assert halving.crowding(points[:2]) == [math.inf, math.inf]
    assert halving.sizes(9, 3, 3.0) == [9, 3, 1] and halving.sizes(5, 2, 3.0) == [5, 2]
    assert halving.shares(3, 3.0) == pytest.approx([1 / 9, 1 / 3, 1])


def test_the_first_look_is_spread_over_the_front():
    points = [halving.Point(f"{cost}", -1 / cost, float(cost)) for cost in (1, 2, 3, 4, 8, 9, 10, 100)]
    points.append(halving.Point("dominated", -2.0, 50.0))
    assert halving.spread(points, 3) == ["1", "10", "100"]
    assert halving.spread(points, 9)[-1] == "dominated" and len(halving.spread(points, 20)) == 9


def quadratic():
    """A model whose loss is not defined by chance: logits x @ w, two layers of the same data."""
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="relu", name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="second")(x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=value.shape).astype("float32") for value in model.get_weights()])
    return model


def test_sensitivity_is_the_divergence_with_one_layer_changed():
    model, rng = quadratic(), np.random.default_rng(1)
    x = rng.normal(size=(40, 6)).astype("float32")
    before = model.get_weights()
    measured = sensitivity.measure(model, x, output="logits", samples=30)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)

    def probabilities(kernels):
        hidden = np.maximum(x[:30] @ kernels[0] + before[1], 0)
        logits = (hidden @ kernels[1] + before[3]).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    kernels = [before[0], before[2]]
    base = probabilities(kernels)
    assert measured.samples == 30
    for position, row in enumerate(measured.layers):
        kernel = kernels[position]
        smallest = np.sort(np.abs(kernel).ravel())[round(0.8 * kernel.size)]
        step = np.abs(kernel).max(axis=0) / 3
        u, s, v = np.linalg.svd(kernel, full_matrices=False)
        half = round(len(s) / 2 + 1e-9)
        for changed, measured_divergence in (
            (np.where(np.abs(kernel) < smallest, 0, kernel), row.pruned),
            (np.round(kernel / step) * step, row.quantized),
            (u[:, :half] * s[:half] @ v[:half], row.low_rank),
        ):
            now = [changed if index == position else other for index, other in enumerate(kernels)]
            expected = np.mean(np.sum(base * np.log(base / probabilities(now)), axis=1))
            assert measured_divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
        pruned = np.where(np.abs(kernel) < smallest, 0, kernel)
        assert row.pruned_curvature == pytest.approx(row.pruned / np.sum((pruned - kernel) ** 2), rel=1e-4)


def minded(**curvatures):
    rows = [sensitivity.LayerSensitivity(name, 1, 0.1, 0.1, 0.1, value, value) for name, value in curvatures.items()]
    return sensitivity.Sensitivity(10, tuple(rows))


def test_zeros_go_where_they_cost_least():
    model = quadratic()
    shares = sensitivity.sparsity_by_sensitivity(model, minded(first=1.0, second=1.0), 0.5)
    together = np.abs(np.concatenate([model.get_layer(name).kernel.numpy().ravel() for name in ("first", "second")]))
    threshold = np.sort(together)[round(0.5 * 72) - 1]
    for name in ("first", "second"):
        expected = np.mean(np.abs(model.get_layer(name).kernel.numpy()) <= threshold)
        assert shares[name] == pytest.approx(expected, abs=1e-4)
    skewed = sensitivity.sparsity_by_sensitivity(model, minded(first=1.0, second=25.0), 0.5)
    assert skewed["first"] > shares["first"] and skewed["second"] < shares["second"]
    assert 48 * skewed["first"] + 24 * skewed["second"] == pytest.approx(36, abs=0.1)
    assert sensitivity.sparsity_by_sensitivity(model, minded(first=1.0, second=1.0), 0.0) == {}
    prices = sensitivity.price_by_sensitivity(model, minded(first=1.0, second=3.0), 0.05)
    assert prices["second"] < prices["first"] and all(0.0125 <= price <= 0.2 for price in prices.values())


def test_predictions_count_zeros_and_bits():
    model = quadratic()
    predict = trials.Predictor(model, minded(first=1.0, second=1.0))
    weights, rest = 72, 4 * 11
    plain = predict(Trial((), "float32"))
    assert plain == (weights * trials.FLOAT_BITS / 8 + rest + 2000, 1.0, 0.0)
    pruned = predict(Trial((Step("p", "MagnitudePruning", {"sparsity": {"*": 0.5}}),)))
    assert pruned.packed_bytes == pytest.approx(weights * (1 + 0.5 * trials.FLOAT_BITS) / 8 + rest + 2000)
    kernels = [model.get_layer(name).kernel.numpy().ravel() for name in ("first", "second")]
    assert pruned.loss == pytest.approx(sum(np.sum(np.sort(k**2)[: k.size // 2]) for k in kernels), rel=1e-5)
    narrow = predict(Trial((Step("q", "QuantizationAware", {"bits": 4}),), "int8-qat"))
    assert narrow.packed_bytes == pytest.approx(weights * 3 / 8 + rest + 2000) and narrow.latency_ratio < 1
    apart = 0.0
    for name in ("first", "second"):
        kernel = model.get_layer(name).kernel.numpy()
        step = np.abs(kernel).max(axis=0) / 7
        apart += np.sum((kernel - np.round(kernel / step) * step) ** 2)
    assert narrow.loss == pytest.approx(apart, rel=1e-4)


def test_the_space_of_chains_holds_together():
    model = quadratic()
    known = trials.space(model, minded(first=1.0, second=2.0))
    assert trials.check(known) == tuple(known) and len(known) > 100
    assert {trial.quantization for trial in trials.space(model, minded(first=1.0, second=1.0), ["int8-qat"])} == {
        "int8-qat"
    }
    predict = trials.Predictor(model, minded(first=1.0, second=2.0))
    for objective in ("size", "latency"):
        chosen = trials.first_rung(known, 6, predict, objective)
        assert len({trial.name for trial in chosen}) == 6
        assert chosen == trials.first_rung(known, 6, predict, objective)
    for trial in known:
        for stage in trial.stages():
            stage.compressor(model)
    shared = trials.Trial((pruning("a", 0.5), CLUSTERING))
    assert [stage.name for stage in shared.stages(1 / 3, "_r0")] == ["a_r0", "a_cluster_r0"]
    assert shared.stages()[1].parent == "a" and shared.candidate("_r0").stage == "a_cluster_r0"


def test_augmentation_mirrors_and_moves_and_repeats():
    x = np.random.default_rng(0).random((40, 6, 5, 2)).astype("float32")
    seed = tf.constant([3, 4])
    plain = Augmentation()(tf.constant(x), seed)
    np.testing.assert_array_equal(plain, x)
    flipped = np.asarray(Augmentation(flip=True)(tf.constant(x), seed))
    same = (flipped == x).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(flipped[~same], x[~same][:, :, ::-1])
    assert 5 < same.sum() < 35
    moved = np.asarray(Augmentation(shift=2)(tf.constant(x), seed))
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
    found = set()
    for index in range(40):
        (place,) = [(i, j) for i in range(5) for j in range(5)
                    if np.array_equal(padded[index, i : i + 6, j : j + 5], moved[index])]  # fmt: skip
        found.add(place)
    assert len(found) > 10
    np.testing.assert_array_equal(moved, Augmentation(shift=2)(tf.constant(x), seed))
    assert not np.array_equal(moved, Augmentation(shift=2)(tf.constant(x), seed + 2))
    with pytest.raises(ValueError, match="shift"):
        Augmentation(shift=-1)


def test_training_with_augmentation_repeats_and_passes_through_every_example(blobs):
    seen = []

    def watch(x, seed):
        tf.py_function(lambda batch, number: seen.append((len(batch), tuple(number.numpy()))), [x, seed], [])
        return x

    def batches(augment, seed=0):
        fit = FineTuning(blobs, epochs=2, batch_size=64, seed=seed, augment=augment)
        return np.concatenate([x for x, _ in fit._augmented(augment)])

    def noisy(x, seed):
        return x + tf.random.stateless_normal(tf.shape(x), seed)

    first = batches(noisy)
    np.testing.assert_array_equal(first, batches(noisy))
    assert len(np.unique(first, axis=0)) == 400 and not np.array_equal(first, batches(noisy, seed=1))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    before = model.get_weights()[0]
    FineTuning(blobs, epochs=2, batch_size=64, augment=watch)(model)
    assert not np.array_equal(before, model.get_weights()[0])
    assert sum(count for count, _ in seen) == 400 and len({number for _, number in seen}) == len(seen) == 8
    assert finetuning.describe_function(Augmentation(True, 3)) == "Augmentation(flip=True, shift=3)"
    assert "noisy" in finetuning.describe_function(noisy)


def test_measuring_takes_known_packed_sizes(searched, blobs):
    result, _, _ = searched
    file = result.out / "best.tflite"
    assert export.measure(file, blobs.x_test[:4], packed_bytes=[123]).packed_bytes == 123
    with pytest.raises(ValueError, match="packed_bytes"):
        export.measure(file, blobs.x_test[:4], packed_bytes=[1, 2])


@pytest.mark.parametrize("output", ["logits", "softmax", "sigmoid"])
def test_probabilities_of_every_kind_of_output(output):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 1 if output == "sigmoid" else 3)).astype("float32")
    given = {"logits": lambda x: x, "softmax": keras.ops.softmax, "sigmoid": keras.ops.sigmoid}[output](logits)
    both = np.concatenate([np.zeros_like(logits), logits], -1) if output == "sigmoid" else logits
    expected = np.exp(both) / np.exp(both).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(sensitivity.log_probabilities(given, output)), expected, rtol=1e-5)
