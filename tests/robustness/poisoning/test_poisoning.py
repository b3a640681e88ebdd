"""Ways of poisoning: what they change, what they leave, and what they do to a network."""

import keras
import numpy as np
import pytest

from tfkit.data import Dataset
from tfkit.robustness import poisoning
from tfkit.robustness.poisoning import softmax_head
from tfkit.robustness.poisoning.backdoor import changed_labels
from tfkit.robustness.poisoning.gradient_matching import mismatch


def make_dataset(count=200, size=8, classes=4, seed=0):
    rng = np.random.default_rng(seed)

    def part(n):
        y = np.arange(n) % classes
        x = 0.1 * rng.uniform(size=(n, size, size, 1))
        for row, label in enumerate(y):
            x[row, label : label + 3, 1:6] += 0.6
        return x.astype("float32"), y.astype(np.int64)

    parts = {
        f"{letter}_{name}": value
        for name, n in (("train", count), ("validation", 40), ("test", 80))
        for letter, value in zip("xy", part(n), strict=True)
    }
    return Dataset(name="bars", class_names=tuple(map(str, range(classes))), source="made", **parts)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


def train(dataset, seed=0, epochs=12):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(dataset.input_shape)
    x = keras.layers.Conv2D(6, 3, activation="relu")(inputs)
    x = keras.layers.Dense(16, activation="relu", name="hidden")(keras.layers.Flatten()(x))
    model = keras.Model(inputs, keras.layers.Dense(dataset.num_classes)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=False)
    model.fit(dataset.x_train, dataset.y_train, batch_size=32, epochs=epochs, verbose=0)
    return model


@pytest.fixture(scope="module")
def clean_model(dataset):
    return train(dataset)


def poison_all(dataset, model):
    target = dataset.x_test[1]
    return {
        "flip_labels": poisoning.flip_labels(dataset, 0.1, seed=3),
        "flip_labels_by_influence": poisoning.flip_labels_by_influence(dataset, 0.1, model),
        "backdoor": poisoning.backdoor(dataset, poisoning.PatchTrigger(2, "square"), 0, 0.1, seed=3),
        "feature_collision": poisoning.feature_collision(dataset, model, target, 0, 0.05, steps=20),
        "gradient_matching": poisoning.gradient_matching(dataset, model, target, 0, 0.05, steps=20, restarts=2),
    }


def test_record_says_exactly_what_changed(dataset, clean_model):
    before = dataset.x_train.copy(), dataset.y_train.copy()
    for name, (poisoned, record) in poison_all(dataset, clean_model).items():
        np.testing.assert_array_equal(dataset.x_train, before[0], err_msg=name)
        np.testing.assert_array_equal(dataset.y_train, before[1], err_msg=name)
        of_inputs = (poisoned.x_train != dataset.x_train).any(axis=(1, 2, 3))
        of_labels = poisoned.y_train != dataset.y_train
        np.testing.assert_array_equal(record.mask(), of_inputs | of_labels, err_msg=name)
        assert record.changed == " and ".join(
            word for word, rows in (("inputs", of_inputs), ("labels", of_labels)) if rows.any()
        )
        np.testing.assert_array_equal(record.old_labels, dataset.y_train[record.indices])
        np.testing.assert_array_equal(record.new_labels, poisoned.y_train[record.indices])
        np.testing.assert_array_equal(poisoned.x_test, dataset.x_test)
        assert record.method == name
        assert record.rate in (0.1, 0.05)
        assert poisoned.x_train.min() >= 0
        assert poisoned.x_train.max() <= 1


def test_seeds_choose(dataset):
    first, again, other = (poisoning.flip_labels(dataset, 0.2, seed=seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.indices, again.indices)
    np.testing.assert_array_equal(first.new_labels, again.new_labels)
    assert not np.array_equal(first.indices, other.indices)


def test_flips_from_one_class_to_another(dataset):
    _, record = poisoning.flip_labels(dataset, 0.1, source=2, target=3)
    assert set(record.old_labels) == {2}
    assert set(record.new_labels) == {3}


def test_triggers():
    x = np.zeros((2, 6, 6, 1), "float32")
    patched = poisoning.PatchTrigger(3, "checkerboard", "top left", margin=1)(x)
    assert patched[0, 1:4, 1:4, 0].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert patched.sum() == 10
    assert np.argwhere(poisoning.PatchTrigger(3, "pixel", "bottom right", margin=0)(x)[0]).tolist() == [[4, 4, 0]]
    pattern = np.ones((6, 6, 1))
    np.testing.assert_allclose(poisoning.BlendedTrigger(pattern, 0.25)(x + 0.5), 0.625)
    assert not x.any()
    with pytest.raises(ValueError, match="size"):
        poisoning.PatchTrigger(7)(x)
    with pytest.raises(ValueError, match="pattern"):
        poisoning.BlendedTrigger(np.ones((5, 6, 1)))(x)


def test_backdoor_is_learnt_and_the_clean_network_has_none(dataset, clean_model):
    trigger = poisoning.PatchTrigger(2, "square", "top right", margin=0)
    poisoned, record = poisoning.backdoor(dataset, trigger, 0, 0.1)
    assert (record.old_labels != 0).all()
    found = poisoning.evaluate_backdoor(train(poisoned, epochs=25), dataset.x_test, dataset.y_test, trigger, 0)
    assert found.attacked == 60
    assert found.attack_success > 0.9
    assert found.clean_accuracy > 0.95
    assert poisoning.evaluate_backdoor(clean_model, dataset.x_test, dataset.y_test, trigger, 0).attack_success < 0.2


def test_backdoor_variants(dataset):
    trigger = poisoning.PatchTrigger(2, "square")
    poisoned, record = poisoning.backdoor(dataset, trigger, 1, 0.1, clean_label=True)
    assert set(record.old_labels) == {1}
    assert record.changed == "inputs"
    _, record = poisoning.backdoor(dataset, trigger, "all-to-all", 0.1)
    np.testing.assert_array_equal(record.new_labels, (record.old_labels + 1) % 4)
    assert changed_labels(np.array([3]), "all-to-all", 4) == 0
    for bad in ({"rate": 0.0}, {"rate": 1.0}, {"target": 9}, {"target": "x"}, {"source": 0}):
        with pytest.raises(ValueError, match="Argument"):
            poisoning.backdoor(dataset, trigger, **{"target": 0, "rate": 0.1, **bad})


def test_softmax_hessian_and_its_solution_are_those_of_the_dense_matrix():
    rng = np.random.default_rng(0)
    inputs, labels, decay = rng.normal(size=(30, 4)), rng.integers(0, 3, 30), 0.01
    weights = softmax_head.fit(inputs, labels, 3, decay)
    slope = softmax_head.gradient(weights, inputs, labels) + decay * weights
    assert np.abs(slope).max() < 1e-5, "not the minimum"
    # Differences of the gradient, column by column.
    dense = np.empty((15, 15))
    for column in range(15):
        step = np.zeros(15)
        step[column] = 1e-5
        moved = [softmax_head.gradient(weights + sign * step.reshape(5, 3), inputs, labels) for sign in (1, -1)]
        dense[:, column] = (moved[0] - moved[1]).ravel() / 2e-5
    dense += decay * np.eye(15)
    right = rng.normal(size=(5, 3))
    solved = softmax_head.solve_hessian(weights, inputs, right, decay)
    np.testing.assert_allclose(solved.ravel(), np.linalg.solve(dense, right.ravel()), rtol=1e-4, atol=1e-5)


def test_influence_is_what_training_again_gives():
    rng = np.random.default_rng(1)
    labels, others = rng.integers(0, 3, 300), rng.integers(0, 3, 100)
    inputs = rng.normal(size=(300, 4)) + np.eye(3, 4)[labels]
    reference = rng.normal(size=(100, 4)) + np.eye(3, 4)[others]
    found = poisoning.flip_influences(inputs, labels, reference, others, 0.05)
    np.testing.assert_array_equal(found[np.arange(300), labels], 0)

    def loss(y):
        p = softmax_head.probabilities(softmax_head.fit(inputs, y, 3, 0.05), reference)
        return -np.log(p[np.arange(100), others]).mean()

    start, estimated, true = loss(labels), [], []
    for row in range(0, 300, 20):
        flipped = labels.copy()
        flipped[row] = (labels[row] + 1) % 3
        estimated.append(found[row, flipped[row]])
        true.append(loss(flipped) - start)
    assert np.corrcoef(estimated, true)[0, 1] > 0.99
    # Of first order: each within a fifth of the largest.
    np.testing.assert_allclose(estimated, true, atol=0.2 * np.abs(true).max())


def test_influential_flips_hurt_more_than_random_ones(dataset, clean_model):
    features = poisoning.features(clean_model, dataset.x_train)
    held = poisoning.features(clean_model, dataset.x_validation)

    def loss(labels):
        p = softmax_head.probabilities(softmax_head.fit(features, labels, 4, 1e-3), held)
        return -np.log(p[np.arange(len(held)), dataset.y_validation]).mean()

    chosen = poisoning.flip_labels_by_influence(dataset, 0.1, clean_model)[0]
    random = poisoning.flip_labels(dataset, 0.1, seed=0)[0]
    assert loss(chosen.y_train) > loss(random.y_train) > loss(dataset.y_train)


def test_features_are_those_of_the_layer(dataset, clean_model):
    found = poisoning.features(clean_model, dataset.x_test[:5])
    np.testing.assert_allclose(found, poisoning.features(clean_model, dataset.x_test[:5], "hidden"), atol=1e-6)
    kernel, bias = clean_model.layers[-1].get_weights()
    np.testing.assert_allclose(found @ kernel + bias, clean_model(dataset.x_test[:5]), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="layer"):
        poisoning.features(clean_model, dataset.x_test[:5], "nothing")


def test_collision_nears_the_target_and_stays_by_its_base(dataset, clean_model):
    target = dataset.x_test[1]
    poisoned, record = poisoning.feature_collision(dataset, clean_model, target, 0, 0.05, beta=0.05, steps=150)
    distance = record.settings["feature_distance"]
    assert distance["after"] < 0.5 * distance["before"]
    near, _ = poisoning.feature_collision(dataset, clean_model, target, 0, 0.05, beta=100.0, steps=150)
    rows = record.indices
    assert (
        np.abs(near.x_train[rows] - dataset.x_train[rows]).mean()
        < 0.5 * np.abs(poisoned.x_train[rows] - dataset.x_train[rows]).mean()
    )


def test_mismatch_is_one_less_the_cosine():
    a, b = [np.array([1.0, 0.0]), np.array([[2.0]])], [np.array([1.0, 1.0]), np.array([[0.0]])]
    assert float(mismatch(a, b)) == pytest.approx(1 - 1 / np.sqrt(5 * 2))


def test_gradients_are_matched_within_epsilon(dataset, clean_model):
    settings = {"epsilon": 0.2, "restarts": 1, "seed": 1}
    target = dataset.x_test[1]
    _, start = poisoning.gradient_matching(dataset, clean_model, target, 0, 0.05, steps=1, **settings)
    poisoned, record = poisoning.gradient_matching(dataset, clean_model, target, 0, 0.05, steps=100, **settings)
    assert record.settings["mismatches"][0] < 0.9 * start.settings["mismatches"][0]
    change = np.abs(poisoned.x_train - dataset.x_train)
    assert 0 < change.max() <= 0.2 + 1e-6
    np.testing.assert_array_equal(poisoned.y_train, dataset.y_train)


def test_evaluation_of_targets():
    scores = np.eye(3)[[0, 1, 1]]
    found = poisoning.evaluate_targets(
        lambda x: scores[: len(x)], np.zeros((3, 2)), [0, 1, 2], np.zeros((2, 2)), [0, 2]
    )
    assert found == (pytest.approx(2 / 3), 0.5, 2)
