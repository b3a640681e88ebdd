"""`tfkit compress` and `tfkit demo`: what they print, where, and with which exit code."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from tfkit import cli


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Timing is tested elsewhere; a tenth of a second a file will do here."""
    from tfkit import export

    measure = export.measure
    brief = {"runs": 20, "min_seconds": 0.1}
    monkeypatch.setattr(export, "measure", lambda *args, **options: measure(*args, **brief, **options))


@pytest.fixture
def model_and_data(trained_digits_model, tiny_digits, tmp_path):
    model, archive = tmp_path / "own.keras", tmp_path / "own.npz"
    trained_digits_model.save(model)
    arrays = {f"{axis}_{part}": getattr(tiny_digits, f"{axis}_{part}") for axis in "xy" for part in ("train", "test")}
    np.savez(archive, **arrays)
    return str(model), str(archive)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(item) for item in arguments])


def test_compress_writes_a_folder_and_refuses_to_overwrite_it(model_and_data, tmp_path):
    model, archive = model_and_data
    out = tmp_path / "out"
    command = ("compress", model, "--data", archive, "--out", out, "--max-drop", "0.1", "--candidate", "dynamic_int8")
    done = run(*command, "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["best"] == "dynamic_int8" and results["max_drop"] == 0.1
    assert results == json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {"best.tflite", "best.tfk", "report.html", "candidates"} <= {path.name for path in out.iterdir()}

    again = run(*command)
    assert isinstance(again.exception, FileExistsError) and "--force" in str(again.exception)


def test_nothing_within_the_budget_is_exit_code_1(model_and_data, tmp_path):
    model, archive = model_and_data
    done = run(
        "compress", model, "--data", archive, "--out", tmp_path / "out", "--max-drop", "0",
        "--candidate", "pruned_90", "--epochs", "1", "--learning-rate", "1e-9",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "pruned_90" in done.stdout and "report.html" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["headline"] in " ".join(done.stdout.split())
    assert results["best"] == "float32"
    assert results["candidates"][1]["status"] == "rejected" and "points below" in results["candidates"][1]["reason"]
    assert "No candidate" in results["warnings"][0] and "no candidate is within" in done.stderr
    best = (tmp_path / "out" / "best.tflite").read_bytes()
    assert best == (tmp_path / "out" / "candidates" / "float32.tflite").read_bytes()


def test_demo_is_lenet5_on_the_embedded_digits(monkeypatch, tmp_path):
    from tfkit.compression import search

    calls = []

    def pretend(model, data, **options):
        calls.append((model, data, options))
        return SimpleNamespace(results={"figures": {}}, found=True)

    monkeypatch.setattr(search, "compress", pretend)
    assert run("demo", "--out", tmp_path / "d", "--seed", "3", "--json").exit_code == 0
    model, data, options = calls[0]
    assert (model, data, options["seed"], options["out"]) == ("lenet5", "mnist5k", 3, tmp_path / "d")
    assert options["candidates"] is None and options["force"] is False
    assert run("demo", "--quick", "--force", "--json").exit_code == 0
    assert calls[1][2]["force"] is True and len(calls[1][2]["candidates"]) < 6


def test_interruption_says_how_to_go_on(monkeypatch, tmp_path):
    from tfkit.compression import search

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "compress", interrupted)
    done = run("demo", "--out", tmp_path / "d")
    assert done.exit_code == 130 and "goes on from there" in done.stderr


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    done = run("demo", "--out", tmp_path / "demo", "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["figures"]["best_packed_ratio"] > 39
    assert results["figures"]["accepted"] >= 8
    assert all(row["status"] != "failed" for row in results["candidates"])
