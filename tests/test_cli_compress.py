"""`tfkit compress` and `tfkit demo`: what they print, where, and with which exit code."""

from __future__ import annotations

import importlib
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
    monkeypatch.setattr(export, "measure", lambda *args, **options: measure(*args, **(options | brief)))


@pytest.fixture
def model_and_data(trained_digits_model, tiny_digits, tmp_path):
    model, archive = tmp_path / "own.keras", tmp_path / "own.npz"
    trained_digits_model.save(model)
    arrays = {f"{axis}_{part}": getattr(tiny_digits, f"{axis}_{part}") for axis in "xy" for part in ("train", "test")}
    np.savez(archive, **arrays)
    return str(model), str(archive)


def searching():
    """The module; the package gives the function of this name."""
    return importlib.import_module("tfkit.compression.search")


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
        "--candidate", "pruned_80_dynamic", "--epochs", "1", "--learning-rate", "1e-9",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "pruned_80_dynamic" in done.stdout and "report.html" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["headline"] in " ".join(done.stdout.split())
    assert results["best"] == "float32"
    assert results["candidates"][1]["status"] == "rejected" and "points below" in results["candidates"][1]["reason"]
    assert "No candidate" in results["warnings"][0] and "no candidate is within" in done.stderr
    best = (tmp_path / "out" / "best.tflite").read_bytes()
    assert best == (tmp_path / "out" / "candidates" / "float32.tflite").read_bytes()


def test_demo_is_lenet5_on_the_embedded_digits(monkeypatch, tmp_path):
    calls = []

    def pretend(model, data, **options):
        calls.append((model, data, options))
        return SimpleNamespace(results={"figures": {}}, found=True)

    monkeypatch.setattr(searching(), "compress", pretend)
    assert run("demo", "--out", tmp_path / "d", "--seed", "3", "--json").exit_code == 0
    model, data, options = calls[0]
    assert (model, data, options["seed"], options["out"]) == ("lenet5", "mnist5k", 3, tmp_path / "d")
    assert options["candidates"] is None and options["force"] is False
    assert run("demo", "--quick", "--force", "--json").exit_code == 0
    assert calls[1][2]["force"] is True and len(calls[1][2]["candidates"]) < 6


def test_interruption_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(searching(), "compress", interrupted)
    done = run("demo", "--out", tmp_path / "d")
    assert done.exit_code == 130 and "goes on from there" in done.stderr


def test_search_passes_its_options_on(monkeypatch, tmp_path):
    calls = []

    def pretend(model, data, **options):
        calls.append((model, data, options))
        return SimpleNamespace(results={"figures": {}}, found=True)

    monkeypatch.setattr(searching(), "search", pretend)
    command = ("search", "resnet8", "--data", "cifar10", "--out", tmp_path / "s", "--json")
    assert run(*command, "--max-drop", "0.02", "--objective", "latency", "--time-budget", "60", "--first", "4",
               "--rungs", "3", "--epochs", "5", "--flip", "--shift", "2", "--seed", "7").exit_code == 0  # fmt: skip
    model, data, options = calls[0]
    assert (model, data, options["max_drop"], options["objective"]) == ("resnet8", "cifar10", 0.02, "latency")
    assert (options["time_budget"], options["first"], options["rungs"], options["seed"]) == (60.0, 4, 3, 7)
    assert options["settings"].epochs == 5
    assert options["settings"].augment == searching().Augmentation(flip=True, shift=2)
    assert run(*command).exit_code == 0
    assert calls[1][2]["time_budget"] is None and calls[1][2]["settings"].augment is None


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    done = run("demo", "--out", tmp_path / "demo", "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["figures"]["best_packed_ratio"] > 39
    assert results["figures"]["accepted"] >= 8
    assert all(row["status"] != "failed" for row in results["candidates"])
