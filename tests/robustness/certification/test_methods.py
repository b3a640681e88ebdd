"""Methods beside each other and beside exact answers; certified radii under attack."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.robustness.certification.conftest import inside, scattered
from tfkit.compression.fake_quantize import FakeQuantize
from tfkit.robustness.certification import (
    AlphaCrown,
    Crown,
    CrownIBPTraining,
    Dual,
    FastLip,
    IntervalBoundTraining,
    Network,
    bounds,
    certified_radius,
    certify,
    exact_distance,
    exact_margin,
    method_names,
    read_tflite,
)
from tfkit.robustness.certification.base import as_method
from tfkit.robustness.certification.margins import margin_rows
from tfkit.robustness.certification.radius import _search
from tfkit.robustness.certification.region import NORMS

X = np.random.default_rng(0).uniform(size=(2, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def asked(mlp):
    """A problem, its rows, and the answers of the LP and of branch and bound."""
    network = Network(mlp)
    rows = margin_rows(network.forward(X).argmax(1), 3)
    problem = network.problem(X, np.array([0.1, 0.25]), np.inf, None, "real")

    def solved(relaxed):
        found = [
            [exact_margin(network, X[i], problem.epsilon[i], row, relaxed=relaxed) for row in rows[i]] for i in range(2)
        ]
        return np.array(found)

    return network, problem, rows, solved(True), solved(False)


def test_order_of_the_methods(asked):
    network, problem, rows, lp, exact = asked
    found = {name: as_method(name).lower(network, problem, rows, {}) for name in ("interval", "fast_lin", "crown")}
    found["alpha_crown"] = AlphaCrown(steps=10).lower(network, problem, rows, {})
    assert (found["interval"] <= found["fast_lin"] + 1e-9).all()
    assert (found["crown"] <= found["alpha_crown"] + 1e-9).all()
    assert (found["crown"] <= lp + 1e-6).all() and (lp <= exact + 1e-6).all()
    assert (found["alpha_crown"] <= exact + 1e-6).all()
    assert (found["crown"] < found["alpha_crown"] - 1e-4).any()  # Slopes were worth optimising.


def test_dual_is_valid_at_every_step_and_reaches_the_lp(asked):
    network, problem, rows, lp, _ = asked
    interval = as_method("interval").lower(network, problem, rows, {})
    trace = Dual(steps=80).trace(network, problem, rows)
    assert (np.diff(trace, axis=0) >= 0).all() and (trace <= lp + 1e-6).all()
    assert ((lp - trace[-1]) <= 0.05 * (lp - interval) + 1e-6).all()
    cold = Dual(steps=30, start="zero", inner="interval").trace(network, problem, rows)
    assert (cold[0] >= interval - 1e-9).all() and (cold[-1] > interval + 1e-3).all() and (cold <= lp + 1e-6).all()


def test_fast_lip_bounds_gradients(mlp):
    network = Network(mlp)
    rows = np.tile(np.eye(3), (2, 1, 1))
    for order, dual in ((1.0, np.inf), (2.0, 2), (np.inf, 1)):
        problem = network.problem(X, np.full(2, 0.1), order, None, "real")
        found = FastLip().lipschitz(network, problem, rows)
        points = tf.constant(inside(X, 0.1, order, None, 50).reshape(-1, 5), tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(points)
            output = mlp(points)
        slopes = tape.batch_jacobian(output, points).numpy().reshape(50, 2, 3, 5)
        steepest = np.linalg.norm(slopes, dual, axis=-1).max(0)
        assert (found >= steepest * (1 - 1e-5)).all() and (found <= 3 * steepest).all()


def test_search_finds_zeros_of_concave_margins():
    zeros = np.array([0.003, 1.0, 40.0, 7.0])
    seen = []

    def margin(chosen, epsilon):
        seen.append(len(chosen))
        return np.where(epsilon > 1e3, -np.inf, 2 - 2 * (epsilon / zeros[chosen]) ** 1.5)

    found = _search(margin, 4, 0.01, 1e6, 1e-4)
    assert (found <= zeros).all() and (found >= zeros * (1 - 1.1e-4)).all()
    assert len(seen) < 25 and seen[-1] < 4
    np.testing.assert_array_equal(_search(lambda c, e: np.ones(len(c)), 2, 0.1, 5.0, 1e-3), 5.0)
    np.testing.assert_array_equal(_search(lambda c, e: -np.ones(len(c)), 2, 0.1, 5.0, 1e-3), 0.0)


def test_radius_lies_below_the_nearest_adversarial_example(mlp):
    y = Network(mlp).forward(X).argmax(1)
    radii = {name: certified_radius(mlp, X, y, "linf", name).radius for name in ("interval", "fast_lin", "crown")}
    nearest = np.array([exact_distance(mlp, X[i], y[i], limit=1.5).distance for i in range(2)])
    for found in radii.values():
        assert (found > 0).all() and (found < nearest).all()
    assert (radii["interval"] < radii["crown"]).all()
    wrong = certified_radius(mlp, X, (y + 1) % 3)
    assert (wrong.radius == 0).all() and (wrong.margin <= 0).all()
    targeted = certified_radius(mlp, X, y, targets=(y + 1) % 3)
    assert targeted.targeted and (targeted.radius >= radii["crown"] * (1 - 2e-3)).all()
    clipped = certified_radius(mlp, X, y, clip=(0, 1))
    assert clipped.clip == (0.0, 1.0) and (clipped.radius >= radii["crown"] * (1 - 2e-3)).all()


def attacked(model, x, y, epsilon, order, seed):
    """Whether projected gradient steps from random starts find another class, in float32; (examples,)."""
    found = np.zeros(len(x), bool)
    size = epsilon[:, None]
    for start in range(3):
        move = inside(x, 1.0, order, None, 2, seed + start)[1] - x
        move *= size
        for step in range(12):
            points = tf.constant(x + move, tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(points)
                logits = model(points)
                ahead = tf.reduce_max(logits - 1e9 * tf.one_hot(y, 3), 1) - tf.gather(logits, y, batch_dims=1)
            found |= ahead.numpy() > 0
            slope = tape.gradient(ahead, points).numpy().astype(np.float64)
            if np.isinf(order):
                move = np.clip(move + size * np.sign(slope) * 0.5, -size, size)
                continue
            if order == 1:  # The whole ball's steepest corner, or half-way there.
                slope *= np.abs(slope) >= np.abs(slope).max(1, keepdims=True)
            slope /= np.maximum(np.linalg.norm(slope, order, axis=1, keepdims=True), 1e-30)
            move += size * slope * (0.5 if step < 9 else 3.0)
            move *= np.minimum(1, size / np.linalg.norm(move, order, axis=1, keepdims=True))
    return found


@given(seed=st.integers(0, 10**6), norm=st.sampled_from(sorted(NORMS)), name=st.sampled_from(["crown", "fast_lin"]))
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_attack_refutes_a_certificate(seed, norm, name):
    body = [keras.layers.Dense(6, activation="relu"), keras.layers.Dense(3)]
    model = scattered(keras.Sequential([keras.Input((3,)), *body]), seed)
    x = np.random.default_rng(seed).uniform(-1, 1, (40, 3)).astype(np.float32)
    # To the last digit, where a single hidden layer leaves the bound no room.
    radii = certified_radius(model, x, norm=norm, method=name, tolerance=1e-7, dtype="float64")
    y, order = Network(model).forward(x).argmax(1), NORMS[norm]
    assert (radii.radius > 0).mean() > 0.9
    assert not attacked(model, x, y, radii.radius, order, seed).any()
    assert attacked(model, x, y, radii.radius * 3, order, seed).mean() > 0.2  # The attack is worth something.


def test_a_network_that_overflows_is_not_certified():
    model = scattered(keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(2)]))
    model.layers[0].kernel.assign(np.full((2, 4), np.inf))
    assert (certified_radius(model, np.ones((1, 2)), np.array([0])).radius == 0).all()


def test_names():
    assert set(method_names()) == {"interval", "fast_lin", "fast_lip", "crown", "crown_ibp", "alpha_crown", "dual"}
    with pytest.raises(ValueError, match="`steps`"):
        AlphaCrown(steps=0)
    with pytest.raises(ValueError, match="'linf' or 'l1'"):
        exact_margin(
            scattered(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])), np.zeros(2), 0.1, [1, 0], "l2"
        )


@pytest.mark.parametrize("kind", [IntervalBoundTraining, CrownIBPTraining])
def test_certified_training_certifies(kind):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(200, 4)).astype(np.float32)
    x[:, 0] = np.where(x[:, 0] > 0.5, x[:, 0] / 2 + 0.5, x[:, 0] / 2)  # A gap around one half.
    y = (x[:, 0] > 0.5).astype(int)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(12, "relu"), keras.layers.Dense(2)])
    wrapped = kind(model, 0.15, warmup=15, ramp=40)
    wrapped.compile(keras.optimizers.Adam(0.02))
    history = wrapped.fit(x, y, batch_size=50, epochs=20, verbose=0).history
    judged = wrapped.evaluate(x, y, batch_size=100, verbose=0, return_dict=True)
    assert judged["accuracy"] > 0.97 and judged["certified"] > 0.9
    assert set(history) == {"loss", "accuracy", "certified"}
    network = Network(model)
    problem = network.problem(x, np.full(200, 0.15), np.inf, (0.0, 1.0), "real")
    margins = as_method("interval").lower(network, problem, margin_rows(y, 2), {})
    assert abs((margins.min(1) > 0).mean() - judged["certified"]) < 0.01


def test_training_schedule_and_refusals():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    wrapped = IntervalBoundTraining(model, 0.1, warmup=10, ramp=20)
    for step, expected in ((0, 0), (10, 0), (20, 0.5), (30, 1), (99, 1)):
        wrapped.step.assign(step)
        assert float(wrapped.progress()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="batch normalization"):
        IntervalBoundTraining(keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]), 0.1)
    with pytest.raises(ValueError, match="whose range moves"):
        IntervalBoundTraining(keras.Sequential([keras.Input((4,)), FakeQuantize(), keras.layers.Dense(2)]), 0.1)


def test_certificate_of_an_int8_file(tmp_path):
    from tfkit.export import convert
    from tfkit.export.runner import Runner

    body = [keras.layers.Conv2D(3, 3, activation="relu"), keras.layers.MaxPooling2D(2), keras.layers.Flatten()]
    model = scattered(keras.Sequential([keras.Input((8, 8, 1)), *body, keras.layers.Dense(3)]))
    x = np.random.default_rng(0).uniform(size=(60, 8, 8, 1)).astype(np.float32)
    path = convert(model, tmp_path / "small.tflite", quantization="int8", calibration=x)
    graph, run = read_tflite(path), Runner(path)
    x = x[:3]
    output = np.asarray(run(x))
    low, high = bounds(graph, x, 0.0)
    assert (low <= output).all() and (output <= high).all()
    points = inside(x, 0.05, np.inf, (0, 1), 40).astype(np.float32)
    low, high = bounds(graph, x, 0.05, clip=(0, 1))
    values = np.asarray(run(points.reshape(-1, 8, 8, 1))).reshape(40, 3, 3)
    assert (low <= values).all() and (values <= high).all()
    found = certified_radius(graph, x, output.argmax(1), clip=(0, 1))
    plain = certified_radius(model, x, output.argmax(1), clip=(0, 1))
    assert found.arithmetic == "int8" and (found.radius > 0).any() and (found.radius <= plain.radius * 1.2 + 1e-3).all()
    (tmp_path / "cut.tflite").write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError):
        read_tflite(tmp_path / "cut.tflite")
    with pytest.raises(ValueError, match="scale|type"):
        read_tflite(convert(model, tmp_path / "float.tflite"))


def test_report(mlp, tmp_path):
    x = np.random.default_rng(1).uniform(size=(6, 5)).astype(np.float32)
    y = Network(mlp).forward(x).argmax(1)
    y[0] = (y[0] + 1) % 3

    def attack(model, x, y, *, epsilon):
        return x + epsilon * np.sign(np.random.default_rng(0).normal(size=x.shape))

    report = certify(mlp, x, y, method="interval", epsilons=[0.0, 1e-3, 10.0], attack=attack)
    assert report.radii[0] == 0 and report.accuracy == pytest.approx(5 / 6)
    assert report.certified_accuracy[0] == pytest.approx(5 / 6) and report.certified_accuracy[2] == 0
    assert all(a <= b for a, b in zip(report.certified_accuracy, report.attacked_accuracy, strict=True))
    saved = json.loads(report.save(tmp_path / "report.json").read_text())
    assert saved["clip"] is None and saved["mean_radius"] == report.mean_radius
    assert report.plot(tmp_path / "report.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(FileExistsError):
        report.save(tmp_path / "report.json")


def test_command(mlp, tmp_path):
    from typer.testing import CliRunner

    from tfkit import cli

    mlp.save(tmp_path / "m.keras")
    x = np.random.default_rng(1).uniform(size=(20, 5)).astype(np.float32)
    y = np.arange(20) % 3
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    command = ["certify", str(tmp_path / "m.keras"), "--data", str(tmp_path / "d.npz"), "--examples", "3", "--method"]
    done = CliRunner().invoke(
        cli.app, [*command, "interval", "--epsilon", "0.01", "--json", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["clip"] == [0.0, 1.0] and len(told["radii"]) == 3 and (tmp_path / "out" / "report.png").exists()
    low = CliRunner().invoke(cli.app, [*command, "interval", "--epsilon", "5", "--min-accuracy", "0.9"])
    assert low.exit_code == 1


def test_crown_repr():
    assert repr(Crown()) == "Crown(intersect=True)" and "steps=20" in repr(AlphaCrown())
