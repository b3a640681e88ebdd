"""Networks over pairs and over features: closed forms, cold items, files, bad input."""

import numpy as np
import pytest
import scipy.sparse as sp

from tfkit.recommenders import (
    DLRM,
    DeepCross,
    Features,
    Interactions,
    NeuMF,
    Popularity,
    Recommender,
    TwoTower,
    cold_start_split,
    evaluate,
    export_bundle,
    search_bundle,
)
from tfkit.recommenders.features import FieldEmbedding, bag
from tfkit.recommenders.pointwise import context, draw_unseen

FEW = {"epochs": 1, "batch_size": 64}
MODELS = {
    "neumf": lambda: NeuMF(4, (8, 4), **FEW),
    "gmf": lambda: NeuMF(4, (), "gmf", **FEW),
    "mlp": lambda: NeuMF(4, (8,), "mlp", penalty=0.01, **FEW),
    "dot": lambda: NeuMF(4, similarity="dot", **FEW),
    "dcn": lambda: DeepCross(4, hidden=(8,), with_time=True, **FEW),
    "dcn stacked": lambda: DeepCross(4, hidden=(8,), structure="stacked", rank=2, **FEW),
    "dlrm": lambda: DLRM(4, (8,), (8,), with_time=True, **FEW),
    "two-tower": lambda: TwoTower(4, (8,), number_dropout=0.3, **FEW),
}


@pytest.fixture(scope="module")
def log():
    """60 users in three groups, each of whom likes items of his group's genre; hours tell the groups too."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 10)
    items = np.concatenate([generator.permutation(20)[:10] * 3 + user % 3 for user in range(60)])
    times = generator.integers(0, 1000, len(users)) * 86_400 + 3600 * (users % 3)
    return Interactions.from_arrays(users, items, times=times, item_labels=np.arange(60))


@pytest.fixture(scope="module")
def genres(log):
    names = [["comedy"], ["drama", "war"], ["horror"]]
    return Features({"genres": bag([names[item % 3] for item in range(60)])}, (np.arange(60)[:, None] % 3 - 1) * 1.0)


@pytest.fixture(scope="module")
def fitted(log, genres):
    """Each model of `MODELS` by name, fitted once."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = MODELS[name]()
            made[name].fit(*([log] if isinstance(made[name], NeuMF) else [log, genres]))
        return made[name]

    return model


@pytest.mark.parametrize("name", MODELS)
def test_recommend_save_and_load(name, log, fitted, tmp_path):
    model = fitted(name)
    found = model.recommend([3, 4], 55)
    for row, user in zip(found.ids, (3, 4), strict=True):
        shown = row[row >= 0]
        assert len(shown) == 50 and not np.isin(shown, log.items_of(user)).any()
    again = Recommender.load(model.save(tmp_path / "model.npz"))
    assert again.get_config() == model.get_config()
    np.testing.assert_allclose(again.scores([3, 4]), model.scores([3, 4]), rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_the_network_on_pairs(fitted):
    model = fitted("dlrm")
    hour, weekday = context(model._moments[[7]])
    given = [np.repeat(x, 60).astype(np.int32) for x in ([7], hour, weekday)] + [np.arange(60, dtype=np.int32)]
    np.testing.assert_allclose(
        model.scores([7])[0], model.network.predict(given, verbose=0)[:, 0], rtol=1e-4, atol=1e-6
    )


def test_dot_is_the_product_of_its_vectors_and_biases(fitted):
    model = fitted("dot")
    p, q = model._user_side(np.arange(60)), model._item_side()
    expected = p[:, :-1] @ q[:, :-1].T + p[:, -1:] + q[:, -1]
    np.testing.assert_allclose(model.scores(np.arange(60)), expected, rtol=1e-5, atol=1e-6)
    pairs = [np.array([5], np.int32)] * 3 + [np.array([9], np.int32)]
    np.testing.assert_allclose(model.network.predict(pairs, verbose=0)[0, 0], expected[5, 9], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dot", "two-tower"])
def test_bundle_answers_as_the_model(name, fitted, tmp_path):
    model = fitted(name)
    export_bundle(model, tmp_path / "bundle")
    found = search_bundle(tmp_path / "bundle", 3, 5)
    np.testing.assert_allclose(
        found.scores, model.recommend([3], 5, exclude_seen=False).scores[0], rtol=1e-3, atol=1e-5
    )


def test_gmf_with_equal_weights_is_the_dot_product(fitted):
    model = fitted("gmf")
    kept = model.top.get_weights()
    model.top.set_weights([np.ones((4, 1), np.float32), np.zeros(1, np.float32)])
    expected = model._item_side() @ model._user_side(np.array([3]))[0]
    np.testing.assert_allclose(model.scores([3])[0], expected, rtol=1e-4, atol=1e-6)
    model.top.set_weights(kept)


def test_cross_layers_are_those_of_the_paper(fitted):
    """Two crosses x ← x₀ ∘ (W x + b) + x beside a layer of the deep network, by NumPy."""
    model = fitted("dcn")
    (w1, b1), (w2, b2), (wd, bd), (wo, bo) = (
        [np.asarray(w, float) for w in layer.get_weights()] for layer in model.top.layers if layer.weights
    )
    x = np.concatenate([model._user_side(np.array([2]))[0], model._item_side()[5]]).astype(float)
    crossed = x * (x @ w1 + b1) + x
    crossed = x * (crossed @ w2 + b2) + crossed
    expected = np.concatenate([crossed, np.maximum(x @ wd + bd, 0)]) @ wo[:, 0] + bo[0]
    np.testing.assert_allclose(model.scores([2])[0, 5], expected, rtol=1e-4, atol=1e-6)


def test_features_find_cold_items_where_numbers_alone_cannot(log, genres):
    training, held = cold_start_split(log, 0.2, seed=1)
    cold = np.flatnonzero(training.item_counts == 0)
    own = {}
    for name, features in (("numbers", None), ("features", genres)):
        model = TwoTower(8, number_dropout=0.5, epochs=15, batch_size=64, learning_rate=0.02).fit(training, features)
        found = model.recommend(np.arange(60), 1, candidates=cold)
        assert np.isin(found.ids, cold).all()
        own[name] = (found.ids[:, 0] % 3 == np.arange(60) % 3).mean()
    assert own["features"] > 0.95 and own["numbers"] < 0.7
    # Evaluation ranks the same candidates: whoever took the one on top has a hit.
    judged = evaluate(model, training, held, 1, candidates=cold)
    hits = [found.ids[user, 0] in held.items_of(user) for user in judged.users]
    assert judged.metrics["hit_rate@1"] == np.mean(hits)


def test_the_time_of_an_event_moves_the_scores(fitted):
    model, plain = fitted("dcn"), fitted("dcn stacked")
    assert np.abs(model.at(0.0).scores([0]) - model.at(7200.0).scores([0])).max() > 1e-5
    np.testing.assert_array_equal(plain.at(0.0).scores([0]), plain.at(7200.0).scores([0]))
    with pytest.raises(ValueError, match="times"):
        model.at(np.nan)


def test_unseen_draws_are_unseen_and_uniform():
    seen = sp.csr_matrix(np.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32))
    drawn = draw_unseen(np.array([0, 1]), seen.indptr, seen.indices, 6000, 5, np.array([3], np.uint64))
    assert (drawn[1] == -1).all()
    counts = np.bincount(drawn[0], minlength=5)
    assert counts[0] == counts[2] == 0 and (np.abs(counts[[1, 3, 4]] - 2000) < 5 * np.sqrt(2000)).all()


def test_features_of_a_frame():
    import pandas as pd

    frame = pd.DataFrame(
        {
            "film": [7, 3, 5],
            "genres": ["War|Drama", "War", None],
            "title": ["A B", "b c", "d"],
            "year": [1990, 2000, np.nan],
        }
    )
    made = Features.from_frame(
        frame, key="film", labels=[3, 5, 7], categories=["genres"], words=["title"], numbers=["year"]
    )
    half = np.float32(0.5**0.5)
    np.testing.assert_allclose(made.fields["genres"].toarray(), [[0, 1], [0, 0], [half, half]])
    assert made.fields["title"].toarray().tolist() == [[1], [0], [1]]
    assert made.numbers[:, 0].tolist() == [1, 0, -1]
    again = Features.from_arrays(made.arrays())
    np.testing.assert_array_equal(again.fields["genres"].toarray(), made.fields["genres"].toarray())
    broken = made.arrays() | {"genres.indices": np.array([0, 9, 1])}
    with pytest.raises(ValueError, match="genres"):
        Features.from_arrays(broken)


def test_field_embedding_is_a_sparse_product():
    matrix = sp.random(7, 5, 0.5, format="csr", random_state=0, dtype=np.float32)
    layer = FieldEmbedding(matrix, 3)
    found = np.asarray(layer(np.arange(7, dtype=np.int32)))
    np.testing.assert_allclose(found, matrix @ np.asarray(layer.table), rtol=1e-5, atol=1e-7)


def test_context_is_that_of_the_calendar():
    import datetime

    moment = datetime.datetime(2024, 2, 29, 17, 5, tzinfo=datetime.UTC)
    hour, weekday = context(np.array([moment.timestamp()]))
    assert (hour[0], weekday[0]) == (moment.hour, moment.weekday())


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda log, f: TwoTower(4, **FEW).fit(log, Features({"a": bag([["x"]])})), "item_features"),
        (lambda log, f: Features({"a": bag([["x"]]), "b": bag([["x"], ["y"]])}), "rows"),
        (lambda log, f: Features({"a b": bag([["x"]])}), "identifiers"),
        (lambda log, f: Features(numbers=np.array([[np.nan]])), "numbers"),
        (lambda log, f: NeuMF(similarity="cosine"), "similarity"),
        (lambda log, f: NeuMF(hidden=()), "hidden"),
        (lambda log, f: DLRM(bottom=()), "bottom"),
        (lambda log, f: Popularity().fit(log).recommend([0], candidates=[99]), "candidates"),
        (lambda log, f: DeepCross(4, with_time=True, **FEW).fit(Interactions.from_arrays([0, 1], [0, 1])), "times"),
    ],
)
def test_bad_input(call, word, log, genres):
    with pytest.raises(ValueError, match=word):
        call(log, genres)
