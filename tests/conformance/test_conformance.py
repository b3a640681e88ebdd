"""The promises every public class gives, checked over the catalog."""

import importlib
import inspect
import json

import keras
import numpy as np
import pytest

from tests.conformance.catalog import ATTACKS, COMPRESSORS, LAYERS, MODULES, OTHERS, RECOMMENDERS, example, linear
from tfkit.compression import NoEffectWarning
from tfkit.export import convert, verify


def public_classes():
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in module.__all__:
            if inspect.isclass(getattr(module, attribute)):
                yield f"{name}.{attribute}"


def test_every_public_class_has_a_row():
    listed = {*ATTACKS, *COMPRESSORS, *LAYERS, *OTHERS, *RECOMMENDERS}
    missing = sorted(set(public_classes()) - listed)
    assert not missing, f"Add a row to tests/conformance/catalog.py for {missing}"
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"{name} is in the catalog, and does not exist"


def test_every_public_name_is_documented():
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in module.__all__:
            assert inspect.getdoc(getattr(module, attribute)), f"{name}.{attribute} has no docstring"


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(6, 3, activation="relu")(inputs)
    x = keras.layers.Flatten()(keras.layers.MaxPooling2D(2)(x))
    return keras.Model(inputs, keras.layers.Dense(4)(x))


def fit(model, callbacks):
    keras.utils.set_random_seed(1)
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    labels = np.random.default_rng(0).integers(0, 4, 24)
    model.fit(example((24, 8, 8, 1)), labels, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressor(name, classifier, tmp_path):
    make, quantization = COMPRESSORS[name]
    before = [weight.copy() for weight in classifier.get_weights()]
    final = make().apply(classifier, fit)

    for old, new in zip(before, classifier.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new, err_msg="the model that was given has changed")
    for old, new in zip(final.get_weights(), make().apply(classifier, fit).get_weights(), strict=True):
        np.testing.assert_array_equal(old, new, err_msg="the same seeds give another result")

    x = example((20, 8, 8, 1))
    final.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), final(x))

    path = convert(final, tmp_path / "model.tflite", quantization=quantization)
    verify(final, path, x).raise_if_different()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressor_configuration_makes_a_round_trip(name):
    compressor = COMPRESSORS[name].make()
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(compressor)))
    again = keras.saving.deserialize_keras_object(config)
    assert repr(again) == repr(compressor)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressor_says_when_it_changes_nothing(name):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.ReLU()(inputs) if "Quant" not in name else inputs * 1.5)
    with pytest.warns(NoEffectWarning):
        COMPRESSORS[name].make().prepare(model)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_round_trip(name, tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, LAYERS[name].make()(inputs))
    model.save(tmp_path / "model.keras")
    x = example((5, 4))
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    attack = ATTACKS[name].make()
    x = np.random.default_rng(2).uniform(0.4, 0.6, (6, 24)).astype("float32")
    x = x.reshape(6, 4, 6) if name.endswith("VideoPGD") else x
    y = np.asarray(linear(x)).argmax(axis=1)
    given = x.copy()
    epsilon = 4.0 if attack.norm == "l0" else 0.3
    one, two = (attack(linear, x, y, epsilon=epsilon) for _ in range(2))
    np.testing.assert_array_equal(x, given, err_msg="the examples that were given have changed")
    np.testing.assert_array_equal(one.x_adv, two.x_adv, err_msg="the same seeds give another result")
    assert one.success.any() and (one.distance <= epsilon).all()
    assert one.x_adv.min() >= 0 and one.x_adv.max() <= 1 and one.x_adv.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(linear(one.x_adv)).argmax(axis=1) != y, one.success)
    assert (one.queries >= 1).all()


@pytest.mark.parametrize("name", RECOMMENDERS)
def test_recommender_configuration_makes_a_round_trip(name):
    model = RECOMMENDERS[name].make()
    config = json.loads(json.dumps(model.get_config()))
    assert type(model)(**config).get_config() == model.get_config()
    assert list(config) == list(inspect.signature(type(model)).parameters)


@pytest.mark.parametrize("name", RECOMMENDERS)
def test_recommender_before_it_is_fitted(name):
    with pytest.raises(ValueError, match="fit"):
        RECOMMENDERS[name].make().recommend([0])
