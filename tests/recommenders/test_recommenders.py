"""Linear and factor models against closed forms and independent references; files; bad input."""

import json

import numpy as np
import pytest

from tfkit.recommenders import (
    BPR,
    EASE,
    IALS,
    WARP,
    BERT4Rec,
    BiasedMF,
    GRU4Rec,
    Interactions,
    ItemKNN,
    Popularity,
    RatingALS,
    Recommender,
    RecommenderFileError,
    SASRec,
    SVDPlusPlus,
    TwoTower,
    cold_start_split,
    evaluate,
    export_bundle,
    k_fold,
    leave_one_out,
    random_split,
    rating_metrics,
    search_bundle,
    temporal_split,
)
from tfkit.recommenders.evaluation import ranking_metrics
from tfkit.recommenders.least_squares import solve_rows
from tfkit.recommenders.sequence_losses import position_loss
from tfkit.recommenders.sequential import pad

SMALL = {"dimension": 8, "length": 6, "blocks": 1, "epochs": 1, "dropout": 0.0}
MODELS = {
    "popularity": Popularity,
    "knn": lambda: ItemKNN(5),
    "ease": lambda: EASE(5.0),
    "ials": lambda: IALS(4, epochs=2),
    "bpr": lambda: BPR(4, epochs=2, negatives="dynamic"),
    "warp": lambda: WARP(4, epochs=2),
    "mf": lambda: BiasedMF(3, epochs=2),
    "als": lambda: RatingALS(3, epochs=2),
    "svdpp": lambda: SVDPlusPlus(3, epochs=2),
    "two-tower": lambda: TwoTower(4, (8,), mixed_negatives=4, hard_negatives=3, epochs=1, batch_size=64),
    "sasrec": lambda: SASRec(**SMALL),
    "gru4rec": lambda: GRU4Rec(**SMALL, loss="sampled_softmax", negatives=4),
    "lstm": lambda: GRU4Rec(**SMALL, loss="bpr_max", negatives=4, cell="lstm"),
    "bert4rec": lambda: BERT4Rec(**SMALL, loss="softmax"),
}


@pytest.fixture(scope="module")
def log():
    """40 users in two groups that like different halves of 24 items."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 8)
    items = np.concatenate([generator.permutation(12)[:8] + 12 * (user % 2) for user in range(40)])
    ratings = generator.integers(1, 6, len(users))
    return Interactions.from_arrays(users, items, ratings, generator.permutation(len(users)))


@pytest.mark.parametrize("name", MODELS)
def test_recommend_save_and_load(name, log, tmp_path):
    model = MODELS[name]().fit(log)
    found = model.recommend([3, 4], 20)
    assert found.ids.shape == (2, 20)
    for row, user in zip(found.ids, (3, 4), strict=True):
        shown = row[row >= 0]
        assert len(shown) == 16 and not np.isin(shown, log.items_of(user)).any() and len(set(shown)) == 16
    assert (np.diff(found.scores[:, :16]) <= 0).all()
    np.testing.assert_allclose(model.scores([3])[0, found.ids[0, 0]], found.scores[0, 0], rtol=1e-5)
    few = found.ids[0, [9, 2, 5]]
    assert model.recommend([3], 4, candidates=few).ids.tolist() == [[*found.ids[0, [2, 5, 9]], -1]]
    again = Recommender.load(model.save(tmp_path / "model.npz"))
    assert again.get_config() == model.get_config()
    np.testing.assert_array_equal(again.recommend([3, 4], 20).ids, found.ids)
    with pytest.raises(FileExistsError):
        model.save(tmp_path / "model.npz")


@pytest.mark.parametrize("make", [lambda: BPR(8, epochs=60), lambda: WARP(8), lambda: IALS(4), lambda: EASE(5)])
def test_groups_are_found(make, log):
    model = make().fit(log)
    ids = model.recommend(np.arange(40), 4).ids
    assert ((ids // 12) == (np.arange(40) % 2)[:, None]).mean() > 0.95


def test_sgd_repeats(log):
    assert (BPR(4, epochs=1, seed=2).fit(log).item_factors == BPR(4, epochs=1, seed=2).fit(log).item_factors).all()


@pytest.mark.parametrize("users", [40, 9])
def test_ease_is_the_constrained_minimum(users, log):
    log = log.select(log.users < users)
    log = Interactions.from_arrays(log.users, log.items, item_labels=np.arange(24))
    model, x = EASE(3.0).fit(log), log.seen.toarray().astype(float)
    gradient = x.T @ (x @ model.weights - x) + 3.0 * model.weights
    np.fill_diagonal(gradient, 0)
    assert np.abs(gradient).max() < 1e-4 and np.abs(np.diag(model.weights)).max() == 0


@pytest.mark.parametrize("formulation", ["rendle", "hu"])
@pytest.mark.parametrize("steps", [None, 40])
def test_ials_half_step_solves_the_normal_equations(formulation, steps, log):
    model = IALS(5, 0.3, 0.02, 0.5, 2.0, formulation, epochs=1, solver_steps=steps, seed=1)
    model.start(log)
    x, h = log.matrix.toarray().astype(float), model.item_factors.astype(float)
    model._half(log.matrix, model.user_factors, model.item_factors)
    for user in (0, 7):
        c = np.where(x[user] > 0, 2.0 * x[user], 0)
        weight = c + 0.3 if formulation == "rendle" else np.where(c > 0, c, 0.3)
        penalty = 0.02 * ((x[user] > 0).sum() + 0.3 * len(h)) ** 0.5
        exact = np.linalg.solve((h.T * weight) @ h + penalty * np.eye(5), h.T @ c)
        np.testing.assert_allclose(model.user_factors[user], exact, rtol=2e-3, atol=1e-4)


def test_ials_folds_in_what_a_round_would_give(log):
    model = IALS(5, solver_steps=None, epochs=3).fit(log)
    factors = model.fold_in(log.matrix)
    model._half(log.matrix, model.user_factors, model.item_factors)
    np.testing.assert_allclose(factors, model.user_factors, rtol=1e-5)


def test_threads_change_nothing(log):
    one, two = (IALS(4, epochs=2, threads=n).fit(log) for n in (1, 2))
    np.testing.assert_array_equal(one.user_factors, two.user_factors)


def test_solver_leaves_rows_without_entries_at_zero():
    rows = np.ones((2, 2), np.float32)
    data = np.ones(1, np.float32)
    gram, penalties = np.zeros((2, 2), np.float32), np.ones(2, np.float32)
    solve_rows(np.array([0, 1, 1]), np.array([0]), data, data, gram, penalties, np.array([[1, 0]], "f"), rows, None)
    np.testing.assert_allclose(rows, [[0.5, 0], [0, 0]])


def test_rating_als_user_step_is_the_ridge_solution(log):
    model = RatingALS(3, 0.1, epochs=1)
    model.start(log)
    items = model.item_factors.astype(float).copy()
    model._half(model._sides[0], model.user_factors, model.item_factors, fixed=-1)
    mine = log.users == 5
    y = np.delete(items[log.items[mine]], -1, 1)
    target = log.ratings[mine] - log.ratings.mean() - items[log.items[mine], -1]
    exact = np.linalg.solve(y.T @ y + 0.1 * mine.sum() * np.eye(4), y.T @ target)
    np.testing.assert_allclose(model.user_factors[5, :-1], exact, rtol=1e-4, atol=1e-5)


def test_ratings_of_known_factors_are_recovered():
    generator = np.random.default_rng(0)
    truth = 3 + np.outer(generator.normal(size=60), generator.normal(size=40)) * 0.7
    users, items = np.nonzero(generator.random(truth.shape) < 0.6)
    log = Interactions.from_arrays(users, items, truth[users, items])
    training, held = random_split(log, 0.2)
    for model in (BiasedMF(4, 0.03, 0.01, 0.01, 150), RatingALS(4, 0.01), SVDPlusPlus(4, 0.03, 0.01, 0.01, 150)):
        model.fit(training)
        assert rating_metrics(model.predict_ratings(held.users, held.items), held.ratings)["rmse"] < 0.25


def test_metrics_by_hand():
    import scipy.sparse as sp

    truth = sp.csr_matrix(np.array([[0, 1, 0, 1, 1]], float))
    found = {name: values[0] for name, values in ranking_metrics(np.array([[3, 0, 1]]), truth, 3).items()}
    ideal = 1 + 1 / np.log2(3) + 0.5
    expected = {
        "precision": 2 / 3,
        "recall": 2 / 3,
        "ndcg": 1.5 / ideal,
        "mrr": 1,
        "map": (1 + 2 / 3) / 3,
        "hit_rate": 1,
    }
    assert found == pytest.approx(expected)


def test_evaluation_counts_only_users_with_held_out_items(log):
    training, held = leave_one_out(log)
    found = evaluate(EASE(5.0).fit(training), training, held, (1, 5))
    assert len(found.users) == 40 and found.skipped == 0
    low, high = found.interval("ndcg@5")
    assert low <= found.metrics["ndcg@5"] <= high
    assert found.metrics["recall@5"] == found.metrics["hit_rate@5"]
    only = evaluate(Popularity().fit(training), training, held.select(held.users < 3), 5)
    assert len(only.users) == 3 and only.skipped == 37


def test_splits(log):
    for training, held in (random_split(log), leave_one_out(log, 2), temporal_split(log), cold_start_split(log)):
        assert len(training) + len(held) == len(log)
    training, held = temporal_split(log)
    assert training.times.max() < held.times.min()
    training, held = leave_one_out(log)
    assert all(held.times[held.users == u].min() > training.times[training.users == u].max() for u in range(40))
    training, held = cold_start_split(log)
    assert not np.isin(training.items, held.items).any()
    folds = k_fold(log, 4)
    assert sum(len(held) for _, held in folds) == len(log)


def test_gbce_limits():
    positive, negative = np.array([0.3], "f"), np.array([[0.2, -1.0]], "f")
    plain = np.asarray(position_loss(positive, negative, "bce", 11))
    np.testing.assert_allclose(np.asarray(position_loss(positive, negative, "gbce", 11, 0.0)), plain, rtol=1e-6)
    calibrated = np.asarray(position_loss(positive, negative, "gbce", 11, 1.0))
    softplus = np.log1p(np.exp(-0.3))
    np.testing.assert_allclose(plain - calibrated, (1 - 0.2) * softplus, rtol=1e-5)  # beta = 2 / 10.


def test_ranking_losses_by_hand():
    positive, negative = np.array([0.3]), np.array([[0.2, -1.0, -1e9]])
    first, second = (1 / (1 + np.exp(-0.1)), 1 / (1 + np.exp(-1.3)))
    p = np.exp(0.2) / (np.exp(0.2) + np.exp(-1))
    squares = 1 / (1 + np.exp(-np.array([0.04, 1.0])))
    top = np.array([1 - first, 1 - second]) + squares
    expected = {
        "bpr": -np.log([first, second]).mean(),
        "top1": top.mean(),
        "bpr_max": -np.log(p * first + (1 - p) * second) + 0.5 * (p * 0.04 + 1 - p),
        "top1_max": p * top[0] + (1 - p) * top[1],
    }
    for name, value in expected.items():
        found = position_loss(positive.astype("f"), negative.astype("f"), name, 11, score_penalty=0.5)
        np.testing.assert_allclose(np.asarray(found), [value], rtol=1e-5, err_msg=name)


def test_sasrec_looks_only_back(log):
    model = SASRec(**SMALL).fit(log)
    tokens = np.array([[0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 9]])
    states = np.asarray(model.network.encoder(tokens))
    np.testing.assert_allclose(states[0, :5], states[1, :5], atol=1e-5)
    assert np.abs(states[0, 5] - states[1, 5]).max() > 1e-3


def test_interactions():
    log = Interactions.from_arrays(["b", "a", "b"], [5, 5, 2], times=[3, 1, 2])
    assert log.users.tolist() == [0, 1, 1] and log.item_labels[log.items_of(1)].tolist() == [2, 5]
    summed = Interactions.from_arrays([0, 0], [1, 1], [2.0, 3.0], duplicates="sum")
    assert summed.ratings.tolist() == [5.0] and len(summed) == 1
    assert Interactions.from_arrays([0, 0], [1, 1], [2.0, 3.0], duplicates="last").ratings.tolist() == [3.0]
    assert Interactions.from_arrays([0, 0], [1, 1], [2.0, 3.0], duplicates="first").ratings.tolist() == [2.0]


@pytest.mark.parametrize("name", ["ials", "two-tower", "gru4rec"])
def test_bundle_answers_as_the_model(name, log, tmp_path):
    model = MODELS[name]().fit(log)
    export_bundle(model, tmp_path / "bundle")
    query = pad([log.items_of(3)], 6) if name == "gru4rec" else 3
    expected = model.recommend([3], 5, exclude_seen=False)
    found = search_bundle(tmp_path / "bundle", query, 5)
    np.testing.assert_allclose(found.scores, expected.scores[0], rtol=1e-3, atol=1e-5)
    left = search_bundle(tmp_path / "bundle", query, 24, exclude=found.ids[:2])
    assert not np.isin(found.ids[:2], left.ids).any() and (left.ids == -1).sum() == 2
    np.testing.assert_array_equal(left.ids[:3], found.ids[2:])
    with pytest.raises(FileExistsError):
        export_bundle(model, tmp_path / "bundle")


def test_command(tmp_path, log):
    from typer.testing import CliRunner

    from tfkit.commands.recommend import app

    rows = "".join(f"{u},{2 * i}\n" for u, i in zip(log.users, log.items, strict=True))
    (tmp_path / "log.csv").write_text("user,item\n" + rows)
    run, table, model = CliRunner(), str(tmp_path / "log.csv"), str(tmp_path / "m.npz")
    settings = ["--set", "dimension=5", "--set", "formulation=hu"]
    assert run.invoke(app, ["train", table, "--model", "ials", *settings, "-o", model]).exit_code == 0
    made = Recommender.load(model)
    assert (made.dimension, made.formulation) == (5, "hu") and made.item_labels.tolist() == [2 * i for i in range(24)]
    assert run.invoke(app, ["train", table, "--set", "width=5", "-o", model, "--force"]).exit_code == 2
    assert run.invoke(app, ["export", model, "-o", str(tmp_path / "out")]).exit_code == 0
    assert json.loads((tmp_path / "out" / "bundle.json").read_text())["items"] == made.item_labels.tolist()
    judged = run.invoke(app, ["evaluate", table, "--model", "ease", "--json"])
    assert judged.exit_code == 0 and '"ndcg@10"' in judged.output


def test_files(tmp_path, log):
    (tmp_path / "log.csv").write_text("u,i,r\nx,1,4\ny,2,5\n")
    read = Interactions.from_file(tmp_path / "log.csv", user="u", item="i", rating="r")
    assert read.user_labels.tolist() == ["x", "y"] and read.ratings.tolist() == [4, 5]
    (tmp_path / "bad.npz").write_bytes(b"not an archive")
    with pytest.raises(RecommenderFileError):
        Recommender.load(tmp_path / "bad.npz")
    path = Popularity().fit(log).save(tmp_path / "p.npz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecommenderFileError):
        Recommender.load(path)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda log: Interactions.from_arrays([0, 0], [1, 1]), "once"),
        (lambda log: Interactions.from_arrays([0], [1], [np.nan]), "ratings"),
        (lambda log: Interactions.from_arrays([], []), "users"),
        (lambda log: Interactions.from_arrays([0], [9], item_labels=[1, 2]), "known"),
        (lambda log: Popularity().recommend([0]), "fitted"),
        (lambda log: Popularity().fit(log).recommend([40]), "users"),
        (lambda log: Popularity().fit(log).recommend([0], 99), "k"),
        (lambda log: BPR(2, epochs=1).fit(log).recommend([[0, 1]]), "users"),
        (lambda log: EASE().fit(log).recommend([[99]]), "histories"),
        (lambda log: EASE(-1.0), "penalty"),
        (lambda log: BiasedMF().fit(log.at_least(3)), "ratings"),
    ],
)
def test_bad_input(call, word, log):
    with pytest.raises(ValueError, match=word):
        call(log)
