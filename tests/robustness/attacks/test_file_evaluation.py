"""What is asked instead of differentiated: exported files, and transfer from the model that they were made from."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from typer.testing import CliRunner

from tfkit import cli, export
from tfkit.robustness.attacks import PGD, Oracle, Square, Transfer, evaluate_file


@pytest.fixture(scope="module")
def plane():
    """Three classes in 8 dimensions, and the distance of each point to the nearest boundary in L-infinity."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 3)).astype(np.float32)
    x = rng.uniform(0.3, 0.7, (30, 8)).astype(np.float32)
    scores = x.astype(np.float64) @ w
    y = scores.argmax(1)
    gaps = scores[np.arange(30), y][:, None] - scores
    sizes = np.abs(w[:, y].T[:, :, None] - w[None]).sum(axis=1)
    return w, x, y, np.where(np.arange(3) == y[:, None], np.inf, gaps / np.maximum(sizes, 1e-9)).min(axis=1)


@pytest.fixture(scope="module")
def files(trained_digits_model, tmp_path_factory):
    """The digits' network, and its float32 `.tflite` file."""
    folder = tmp_path_factory.mktemp("attacked")
    trained_digits_model.save(folder / "float.keras")
    export.convert(trained_digits_model, folder / "float.tflite")
    return folder


def test_transfer_from_the_model_itself_finds_what_there_is(plane):
    w, x, y, radius = plane
    epsilon = 1.01 * float(np.median(radius))
    direct = PGD(20)(lambda p: tf.matmul(p, w), x, y, epsilon=epsilon)
    attack = Transfer(lambda p: tf.matmul(p, w), PGD(20))
    oracle = Oracle(lambda p: p @ w, "labels")
    found = attack(oracle, x, y, epsilon=epsilon)
    np.testing.assert_array_equal(found.success, direct.success)
    assert found.success.sum() > 10
    assert (found.queries == 1).all() and (found.distance <= epsilon).all()
    # From a model that knows nothing of this one hardly anything transfers.
    other = np.random.default_rng(5).normal(size=w.shape).astype(np.float32)
    strange = Transfer(lambda p: tf.matmul(p, other), PGD(20))(oracle, x, y, epsilon=epsilon)
    assert strange.success.sum() < found.success.sum()


def test_scores_and_a_surrogate_leave_no_more_than_the_closed_form_allows(plane):
    w, x, y, radius = plane
    epsilons = [float(np.quantile(radius, q)) * 1.001 for q in (0.3, 0.7)]
    surrogate = lambda p: tf.matmul(p, w)  # noqa: E731
    report = evaluate_file(lambda p: p @ w, x, y, epsilons, surrogate=surrogate, max_queries=300)
    assert set(report.by_attack) == {"Square", "transfer, momentum", "transfer, Auto-PGD", "noise"}
    true = [np.mean(radius > e) for e in epsilons]
    assert all(left >= share - 1e-9 for left, share in zip(report.remaining, true, strict=True))
    np.testing.assert_allclose(report.remaining, true, atol=2.01 / 30)
    assert report.reliable, report.failed


def test_too_few_queries_are_seen(plane):
    w, x, y, radius = plane
    report = evaluate_file(lambda p: p @ w, x, y, [1.3 * float(np.median(radius))], max_queries=2)
    assert "converged" in {finding.control for finding in report.failed}


def test_labels_alone(plane):
    w, x, y, radius = plane
    report = evaluate_file(lambda p: p @ w, x, y, [4 * float(np.max(radius))], output="labels", max_queries=150)
    assert "HopSkipJump" in report.by_attack and report.remaining[0] < 0.5


def test_bad_input(plane):
    w, x, y, _ = plane
    for changed, name in (
        ({"epsilons": []}, "epsilons"), ({"norm": "l1"}, "norm"), ({"output": "top-k"}, "output"),
        ({"attacks": {"other": Square(norm="l2")}}, "attacks"), ({"x": x + 9}, "x"), ({"y": y + 7}, "y"),
    ):  # fmt: skip
        arguments = {"x": x, "y": y, "epsilons": [0.1], **changed}
        with pytest.raises(ValueError, match=f"`{name}`"):
            evaluate_file(lambda p: p @ w, max_queries=2, **arguments)


def test_file_and_model_behave_alike_under_the_same_questions(files, tiny_digits):
    x, y = tiny_digits.x_test[:10], tiny_digits.y_test[:10]
    network = keras.saving.load_model(files / "float.keras")
    reports = [evaluate_file(model, x, y, [0.15], max_queries=60) for model in (files / "float.tflite", network)]
    assert abs(reports[0].remaining[0] - reports[1].remaining[0]) <= 0.1
    assert reports[0].clean_accuracy == reports[1].clean_accuracy


def test_command(files, tiny_digits, tmp_path):
    x, y = tiny_digits.x_test[:12], tiny_digits.y_test[:12]
    train = tiny_digits.x_train, tiny_digits.y_train
    np.savez(tmp_path / "d.npz", x_train=train[0], y_train=train[1], x_test=x, y_test=y)
    options = ["--data", str(tmp_path / "d.npz"), "--epsilon", "0.3", "--queries", "60", "--examples", "6"]
    command = ["attack", str(files / "float.tflite"), *options, "--json", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*command, "--surrogate", str(files / "float.keras")])
    assert done.stdout, (done.output, done.exception)
    told = json.loads(done.stdout)
    assert done.exit_code == (0 if told["reliable"] else 1), done.output
    assert told["by_attack"]["transfer, Auto-PGD"][0] <= told["clean_accuracy"] and told["examples"] == 6
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.json", "report.png"}
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code != 0 and "--force" in str(again.output) + str(again.exception)
    white = ["attack", str(files / "float.keras"), *options, "--steps", "5"]
    done = CliRunner().invoke(cli.app, [*white, "--json"])
    assert "Square" in json.loads(done.stdout)["by_attack"]
    for wrong in (["--sees", "labels"], ["--surrogate", str(files / "float.keras")]):
        refused = CliRunner().invoke(cli.app, [*white, *wrong])
        assert refused.exit_code != 0 and "tflite" in str(refused.output) + str(refused.exception)
