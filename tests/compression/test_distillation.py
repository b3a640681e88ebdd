import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression import (
    DistillationLoss,
    Distiller,
    LowRank,
    MagnitudePruning,
    QuantizationAware,
    distill,
)
from tfkit.compression.distillation import FeatureHint
from tfkit.internal import surgery

L = keras.layers
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy


def rng(seed=0):
    return np.random.default_rng(seed)


def network(units=3, softmax=False, seed=0, size=6, dropout=0.2):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((size, size, 1))
    x = L.Conv2D(units, 3, activation="relu", name="conv", kernel_regularizer=keras.regularizers.L2(1e-2))(inputs)
    x = L.Flatten()(L.Dropout(dropout, seed=1)(x))
    return keras.Model(inputs, L.Dense(4, activation="softmax" if softmax else None, name="out")(x))


X = rng().normal(size=(22, 6, 6, 1)).astype("float32")
Y = np.arange(22) % 4


def compiled(model, softmax=False, learning_rate=1e-2, **options):
    """Compiles; without a graph by default, which takes longer to trace than these few steps to run."""
    options.setdefault("run_eagerly", True)
    model.compile(keras.optimizers.SGD(learning_rate), CROSSENTROPY(from_logits=not softmax), **options)
    return model


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# The loss.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_temperature_times_the_difference_of_probabilities(temperature):
    import tensorflow as tf

    teacher, student = rng(0).normal(size=(5, 7)) * 3, tf.Variable(rng(1).normal(size=(5, 7)), dtype="float32")
    with tf.GradientTape() as tape:
        loss = DistillationLoss(temperature)(teacher, student)
    s, t = softmax(student.numpy() / temperature), softmax(teacher / temperature)
    assert float(loss) == pytest.approx(temperature**2 * np.mean(np.sum(t * np.log(t / s), -1)), rel=1e-4)
    np.testing.assert_allclose(tape.gradient(loss, student), temperature * (s - t) / 5, atol=1e-6)


def test_a_single_logit_is_one_of_two():
    teacher, student = rng(0).normal(size=(5, 1)), rng(1).normal(size=(5, 1))
    two = [np.concatenate([np.zeros((5, 1)), z], -1).astype("float32") for z in (teacher, student)]
    assert float(DistillationLoss(3.0)(teacher, student)) == pytest.approx(float(DistillationLoss(3.0)(*two)), rel=1e-5)


def test_loss_is_zero_at_the_teacher_and_makes_a_round_trip():
    logits = rng().normal(size=(3, 4)).astype("float32")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(DistillationLoss(2.5)))
    assert again.temperature == 2.5
    assert float(again(logits, logits + 7.0)) == pytest.approx(0, abs=1e-5)


# The step.


def test_without_the_teacher_it_is_plain_training_bit_for_bit():
    trained, histories = [], []
    for distilled in (False, True):
        model = network(softmax=True)
        outer = Distiller(model, network(5, seed=3), alpha=0.0) if distilled else model
        keras.utils.set_random_seed(4)
        compiled(outer, softmax=True, metrics=["accuracy"], steps_per_execution=2, run_eagerly=False)
        history = outer.fit(
            X, Y, batch_size=8, epochs=2, verbose=0, validation_data=(X, Y), class_weight={0: 1, 1: 2, 2: 0.5, 3: 1}
        )
        trained.append(model.get_weights())
        histories.append(history.history)
    for plain, distilled in zip(*trained, strict=True):
        np.testing.assert_array_equal(plain, distilled)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_follows_the_formula(weighted):
    """One SGD step on the last layer's bias, against NumPy: d loss / d b is the sum of d loss / d logits."""
    student, teacher = network(dropout=0.0), network(5, seed=3, softmax=True)
    temperature, alpha, rate = 3.0, 0.7, 0.1
    z, taught = np.asarray(student(X)), np.log(np.asarray(teacher(X)))
    before = np.asarray(student.get_layer("out").bias)
    weight = rng(5).uniform(0.1, 2, 22).astype("float32") if weighted else None
    distiller = compiled(Distiller(student, teacher, temperature=temperature, alpha=alpha), learning_rate=rate)
    distiller.fit(X, Y, sample_weight=weight, batch_size=22, verbose=0)
    hard = softmax(z) - np.eye(4)[Y]
    soft = temperature * (softmax(z / temperature) - softmax(taught / temperature))
    per_example = ((1 - alpha) * hard + alpha * soft) * (1.0 if weight is None else weight[:, None])
    np.testing.assert_allclose(
        np.asarray(student.get_layer("out").bias), before - rate * per_example.mean(0), atol=1e-6
    )


def test_the_teacher_is_not_touched_and_runs_as_at_inference():
    teacher = network(5, seed=3, dropout=0.9)
    before, trainable = [np.copy(w) for w in teacher.get_weights()], len(teacher.trainable_weights)
    distiller = Distiller(network(), teacher, feature_pairs=[("conv", "conv")])
    compiled(distiller).fit(X, Y, verbose=0)
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert teacher.trainable and len(teacher.trainable_weights) == trainable and distiller.teacher is teacher
    assert not {id(w) for w in distiller.weights} & {id(w) for w in teacher.weights}


def test_validation_is_the_students_own_loss():
    student = network()
    distiller = Distiller(student, network(5, seed=3), alpha=0.9, feature_pairs=[("conv", "conv")])
    history = compiled(distiller, metrics=["accuracy"]).fit(X, Y, verbose=0, validation_data=(X, Y)).history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    alone = compiled(student, metrics=["accuracy"]).evaluate(X, Y, verbose=0)
    assert [history["val_loss"][0], history["val_accuracy"][0]] == pytest.approx(alone, rel=1e-5)
    np.testing.assert_array_equal(distiller.predict(X, verbose=0), student.predict(X, verbose=0))


def test_without_labels_the_student_becomes_the_teacher():
    student, teacher = network(5, dropout=0.0), network(5, seed=3, dropout=0.0)
    distiller = Distiller(student, teacher, alpha=1.0, temperature=2.0)
    distiller.compile(keras.optimizers.Adam(2e-2))
    losses = distiller.fit(X, batch_size=22, epochs=40, verbose=0).history["loss"]
    assert losses[-1] < 0.2 * losses[0]
    assert np.mean(np.argmax(student(X), -1) == np.argmax(teacher(X), -1)) > 0.9


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv = L.Conv2D(2, 3, activation="relu", name="conv")
        self.head = L.Dense(4, activation="softmax")

    def call(self, x):
        x = self.conv(x)
        self.add_loss(0.01 * keras.ops.mean(x))
        return self.head(keras.ops.reshape(x, (-1, 32)))


def test_a_subclassed_student_with_probabilities_and_its_own_losses():
    student = Subclassed()
    distiller = Distiller(student, network(5, seed=3), alpha=0.5, feature_pairs=[("conv", "conv")])
    compiled(distiller, softmax=True, run_eagerly=False)
    history = distiller.fit(X, Y, batch_size=11, epochs=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert student.built and "call" not in vars(student.conv)


# Features.


@pytest.mark.parametrize(("size", "channels"), [(4, 3), (4, 5), (7, 5)])
def test_hint_is_the_mean_squared_distance_after_projection_and_resizing(size, channels):
    ours = rng(0).normal(size=(2, 4, 4, 3)).astype("float32")
    theirs = rng(1).normal(size=(2, size, size, channels)).astype("float32")
    hint = FeatureHint()
    distance = hint(ours, theirs)
    if hint.projection is not None:
        ours = ours @ np.asarray(hint.projection.kernel) + np.asarray(hint.projection.bias)
    if size != 4:
        theirs = np.asarray(keras.ops.image.resize(theirs, (4, 4), antialias=True))
    np.testing.assert_allclose(distance, np.mean((ours - theirs) ** 2, axis=(1, 2, 3)), rtol=1e-5)
    assert len(hint.trainable_weights) == (2 if channels != 3 else 0)


def test_features_are_learned_and_the_hint_is_not_part_of_the_student():
    student, teacher = network(3), network(5, seed=3)
    distiller = Distiller(student, teacher, alpha=0.0, feature_pairs=[("conv", "conv")], feature_weight=10.0)
    compiled(distiller, learning_rate=0.02, run_eagerly=False)
    losses = distiller.fit(X, Y, batch_size=22, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert len(distiller.trainable_weights) == len(student.trainable_weights) + 2


def test_features_of_nested_layers_are_found():
    inner = keras.Sequential([keras.Input((8,)), L.Dense(6, name="deep")], name="tower")
    student = keras.Sequential([keras.Input((8,)), inner, L.Dense(3)])
    teacher = keras.Sequential([keras.Input((8,)), L.Dense(7, name="wide"), L.Dense(3)])
    distiller = Distiller(student, teacher, feature_pairs=[("deep", "wide")])
    compiled(distiller).fit(rng().normal(size=(6, 8)), np.arange(6) % 3, verbose=0)
    assert tuple(distiller.hints[0].projection.kernel.shape) == (6, 7)


def test_masked_positions_do_not_count():
    def tagger(units, seed):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((None,), dtype="int32")
        x = L.Dense(units, name="features")(L.Embedding(9, 4, mask_zero=True)(inputs))
        return keras.Model(inputs, L.Dense(3)(x))

    short, longer = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 2, 3, 0, 0], [4, 5, 6, 0, 0]])
    results = []
    for tokens in (short, longer):
        student = tagger(4, 0)
        distiller = Distiller(student, tagger(6, 1), alpha=0.5, feature_pairs=[("features", "features")])
        keras.utils.set_random_seed(7)
        labels = np.ones(tokens.shape, int)
        compiled(distiller).fit(tokens, labels, verbose=0)
        results.append(student.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_several_outputs_and_dictionaries():
    model, x = zoo.nested()
    teacher, _ = zoo.nested()
    distiller = Distiller(model, teacher, alpha=0.5)
    distiller.compile("sgd", {"score": "mse"})
    assert np.isfinite(distiller.fit(x, {"score": np.zeros((6, 1))}, verbose=0).history["loss"][0])


# With compressors.


def fit(model, callbacks):
    keras.utils.set_random_seed(2)
    compiled(model).fit(X, Y, batch_size=11, epochs=2, verbose=0, callbacks=callbacks)


def test_pruning_with_a_teacher():
    teacher = network(5)
    final = MagnitudePruning(0.75, frequency=1).apply(teacher, distill(teacher, fit, alpha=0.9))
    kernels = [w for layer in surgery.leaf_layers(final) for w in surgery.compressible_weights(layer).values()]
    for kernel in kernels:
        assert np.mean(np.asarray(kernel) == 0) == pytest.approx(0.75, abs=0.02)
    started = MagnitudePruning(0.75, schedule="constant").apply(teacher)
    assert zoo.largest_difference(final(X), started(X)) > 1e-3


@pytest.mark.parametrize("compressor", [LowRank(budget=0.6), QuantizationAware()], ids=["low_rank", "quantization"])
def test_other_compressors_with_a_teacher(compressor):
    teacher = network(5, softmax=True)

    def train(model, callbacks):
        compiled(model, softmax=True, run_eagerly=False).fit(X, Y, batch_size=8, verbose=0, callbacks=callbacks)

    final = compressor.apply(teacher, distill(teacher, train, alpha=1.0))
    assert np.isfinite(np.asarray(final(X))).all()


def test_weights_are_saved_and_the_student_is_a_plain_model(tmp_path):
    student = network()
    distiller = Distiller(student, network(5, seed=3), feature_pairs=[("conv", "conv")])
    saver = keras.callbacks.ModelCheckpoint(tmp_path / "a.weights.h5", save_weights_only=True)
    compiled(distiller).fit(X, Y, verbose=0, callbacks=[saver])
    distiller.student.save(tmp_path / "student.keras")
    again = keras.saving.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(again(X), student(X))
    trained = student.get_weights()
    student.set_weights([np.zeros_like(w) for w in trained])
    distiller.load_weights(tmp_path / "a.weights.h5")
    for a, b in zip(trained, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(NotImplementedError, match="distiller.student"):
        distiller.save(tmp_path / "distiller.keras")


# What goes wrong.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.1}, r"\[0, 1\]"),
        ({"temperature": 0.0}, "more than 0"),
        ({"feature_weight": -1}, "`feature_weight`"),
        ({"feature_pairs": [("conv", "nothing")]}, "layer of the teacher there. Received: 'nothing'"),
        ({"student_outputs": "scores"}, "one of"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distiller(network(), network(5), **settings)


def test_models_that_do_not_fit_are_refused():
    model = network()
    with pytest.raises(ValueError, match="another model"):
        Distiller(model, model)
    with pytest.raises(TypeError, match="Keras 3 model"):
        Distiller(model, lambda x: x)
    other = keras.Sequential([keras.Input((6, 6, 1)), L.Flatten(name="flat"), L.Dense(7)])
    with pytest.raises(ValueError, match="shapes of the student's"):
        compiled(Distiller(model, other)).fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="as many axes"):
        compiled(Distiller(network(), other, feature_pairs=[("conv", "flat")])).fit(X, Y, verbose=0)
