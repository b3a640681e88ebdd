"""The parts of benchmarks/peers/compression.py that its figures rest on, and a small run of tfkit's side."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import common
from benchmarks.peers import stepclock, summary
from benchmarks.peers.plan import FULL, METHODS, QUICK


def test_write_result_refuses_what_is_not_a_plain_number(tmp_path):
    for bad in (float("nan"), True, "1", None, [1]):
        with pytest.raises(ValueError, match="plain number"):
            common.write_result(tmp_path / "r.json", {"ratio": bad})
    assert list(tmp_path.iterdir()) == []


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = common.write_json(tmp_path / "deep" / "r.json", {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_result_names_machine_and_command(tmp_path):
    written = json.loads(common.write_result(tmp_path / "r.json", {"x": 2}, table=[1]).read_text())
    assert written["figures"] == {"x": 2} and written["table"] == [1]
    assert written["machine"]["cores"] >= 1 and written["machine"]["cpu"] and written["command"]


def test_versions_say_when_a_package_is_absent():
    found = common.versions("numpy", "no-such-distribution-here")
    assert found == {"numpy": np.__version__, "no-such-distribution-here": "absent"}


@pytest.mark.parametrize("plan", FULL + QUICK)
@pytest.mark.parametrize("examples", [512, 9999, 20000])
def test_pruning_ends_on_an_update_within_the_training(plan, examples):
    every, end = plan.prune_pace(examples)
    steps = -(-examples // plan.batch_size) * plan.prune_epochs
    assert end % every == 0 and 0 < end < steps
    assert abs(end - 0.6 * steps) <= every


def test_step_seconds_are_medians_of_ratios_within_a_round(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stepclock.time, "perf_counter", lambda: now[0])
    speed = iter([9.0, 1.0, 2.0, 4.0])  # one factor a round; the first round compiles and does not count

    class Base:
        pass

    def fit(step, starts_round):
        def run(watch):
            if starts_round:
                run.factor = fit.factor = next(speed)
            for number in range(8):
                # Slow first steps, to be skipped.
                now[0] += fit.factor * (100.0 if number < 3 else step)
                watch.on_train_batch_end(number)

        return run

    found = stepclock.step_seconds(
        {"float": fit(2.0, True), "qat": fit(3.0, False)}, lambda: stepclock.make_clock(Base), rounds=3
    )
    assert found["qat"]["over_float"] == pytest.approx(1.5)
    assert found["float"] == {"step_ms": pytest.approx(1e3 * 2.0 * 2.0), "over_float": 1.0}


def test_steps_of_gives_full_batches_in_order():
    x = np.arange(5)
    repeated, labels = stepclock.steps_of(x, 10 * x, batch_size=4, steps=3)
    assert repeated.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1] and (labels == 10 * repeated).all()


def rows_of(accuracies, general=100, packed=80):
    size = {"raw": 400, "gzip": general + 5, "xz": general, "zstd": general + 9, "packed": packed}
    return [
        {
            "side": "tfkit",
            "method": method,
            "accuracy": accuracy,
            "p50_ms": 1.0,
            "latency_over_float": 0.5,
            "zeros": 0.0,
            "distinct": 7,
            "train_seconds": 1.0,
            "bytes": size | ({"raw": 100} if method == "qat" else {}),
            "packed_over_best_general": packed / general,
        }
        for method, accuracy in accuracies.items()
    ]


def test_figures_are_means_over_seeds_and_the_worst_file():
    timing = {"tfkit": {"qat": {"step_ms": 3.0, "over_float": 1.5}}}
    first = rows_of({"float": 0.90, "qat": 0.89, "prune_cluster": 0.8})
    second = rows_of({"float": 0.92, "qat": 0.92, "prune_cluster": 0.8}, general=100, packed=95)
    seeds = {str(n): {"convnet_bn": {"timing": timing, "rows": rows}} for n, rows in enumerate((first, second))}
    table = summary.summarize(seeds)
    figures = summary.figures(table, seeds)
    assert figures["qat_accuracy_drop_points"] == pytest.approx(0.5)
    assert figures["packed_over_best_general"] == pytest.approx(0.95)
    assert figures["qat_step_over_float_step"] == 1.5 and figures["qat_latency_over_float"] == 0.5
    assert figures["qat_times_smaller_raw"] == 4.0
    assert [row["method"] for row in table] == [m for m in METHODS if m in ("float", "prune_cluster", "qat")]


def test_a_failed_method_of_the_peer_is_a_row_with_its_error(capsys):
    rows = [*rows_of({"float": 0.9, "qat": 0.9}), {"side": "tfmot", "method": "qat", "error": "ValueError: no"}]
    timing = {"tfkit": {"qat": {"step_ms": 3.0, "over_float": 1.5}}}
    seeds = {"0": {"convnet_bn": {"timing": timing, "rows": rows}}}
    table = summary.summarize(seeds)
    assert {"network": "convnet_bn", "method": "qat", "side": "tfmot", "error": "ValueError: no"} in table
    assert not any(name.startswith("tfmot_") for name in summary.figures(table, seeds))
    summary.show(table)
    assert "ValueError: no" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["lenet5", "convnet_bn", "resnet8"])
@pytest.mark.parametrize("generation", ["keras", "tf_keras"])
def test_the_twin_computes_the_same(network, generation):
    library = pytest.importorskip(generation)
    from benchmarks.peers import twin
    from tfkit import models

    model = models.get(network)(seed=0)
    rng = np.random.default_rng(0)
    for layer in model.layers:  # moving statistics other than 0 and 1, so that a swap of them shows
        if type(layer).__name__ == "BatchNormalization":
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    spec = json.loads(json.dumps(twin.describe(model)))
    weights = twin.weights_by_order(model)
    copy = twin.build(spec, library.layers, library.Model)
    twin.load_weights(copy, weights)
    x = rng.uniform(size=(3, *model.input_shape[1:])).astype("float32")
    expected = np.asarray(model(x))
    np.testing.assert_allclose(np.asarray(copy(x)), expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="missing"):
        twin.load_weights(copy, dict(list(weights.items())[1:]))
    with pytest.raises(ValueError, match="have none"):
        twin.load_weights(copy, {**weights, "other/0": x})


def test_the_twin_refuses_a_layer_it_does_not_know():
    import keras

    from benchmarks.peers import twin

    model = keras.Sequential([keras.Input((4,)), keras.layers.LayerNormalization(name="norm")])
    with pytest.raises(ValueError, match=r"'norm'.*LayerNormalization"):
        twin.describe(model)


@pytest.mark.slow
def test_a_small_run_of_our_side(root, tmp_path):
    out = tmp_path / "r.json"
    command = [sys.executable, str(root / "benchmarks/peers/compression.py"), "--quick", "--seeds", "0"]
    command += ["--networks", "convnet_bn", "--methods", "qat", "prune_cluster_qat", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    written = json.loads(out.read_text())
    assert written["peer"] is None and written["figures"]["qat_times_smaller_raw"] > 3
    owed = {
        "packed_over_best_general",
        "qat_accuracy_drop_points",
        "qat_latency_over_float",
        "qat_step_over_float_step",
    }
    assert owed <= set(written["figures"])
    rows = {row["method"]: row for row in written["table"]}
    assert set(rows) == {"float", "qat", "prune_cluster_qat"}
    assert rows["prune_cluster_qat"]["zeros"] > 0.7
