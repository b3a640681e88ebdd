"""The command line: what it prints, where, with which exit code, and how soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tfkit
from tfkit import cli
from tfkit.commands import common

HEAVY = ("tensorflow", "keras", "numba", "matplotlib", "mlxtend", "numpy")


def run(*arguments, cwd=None, **environment):
    """Runs the command as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from tfkit.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
    )


def test_help_loads_nothing_heavy():
    code = f"""
import sys
sys.argv = ["tfkit", "--help"]
from tfkit.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("data", "pack", "unpack", "bench"):
        assert command in done.stdout


def test_help_is_quick():
    """Processor time, which other processes do not lengthen; the best of three."""
    import resource

    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 1.0


def test_version():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"tfkit {tfkit.__version__}\n"


def test_data_list_as_json():
    result = CliRunner().invoke(cli.app, ["data", "--json"])
    listed = json.loads(result.stdout)
    assert [item["name"] for item in listed] == ["mnist5k", "mnist", "fashion_mnist", "cifar10"]
    assert listed[0]["kind"] == "embedded" and listed[0]["size_bytes"] > 1e6


def test_data_shows_shapes_and_classes(tmp_path):
    path = tmp_path / "own.npz"
    x, y = np.zeros((20, 5, 4), np.uint8), np.arange(20) % 2
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y, class_names=np.array(["cat", "dog"]))
    result = CliRunner().invoke(cli.app, ["data", str(path), "--validation", "0.25", "--json"])
    shown = json.loads(result.stdout)
    assert shown["input_shape"] == [5, 4, 1] and shown["class_names"] == ["cat", "dog"]
    assert (shown["train"], shown["validation"], shown["test"]) == (15, 5, 20)
    assert "cat, dog" in CliRunner().invoke(cli.app, ["data", str(path)]).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "mnits"], "Unknown data set 'mnits'"),
        (["data", "absent.npz"], "no file absent.npz"),
        (["pack", "absent.tflite"], "absent.tflite"),
        (["unpack", "absent.tfz"], "absent.tfz"),
        (["bench", "absent.tflite", "--data", "mnist5k"], "absent.tflite"),
    ],
)
def test_bad_input_is_one_message_and_code_2(tmp_path, arguments, message):
    done = run(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("tfkit: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_usage_errors_are_code_2():
    assert run("bench").returncode == 2
    assert run("nonsense").returncode == 2
    assert run("bench", "x.tflite", "--data", "mnist5k", "--threads", "0").returncode == 2


@pytest.mark.parametrize(("flag", "variable"), [(["--traceback"], "0"), ([], "1")])
def test_traceback_on_request(flag, variable):
    done = run(*flag, "data", "mnits", TFKIT_TRACEBACK=variable)
    assert done.returncode == 1 and "Traceback" in done.stderr and "DataError" in done.stderr


def test_own_fault_and_interruption_have_their_codes(monkeypatch, capsys):
    for error, code in ((AssertionError("broken"), 3), (KeyboardInterrupt(), 130)):

        def broken(raised=error):
            raise raised

        monkeypatch.setattr(cli, "app", broken)
        monkeypatch.delenv("TFKIT_TRACEBACK", raising=False)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
        assert capsys.readouterr().err.startswith("tfkit: ")


def test_completion_completes():
    command = Path(sys.executable).with_name("tfkit")
    environment = os.environ | {"_TFKIT_COMPLETE": "complete_bash", "COMP_WORDS": "tfkit un", "COMP_CWORD": "1"}
    done = subprocess.run([command], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["unpack"]


@pytest.fixture(scope="module")
def tflite(tmp_path_factory, trained_digits_model):
    from tfkit.export import convert

    return convert(trained_digits_model, tmp_path_factory.mktemp("cli") / "tiny.tflite")


def test_pack_and_unpack_give_the_same_bytes(tflite, tmp_path):
    packed, back = tmp_path / "tiny.packed", tmp_path / "back.tflite"
    result = CliRunner().invoke(cli.app, ["pack", str(tflite), "--out", str(packed), "--json"])
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    result = CliRunner().invoke(cli.app, ["unpack", str(packed), "--out", str(back), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["size_bytes"] == tflite.stat().st_size
    assert back.read_bytes() == tflite.read_bytes()
    done = run("unpack", packed, "--out", back)
    assert done.returncode == 2 and "force" in done.stderr
    assert run("unpack", packed, "--out", back, "--force").returncode == 0


def test_bench_reports_the_files_accuracy_and_holds_it_to_what_is_asked(tflite, trained_digits_model, digits):
    options = ("bench", tflite, "--data", "mnist5k", "--runs", "5", "--min-seconds", "0.05")
    done = run(*options, "--json", "--min-accuracy", "0.999")
    assert done.returncode == 1 and "below the 0.999 asked for" in done.stderr
    (measured,) = json.loads(done.stdout)
    expected = trained_digits_model.evaluate(digits.x_test, digits.y_test, verbose=0)[1]
    assert measured["accuracy"] == pytest.approx(expected, abs=0.0011)  # one digit of 1,000 may tip
    assert measured["size_bytes"] == tflite.stat().st_size and measured["runs"] >= 5
    table = run(*options)
    assert table.returncode == 0 and "tiny.tflite" in table.stdout and f"{measured['accuracy']:.4f}" in table.stdout


def test_sizes_are_readable():
    assert [common.size(size) for size in (None, 999, 1000, 1_500_000, 2e9)] == [
        "",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.0 GB",
    ]


@pytest.fixture
def two_files(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "items.npy", rng.normal(size=(1500, 8)).astype("float32"))
    np.save(tmp_path / "queries.npy", rng.normal(size=(60, 8)))
    return tmp_path / "items.npy", tmp_path / "queries.npy"


def test_retrieve_tune_writes_an_index_that_can_be_used(two_files, tmp_path):
    out = tmp_path / "tuned"
    arguments = ["retrieve", "tune", *map(str, two_files), "--out", str(out), "--k", "5", "--target-recall", "0.5"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "recall@5" in done.output and (out / "tuning.png").stat().st_size > 5000
    told = json.loads((out / "tuning.json").read_text())
    from tfkit import retrieval

    index = retrieval.Index.load(out / "best.index")
    assert repr(index) == told["index"] and index.search(np.ones(8), 5, **told["effort"]).ids.shape == (5,)
    again = CliRunner().invoke(cli.app, arguments)
    assert isinstance(again.exception, FileExistsError) and "--force" in str(again.exception)
    assert CliRunner().invoke(cli.app, [*arguments, "--force"]).exit_code == 0


def test_retrieve_bench_has_a_row_for_each_index(two_files):
    done = CliRunner().invoke(cli.app, ["retrieve", "bench", *map(str, two_files), "--json"])
    assert done.exit_code == 0, done.output
    names = {point["name"] for point in json.loads(done.stdout)["points"]}
    assert {"Exact", "NormScan", "IVF", "NSW"} <= names
    shown = CliRunner().invoke(cli.app, ["retrieve", "bench", *map(str, two_files)])
    assert "recall@10" in shown.output and "0.95" in shown.output and "NSW" in shown.output


def test_retrieve_refuses_what_is_no_array(two_files, tmp_path):
    items, queries = two_files
    (tmp_path / "text.npy").write_text("1 2 3")
    np.savez(tmp_path / "several.npz", a=np.ones(3), b=np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 64), }".ljust(117) + b"\n"
    (tmp_path / "vast.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name in ("text.npy", "several.npz", "objects.npy", "zip.npy", "vast.npy"):
        done = run("retrieve", "bench", tmp_path / name, queries)
        assert done.returncode == 2 and name in done.stderr, done.stderr


def test_retrieve_tune_makes_no_folder_for_what_it_cannot_read(two_files, tmp_path):
    (tmp_path / "text.npy").write_text("1 2 3")
    out = tmp_path / "tuned"
    done = CliRunner().invoke(
        cli.app, ["retrieve", "tune", str(tmp_path / "text.npy"), str(two_files[1]), "-o", str(out)]
    )
    assert isinstance(done.exception, ValueError) and not out.exists()
    done = CliRunner().invoke(cli.app, ["retrieve", "tune", *map(str, two_files), "-o", str(two_files[0])])
    assert isinstance(done.exception, NotADirectoryError)
