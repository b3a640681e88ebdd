"""Several replicas give the weights of one process; a killed run goes on; what cannot be right is refused."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.tensorflow import trainer as keras_trainer

from tests.training import parity
from tfkit.commands import launch
from tfkit.training import distribute
from tfkit.training.distribute import checkpoint, keras_mend
from tfkit.training.distribute.fit import distributed

CASES = (
    "plain", "clipnorm", "global_clipnorm", "accumulation", "steps_per_execution", "custom", "importance", "lars",
    "graph",
)  # fmt: skip


def run(root, folder, cases, workers=0, replicas=0):
    """Runs cases of parity.py in processes of their own."""
    program = [sys.executable, str(root / "tests/training/parity.py"), *cases]
    if workers:
        line = ["launch", "--workers", str(workers), "--threads", "1", *program[1:]]
        program = [sys.executable, "-c", f"import sys; sys.argv[1:] = {line!r}; from tfkit.cli import main; main()"]
    environment = os.environ | {"PARITY_OUT": str(folder), "PARITY_REPLICAS": str(replicas)}
    environment.pop("TF_CONFIG", None)
    done = subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def assert_parity(folder, case, replicas):
    weights, history = parity.trained(case)
    with np.load(folder / f"{case}.npz", allow_pickle=False) as found:
        about = json.loads(str(found["about"]))
        assert about["replicas"] == replicas
        for index, expected in enumerate(weights):
            np.testing.assert_allclose(found[f"w{index}"], expected, atol=1e-5, err_msg=f"{case}, weight {index}")
    for name, values in history.items():
        if case not in ("importance", "custom"):  # their metrics are means of the replicas
            np.testing.assert_allclose(about["history"][name], values, rtol=1e-4, err_msg=f"{case}, {name}")


def test_two_workers_are_one_process(root, tmp_path):
    """Real processes over loopback: uneven batches, weights of examples, accumulation, clipping, validation, graphs."""
    run(root, tmp_path, ["accumulation", "graph"], workers=2)
    assert_parity(tmp_path, "accumulation", 2)
    assert_parity(tmp_path, "graph", 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_are_one_process(root, tmp_path, workers):
    cases = [case for case in CASES if case != "importance"]
    run(root, tmp_path, cases, workers=workers)
    for case in cases:
        assert_parity(tmp_path, case, workers)


@pytest.mark.slow
def test_mirrored_replicas_are_one_process(root, tmp_path):
    cases = [case for case in CASES if case != "importance"]
    run(root, tmp_path, cases, replicas=2)
    for case in cases:
        assert_parity(tmp_path, case, 2)


@pytest.mark.slow
def test_importance_sampling_runs_on_two_workers(root, tmp_path):
    run(root, tmp_path, ["importance"], workers=2)
    with np.load(tmp_path / "importance.npz", allow_pickle=False) as found:
        assert all(np.isfinite(found[name]).all() for name in found.files if name != "about")


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
from pathlib import Path
import keras, numpy as np
from tests.training import parity
from tfkit.training import distribute

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        steps = int(self.model.optimizer._iterations.numpy())
        print("step", steps, flush=True)
        once = Path({folder!r}) / "killed"
        if {kill} and steps == 9 and not distribute.is_chief(strategy) and not once.exists():
            once.touch()
            os.kill(os.getpid(), 9)

strategy = distribute.strategy()
with strategy.scope():
    model = parity.network()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
x, y, _ = parity.data()
history = distribute.fit(model, x, y, batch_size=8, epochs=3, verbose=0, callbacks=[Kill()],
                         checkpoint={folder!r} + "/state.npz", save_every=2)
if distribute.is_chief(strategy):
    np.savez({folder!r} + "/end.npz", *model.get_weights())
"""


@pytest.mark.slow
def test_a_killed_worker_costs_only_the_steps_since_the_checkpoint(root, tmp_path):
    ends, outputs = [], []
    for kill in (True, False):
        folder = tmp_path / str(kill)
        folder.mkdir()
        script = folder / "train.py"
        script.write_text(KILLED.format(root=str(root), folder=str(folder), kill=kill))
        line = ["launch", "--workers", "2", "--threads", "1", "--restarts", "1", str(script)]
        code = f"import sys; sys.argv[1:] = {line!r}; from tfkit.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        outputs.append(done.stdout)
        with np.load(folder / "end.npz") as end:
            ends.append([end[name] for name in end.files])
    for killed, whole in zip(*ends, strict=True):
        np.testing.assert_allclose(killed, whole, atol=1e-6)
    # Of the worker that died: it died after step 9, and the last checkpoint was made after step 8.
    steps = [int(line.split()[-1]) for line in outputs[0].splitlines() if line.startswith("[1] step")]
    assert steps == [*range(1, 10), *range(9, 19)]


# One process.


def model_with(optimizer="adam", **settings):
    model = parity.network()
    loss = settings.pop("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.compile(optimizer, loss, metrics=["accuracy"], **settings)
    return model


class Stop(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stop", "every"), [(8, 3), (6, None), (13, 4)])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, stop, every):
    x, y, _ = parity.data()
    whole = model_with()
    expected = distribute.fit(whole, x, y, batch_size=8, epochs=3, verbose=0).history
    settings = {"batch_size": 8, "epochs": 3, "checkpoint": tmp_path / "state.npz", "save_every": every, "verbose": 0}
    with pytest.raises(KeyboardInterrupt):
        distribute.fit(model_with(), x, y, **settings, callbacks=[Stop(stop)])
    resumed = model_with()
    history = distribute.fit(resumed, x, y, **settings).history
    for one, two in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(history["loss"], expected["loss"][-len(history["loss"]) :], rtol=1e-5)
    assert not distribute.fit(resumed, x, y, **settings).history, "a finished run trains no further"


def test_each_epoch_has_every_example_once_in_an_order_of_its_own():
    x = np.arange(23)
    data = distributed(tf.distribute.get_strategy(), (x,), 5, 5, 2, seed=3)
    batches = [batch[0].numpy() for batch in data]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3] * 2
    first, second = np.concatenate(batches[:5]), np.concatenate(batches[5:])
    np.testing.assert_array_equal(np.sort(first), x)
    np.testing.assert_array_equal(np.sort(second), x)
    assert (first != second).any()
    start = checkpoint.Position(1, 2)
    later = distributed(tf.distribute.get_strategy(), (x,), 5, 5, 2, start, seed=3)
    np.testing.assert_array_equal(np.concatenate([batch[0].numpy() for batch in later]), second[10:])


def test_damaged_and_foreign_states_are_refused(tmp_path):
    model, path = model_with(), tmp_path / "state.npz"
    assert checkpoint.restore(model, path) is None
    x, y, _ = parity.data()
    distribute.fit(model, x, y, batch_size=20, checkpoint=path, verbose=0)
    content = path.read_bytes()
    for damaged in (b"", b"not a zip", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a training state"):
            checkpoint.restore(model, path)
    np.savez(path, about=np.array(json.dumps({"format": checkpoint.FORMAT, "epoch": -1, "step": 0})))
    with pytest.raises(ValueError, match="not a training state"):
        checkpoint.restore(model, path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="another model or optimizer"):
        checkpoint.restore(model_with("sgd"), path)


def test_bad_arguments_are_refused(tmp_path):
    x, y, weight = parity.data()
    with pytest.raises(ValueError, match="as many examples"):
        distribute.fit(model_with(), x, y[:-1])
    with pytest.raises(ValueError, match="batch_size"):
        distribute.fit(model_with(), x, y, batch_size=0)
    with pytest.raises(ValueError, match="save_every"):
        distribute.fit(model_with(), x, y, checkpoint=tmp_path / "state.npz", save_every=0)
    with pytest.raises(ValueError, match="steps_per_execution"):
        distribute.fit(model_with(steps_per_execution=2), x, y, batch_size=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jit_compile": True}, "jit_compile"),
        ({"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())}, "LossScaleOptimizer"),
        ({"optimizer": keras.optimizers.SGD(use_ema=True)}, "use_ema"),
        ({"loss": keras.losses.SparseCategoricalCrossentropy(reduction="sum")}, "reduction='sum'"),
    ],
)
def test_what_replicas_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        distribute.check(model_with(**settings))


def test_another_keras_is_refused(monkeypatch):
    monkeypatch.setattr(keras_mend, "_originals", {})
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    before = keras_trainer.reduce_per_replica
    with pytest.raises(RuntimeError, match=r"Keras 3\.99\.0 is installed"):
        distribute.enable()
    assert keras_trainer.reduce_per_replica is before


def test_one_process_is_keras_own_fit():
    """With one replica the mended functions call Keras' own: the same weights to the last bit."""
    x, y, _ = parity.data()
    weights = []
    for enabled in (False, True):
        if enabled:
            distribute.enable()
            distribute.enable()
        model = model_with()
        model.fit(x, y, batch_size=20, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, two)


def test_workers_are_read_from_the_surroundings(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert distribute.workers() == 1
    monkeypatch.setenv("TF_CONFIG", launch.config(["a:1", "b:1", "c:1"], 1))
    assert distribute.workers() == 3
    monkeypatch.setenv("TF_CONFIG", "{")
    with pytest.raises(ValueError, match="TF_CONFIG"):
        distribute.workers()


def test_launch_ends_all_when_one_fails(capsys):
    code = "import json, os, sys, time; i = json.loads(os.environ['TF_CONFIG'])['task']['index']; print('worker', i)"
    assert launch.run([sys.executable, "-c", code], 2) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["[0] worker 0", "[1] worker 1"]
    assert launch.run([sys.executable, "-c", code + "; time.sleep(60 * (1 - i)); sys.exit(5 * i)"], 2) == 5
    assert len(set(launch.free_ports(4))) == 4


def test_launch_passes_arguments_on_and_restarts(tmp_path, root):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "mark = pathlib.Path(sys.argv[2])\n"
        "print('started', sys.argv[1:2])\n"
        "sys.exit(0 if mark.exists() else mark.touch() or 3)\n"
    )
    code = "from tfkit.cli import main; main()"
    line = [
        sys.executable,
        "-c",
        code,
        "launch",
        "-n",
        "1",
        "--restarts",
        "1",
        str(script),
        "--rate",
        str(tmp_path / "m"),
    ]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("[0] started ['--rate']") == 2, done.stdout + done.stderr
    assert "a worker ended with 3; 1 restarts left" in done.stderr
    missing = subprocess.run([*line[:-3], "absent.py"], cwd=root, capture_output=True, text=True, timeout=120)
    assert missing.returncode == 2 and "absent.py is not a file" in missing.stderr


def test_scaling_in_closed_form():
    one, many = distribute.scaling(1_000_000, 50.0, 32, [1, 4], bandwidth_gbit_s=1.0, latency_us=100.0)
    assert one.efficiency == 1 and one.examples_per_second == pytest.approx(640)
    assert many.communication_ms == pytest.approx(2 * 3 / 4 * 4e6 * 8 / 1e6 + 6 * 0.1)
    hidden = distribute.scaling(1_000_000, 90.0, 32, [4], bandwidth_gbit_s=1.0, latency_us=100.0, overlap=0.5)[0]
    assert hidden.step_ms == pytest.approx(90 + many.communication_ms - 30)
