"""The stand-alone runner: against NumPy, with every kernel set, and on files that are none."""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfkit.export import runner
from tfkit.export.runner import Runner, RunnerError

KERNELS = [{}, {"xnnpack": False}, {"reference": True}, {"threads": 2}]


@pytest.mark.parametrize("settings", KERNELS)
@pytest.mark.parametrize("name", ["float32", "float32_batch8"])
def test_gives_what_numpy_computes(small, name, settings):
    # 40 samples in pieces of 8 and 13 in pieces of 8 with a padded last one
    run = Runner(small.files[name], **settings)
    np.testing.assert_allclose(run(small.x), small.expected, atol=1e-5)
    np.testing.assert_allclose(run(small.x[:13]), small.expected[:13], atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int8_io", "uint8_io"])
def test_integer_files_take_and_give_floats(small, name):
    run = Runner(small.files[name])
    got = run(small.x)
    assert got.dtype == np.float32
    span = small.expected.max() - small.expected.min()
    assert np.abs(got - small.expected).max() < 0.03 * span  # a few of the 255 steps of the span


def test_quantization_follows_the_definition(small):
    run = Runner(small.files["int8_io"])
    scale, zero = run.inputs["features"]["quantization"]
    integers = np.arange(-128, 128)
    exact = ((integers - zero) * scale).astype(np.float32)
    np.testing.assert_array_equal(run.quantize("features", exact), integers.astype(np.int8))
    # The nearest integer, not the next lower one; beyond the range the end of it.
    np.testing.assert_array_equal(run.quantize("features", exact[:-1] + 0.4 * scale), integers[:-1])
    np.testing.assert_array_equal(run.quantize("features", exact[:-1] + 0.6 * scale), integers[1:])
    np.testing.assert_array_equal(run.quantize("features", np.float32([-1e6, 1e6])), [-128, 127])
    out_scale, out_zero = run.outputs["scores"]["quantization"]
    np.testing.assert_allclose(
        run.dequantize("scores", np.int8([-128, 0, 127])), (np.array([-128, 0, 127]) - out_zero) * out_scale, rtol=1e-6
    )


def test_inputs_already_quantized_pass_unchanged(small):
    run = Runner(small.files["int8_io"])
    integers = run.quantize("features", small.x)
    np.testing.assert_array_equal(run(integers), run(small.x))


def test_kernels_and_delegate_are_what_was_asked(small):
    assert [Runner(small.files["float32"], **s).kernels for s in KERNELS[:3]] == ["xnnpack", "builtin", "reference"]
    assert Runner(small.files["float32"]).delegated is True
    assert Runner(small.files["float32"], xnnpack=False).delegated is False
    assert Runner(small.files["float32"], reference=True).delegated is False


def test_names_and_bytes(small):
    run = Runner(small.files["float32"].read_bytes())
    assert list(run.inputs) == ["features"]
    assert list(run.outputs) == ["scores"]
    assert run.batch_size == 1
    assert Runner(small.files["float32_batch8"]).batch_size == 8
    np.testing.assert_array_equal(run({"features": small.x}), run([*small.x]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 5), np.float32), r"shape \[1, 6\].*got \[2, 5\]"),
        (np.zeros((0, 6), np.float32), "no samples"),
        (np.array([["a"] * 6]), "numeric"),
        ({"a": np.zeros((1, 6)), "b": np.zeros((1, 6))}, "has inputs"),
    ],
)
def test_inputs_that_do_not_fit(small, x, message):
    with pytest.raises(RunnerError, match=message):
        Runner(small.files["float32"])(x)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"#!/usr/bin/env python3\nprint('hello')\n", "TFL3"),
        (b"\xff\xff\xff\x7fTFL3" + bytes(40), "root"),
        (b"\x10\x00\x00\x00TFL3" + bytes(40), "refuses"),
    ],
)
def test_files_that_are_no_models(tmp_path, content, message):
    path = tmp_path / "bad.tflite"
    path.write_bytes(content)
    with pytest.raises(RunnerError, match=message) as caught:
        Runner(path)
    assert "bad.tflite" in str(caught.value)


def test_truncated_file_is_refused(small, tmp_path):
    whole = small.files["float32"].read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 200):
        with pytest.raises(RunnerError):
            Runner(whole[:length])


def test_accuracy_counts_right_answers(small):
    run = Runner(small.files["float32"])
    wrong = small.y.copy()
    wrong[:10] = (wrong[:10] + 1) % 3
    assert runner.accuracy(run, small.x, small.y) == (1.0, 40)
    assert runner.accuracy(run, small.x, wrong) == (0.75, 40)
    assert runner.accuracy(run, small.x, np.eye(3)[wrong]) == (0.75, 40)
    assert runner.accuracy(run, small.x, wrong[:, None]) == (0.75, 40)
    with pytest.raises(RunnerError, match="labels of shape"):
        runner.accuracy(run, small.x, small.y[:-1])


class _Recorder:
    """Stands in for a Runner and writes down who was run."""

    batch_size = 1

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def batches(self, arrays: Any) -> Any:
        return iter([({"x": arrays["x"]}, 1)])

    def set_inputs(self, pieces: Any) -> None:
        pass

    def invoke(self) -> None:
        self.log.append(self.name)


def test_rounds_interleave_and_rotate(monkeypatch):
    monkeypatch.setattr(runner, "WARMUP_SECONDS", 0.0)
    log: list[str] = []
    files: Any = [_Recorder(name, log) for name in "ABC"]
    inputs = [{"x": np.zeros((1, 1))}] * 3
    results = runner.time_interleaved(files, inputs, runs=9, min_seconds=0.0, rounds=3)
    warm = runner.WARMUP_RUNS
    assert log[: 3 * warm] == ["A"] * warm + ["B"] * warm + ["C"] * warm
    assert "".join(log[3 * warm :]) == "AAABBBCCC" + "BBBCCCAAA" + "CCCAAABBB"
    for result in results:
        assert result["runs"] == 9
        assert result["warmup_runs"] == warm
        assert len(result["round_p50_ms"]) == 3
        assert 0 <= result["min_ms"] <= result["p50_ms"] <= result["p90_ms"] <= result["p99_ms"]


def test_percentiles_are_those_of_the_clock(monkeypatch):
    """A clock that makes run n last n ms: the percentiles are then known."""
    monkeypatch.setattr(runner, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(runner, "WARMUP_RUNS", 0)
    now = [0.0]
    run = _Recorder("A", [])
    durations = iter(np.arange(1, 102) / 1e3)
    monkeypatch.setattr(run, "invoke", lambda: now.__setitem__(0, now[0] + next(durations)))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    files: Any = [run]
    (result,) = runner.time_interleaved(files, [{"x": np.zeros((1, 1))}], runs=101, min_seconds=0.0, rounds=1)
    assert result["runs"] == 101
    assert result["p50_ms"] == pytest.approx(51)
    assert result["p90_ms"] == pytest.approx(91)
    assert result["p99_ms"] == pytest.approx(100)
    assert result["mean_ms"] == pytest.approx(51)
    assert result["round_p50_ms"] == [pytest.approx(51)]


def _script(folder: Path) -> Path:
    return Path(shutil.copy(runner.__file__, folder / "runner.py"))  # as on a device: the file alone


def test_script_stands_alone(small, tmp_path):
    np.savez(tmp_path / "x.npz", x=small.x)
    np.savez(tmp_path / "test.npz", x=small.x, y=small.y)
    command = [sys.executable, _script(tmp_path), small.files["float32"], small.files["int8_io"]]
    command += ["--inputs", tmp_path / "x.npz", "--accuracy", tmp_path / "test.npz"]
    command += ["--runs", "50", "--min-seconds", "0.02", "--no-xnnpack", "--json"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout)
    assert result["tensorflow_imported"] is False
    assert (result["kernels"], result["xnnpack"], result["threads"]) == ("builtin", False, 1)
    assert result["inputs_source"] == "x.npz"
    first, second = result["files"]
    assert first["size_bytes"] == small.files["float32"].stat().st_size
    assert first["accuracy"] == 1.0
    assert second["accuracy_samples"] == 40
    assert second["inputs"][0]["dtype"] == "int8"
    for entry in (first, second):
        assert entry["runs"] >= 50
        assert entry["delegated"] is False
        assert min(entry["load_ms"], entry["allocate_ms"], entry["first_run_ms"], entry["p50_ms"]) > 0
        if sys.platform == "linux":
            assert entry["peak_memory_bytes"] >= entry["baseline_memory_bytes"] > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.tflite"], "missing.tflite: cannot be read"),
        (["text.tflite"], "text.tflite: not a .tflite file"),
        (["good.tflite", "--inputs", "text.tflite"], "without pickles"),
        (["good.tflite", "--inputs", "wrong.npy"], "must have shape"),
        (["good.tflite", "--threads", "0"], "--threads"),
    ],
)
def test_script_refuses_with_exit_code_2(small, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "text.tflite").write_text("this is not a model, however long it is")
    shutil.copy(small.files["float32"], tmp_path / "good.tflite")
    np.save(tmp_path / "wrong.npy", np.zeros((3, 7), np.float32))
    monkeypatch.chdir(tmp_path)
    assert runner.main(arguments) == runner.BAD_INPUT_EXIT == 2
    assert message in capsys.readouterr().err


def test_a_file_that_kills_the_interpreter_is_named(tmp_path, monkeypatch):
    killer = tmp_path / "runner.py"
    killer.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(runner, "__file__", str(killer))
    with pytest.raises(RunnerError, match=r"hostile\.tflite.*SIGSEGV"):
        runner.measure_cold_in_child("hostile.tflite", [])


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(RunnerError, match="pickle"):
        runner.load_arrays(str(tmp_path / "objects.npy"))


def test_random_inputs_repeat_by_seed(small):
    run = Runner(small.files["float32"])
    a, b, c = (runner.fitting_inputs(run, None, seed)["features"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0


def test_source_is_python_3_9_and_needs_numpy_alone():
    text = Path(runner.__file__).read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert imported <= set(sys.stdlib_module_names) | {"numpy"}
    assert isinstance(runner.build_parser(), argparse.ArgumentParser)
