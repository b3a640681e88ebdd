"""The oracle: counts, budgets, and the same answers from every kind of model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit import export
from tfkit.robustness.attacks import PGD, BudgetExhaustedError, HopSkipJump, Oracle, Square
from tfkit.robustness.attacks.oracle import log_probabilities

WEIGHTS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
X = np.random.default_rng(1).uniform(size=(5, 6)).astype(np.float32)


def scores(points):
    return points @ WEIGHTS


def test_every_row_is_a_query_of_its_example():
    oracle = Oracle(scores, "labels", budget=3, total=7)
    oracle.start(5)
    np.testing.assert_array_equal(oracle(X), scores(X).argmax(1))
    oracle(X[:2], [4, 4])
    np.testing.assert_array_equal(oracle.counts, [1, 1, 1, 1, 3])
    with pytest.raises(BudgetExhaustedError, match="Example 4 has 0 of its 3 queries left, and 1 were asked"):
        oracle(X[:1], [4])
    with pytest.raises(BudgetExhaustedError, match="0 of 7 queries are left"):
        oracle(X[:1], [0])
    # A refused question costs nothing, and neither does the evaluator's.
    oracle.inspect(X)
    assert oracle.queries == 7 == oracle.counts.sum()
    oracle.start(2)
    assert oracle.queries == 7 and not oracle.counts.any()


def test_scores_are_log_probabilities_of_logits_and_of_probabilities():
    expected = scores(X) - np.log(np.exp(scores(X).astype(np.float64)).sum(1, keepdims=True))
    probabilities = lambda points: tf.nn.softmax(scores(points))  # noqa: E731
    eight_bits = lambda points: np.rint(probabilities(points).numpy() * 256) / 256  # noqa: E731
    np.testing.assert_allclose(Oracle(scores)(X), expected, atol=1e-5)
    np.testing.assert_allclose(Oracle(probabilities)(X), expected, atol=1e-5)
    likely = np.exp(expected) > 0.1
    np.testing.assert_allclose(Oracle(eight_bits)(X)[likely], expected[likely], atol=0.02)
    np.testing.assert_allclose(log_probabilities(np.array([[1e3, 0.0]]), False), [[0, -1e3]])


def test_top_classes_are_in_order():
    answer = Oracle(scores, "top-k", k=2)(X)
    order = np.argsort(-scores(X), axis=1)[:, :2]
    np.testing.assert_array_equal(answer.labels, order)
    np.testing.assert_allclose(answer.scores, np.take_along_axis(Oracle(scores)(X), order, 1))


def test_a_keras_model_and_its_file_answer_alike(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, activation="softmax")])
    path = export.convert(model, tmp_path / "model.tflite")
    expected = np.log(model.predict(X, verbose=0))
    for kind in (model, path, str(path), export.Runner(path)):
        np.testing.assert_allclose(Oracle(kind)(X), expected, atol=1e-5)
    result = HopSkipJump(max_queries=200)(path, X, expected.argmax(1), epsilon=None)
    assert (result.success == (model.predict(result.x_adv, verbose=0).argmax(1) != expected.argmax(1))).all()


def test_a_model_may_return_labels_only():
    labels = lambda points: scores(points).argmax(1)  # noqa: E731
    np.testing.assert_array_equal(Oracle(labels, "labels", classes=4)(X), labels(X))
    with pytest.raises(ValueError, match="`classes`"):
        Oracle(labels, "labels")(X)
    with pytest.raises(ValueError, match="`model`"):
        Oracle(labels)(X)


def test_no_gradient_passes():
    oracle = Oracle(lambda points: tf.matmul(points, WEIGHTS))
    assert isinstance(oracle(X), np.ndarray)
    with pytest.raises(Exception, match="epsilon|symbolic|NumPy|numpy|convert|differentiable"):
        PGD(2)(oracle, X, scores(X).argmax(1), epsilon=0.1)


def test_attacks_share_the_total():
    oracle = Oracle(scores, "labels", total=103)
    result = HopSkipJump()(oracle, X, scores(X).argmax(1), epsilon=None)
    assert result.queries.max() <= 20 and oracle.queries == result.queries.sum() == oracle.counts.sum()


def test_bad_input():
    for make in (
        lambda: Oracle(scores, "gradients"),
        lambda: Oracle(scores, budget=0),
        lambda: Oracle(3),
        lambda: Oracle("model.h5"),
        lambda: Oracle(Oracle(scores)),
        lambda: Oracle(scores)(X, [0.5] * 5),
        lambda: Oracle(scores)(X[:0]),
        lambda: Oracle(lambda points: points[:, 0])(X),
        lambda: Oracle(lambda points: scores(points) * np.nan)(X),
        lambda: Square()(Oracle(scores, "labels"), X, np.zeros(5, int), epsilon=0.1),
    ):
        with pytest.raises(ValueError, match="Argument"):
            make()
