"""Measurement in a fresh process."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfkit.export import LatencyRatio, MeasureError, Measurement, compare_latency, measure, runner

QUICK = {"runs": 20, "min_seconds": 0.02}


@pytest.fixture(scope="module")
def together(small) -> list[Measurement]:
    files = [small.files["float32"], str(small.files["int8"])]
    return measure(files, small.x, accuracy_data=(small.x, small.y), xnnpack=False, threads=2, **QUICK)


def test_several_files_in_order(small, together):
    assert [Path(m.path).name for m in together] == ["float32.tflite", "int8.tflite"]
    for m in together:
        assert m.runs >= 20
        assert len(m.round_p50_ms) == runner.ROUNDS
        assert m.p50_ms <= m.p90_ms <= m.p99_ms
        assert (m.kernels, m.xnnpack, m.threads, m.delegated) == ("builtin", False, 2, False)
        assert m.machine["tensorflow_imported"] is False
        assert m.machine["runtime"] in ("ai_edge_litert", "tflite_runtime")


def test_sizes_are_counted_bytes(small, together):
    from tfkit.export import pack_bytes

    content = small.files["float32"].read_bytes()
    assert together[0].size_bytes == len(content)
    assert together[0].sha256 == hashlib.sha256(content).hexdigest()
    assert len(gzip.decompress(gzip.compress(content, 9))) == len(content)
    assert together[0].gzip_bytes == len(gzip.compress(content, compresslevel=9, mtime=0))
    assert together[0].packed_bytes == len(pack_bytes(content))


def test_accuracy_is_that_of_the_file(small, together):
    for m, name in zip(together, ("float32", "int8"), strict=True):
        expected = np.mean(runner.Runner(small.files[name])(small.x).argmax(1) == small.y)
        assert m.accuracy == pytest.approx(expected)
        assert m.accuracy_samples == 40


def test_one_file_gives_one_measurement(small):
    m = measure(small.files["int8_io"], {"features": small.x}, **QUICK)
    assert isinstance(m, Measurement)
    assert m.accuracy is None
    assert m.xnnpack
    assert m.inputs[0]["dtype"] == "int8"
    assert json.loads(json.dumps(m.to_dict()))["round_p50_ms"] == list(m.round_p50_ms)


def test_ratios_are_taken_round_by_round(small, monkeypatch, together):
    import dataclasses

    module = sys.modules["tfkit.export.measure"]
    first = dataclasses.replace(together[0], round_p50_ms=(1.0, 2.0, 4.0))
    second = dataclasses.replace(together[1], round_p50_ms=(0.5, 1.5, 1.0))
    monkeypatch.setattr(module, "measure", lambda *_, **__: [first, second])
    ratios = compare_latency(["a", "b"], None)
    assert ratios[0] == LatencyRatio(first, 1.0, 1.0, 1.0)
    assert ratios[1] == LatencyRatio(second, 0.5, 0.25, 0.75)


@pytest.mark.parametrize("keep", [0, 12, 60, 0.5])
def test_damaged_files_are_named(small, tmp_path, keep):
    content = small.files["float32"].read_bytes()
    bad = tmp_path / "broken.tflite"
    bad.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(MeasureError, match=r"broken\.tflite"):
        measure([small.files["float32"], bad], small.x, **QUICK)


def test_inputs_that_do_not_fit(small):
    with pytest.raises(MeasureError, match="shape"):
        measure(small.files["float32"], np.zeros((4, 7), np.float32), **QUICK)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"died \(SIGSEGV\).*float32\.tflite"),
        ("raise SystemExit('error: some.tflite: no good')", "some.tflite: no good"),
        ("import time; time.sleep(60)", "longer than"),
    ],
)
def test_a_dying_child_is_an_error_not_a_crash(small, tmp_path, monkeypatch, code, message):
    (tmp_path / "runner.py").write_text(code)
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    with pytest.raises(MeasureError, match=message):
        measure(small.files["float32"], small.x, timeout_seconds=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": []}, "paths"),
        ({"threads": 0}, "threads"),
        ({"runs": 0}, "runs"),
        ({"min_seconds": -1}, "min_seconds"),
        ({"inputs": np.array(["a"])}, "numeric"),
        ({"inputs": np.zeros((0, 6))}, "at least one sample"),
        ({"accuracy_data": (np.array([{}], dtype=object), np.zeros(1))}, "accuracy_data"),
    ],
)
def test_arguments_that_break_their_rule(small, changes, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"paths": small.files["float32"], "inputs": small.x, **changes})


def test_the_package_is_imported_without_tensorflow_and_keeps_its_functions():
    code = """
import sys
import tfkit.export
from tfkit.export import measure, Runner, pack_bytes
assert "tensorflow" not in sys.modules and "keras" not in sys.modules
from tfkit.export.measure import Measurement
from tfkit.export.pack import PackError
assert callable(tfkit.export.measure) and tfkit.export.measure is measure
assert callable(tfkit.export.pack)
assert set(tfkit.export.__all__) <= set(dir(tfkit.export))
try:
    tfkit.export.nothing
except AttributeError:
    print("fine")
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.strip() == "fine", child.stderr
