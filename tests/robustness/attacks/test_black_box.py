"""Attacks on labels and scores: exact distances on linear models, promises on a digits model."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit.robustness.attacks import NES, ZOO, Boundary, HopSkipJump, OPTAttack, Oracle, SignOPT, Square
from tfkit.robustness.attacks.boundary import orthogonal_step, source_step
from tfkit.robustness.attacks.hop_skip_jump import estimate_direction
from tfkit.robustness.attacks.nes import antithetic, search_gradient, target_scores
from tfkit.robustness.attacks.opt_attack import randomized_gradient
from tfkit.robustness.attacks.oracle import TopK
from tfkit.robustness.attacks.scores import margin
from tfkit.robustness.attacks.square import bump, share_at, signed_bump
from tfkit.robustness.attacks.starts import blend
from tfkit.robustness.attacks.zoo import _Space, adam_step, interpolation, newton_step, pooled

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(24, 2)).astype(np.float32)
WEIGHTS -= WEIGHTS.mean(axis=0)
X = RNG.uniform(0.4, 0.6, (12, 24)).astype(np.float32)
Y = (X @ WEIGHTS).argmax(1)
NORMAL = (WEIGHTS[:, 0] - WEIGHTS[:, 1]).astype(np.float64)
MARGIN = np.abs(X.astype(np.float64) @ NORMAL)
EXACT = {"l2": MARGIN / np.linalg.norm(NORMAL), "linf": MARGIN / np.abs(NORMAL).sum()}

LABELS = (Boundary, OPTAttack, SignOPT, HopSkipJump)
TOLERANCE = {Boundary: 1.02, OPTAttack: 1.03, SignOPT: 1.03, HopSkipJump: 1.04}


def linear(points):
    assert isinstance(points, np.ndarray)
    return points @ WEIGHTS


@pytest.mark.parametrize("attack", LABELS)
def test_label_attacks_find_the_plane(attack):
    result = attack(max_queries=3000)(linear, X, Y, epsilon=None)
    assert result.success.all()
    ratio = result.distance / EXACT["l2"]
    assert ratio.min() >= 1 - 1e-6
    assert np.median(ratio) < TOLERANCE[attack]
    assert ratio.max() < 1.15


def test_hop_skip_jump_finds_the_plane_in_linf():
    result = HopSkipJump(norm="linf", max_queries=4000)(linear, X, Y, epsilon=None)
    assert result.success.all() and np.median(result.distance / EXACT["linf"]) < 1.15


@pytest.mark.parametrize(("solver", "rate"), [("adam", 0.02), ("newton", 0.2)])
def test_zoo_finds_the_plane(solver, rate):
    result = ZOO(solver, rate=rate, coordinates=8, max_queries=6000)(linear, X, Y, epsilon=None)
    assert result.success.all()
    assert np.median(result.distance / EXACT["l2"]) < 1.07 and (result.distance >= EXACT["l2"] * (1 - 1e-6)).all()


@pytest.mark.parametrize("attack", [Square, NES])
def test_score_attacks_break_what_lies_well_within_the_ball(attack):
    epsilon = float(np.median(EXACT["linf"]))
    result = attack(max_queries=3000)(linear, X, Y, epsilon=epsilon)
    reachable = EXACT["linf"] < epsilon
    assert not result.success[~reachable].any()
    assert result.success[EXACT["linf"] < 0.8 * epsilon].all()
    # Those that are broken leave the batch.
    assert result.queries[result.success].max() < 3000 and (result.queries[~result.success] >= 2950).all()


MAKERS = {
    "boundary": lambda **s: Boundary(**s),
    "opt": lambda **s: OPTAttack(**s),
    "sign_opt": lambda **s: SignOPT(**s),
    "hop_skip_jump": lambda **s: HopSkipJump(**s),
    "hop_skip_jump linf": lambda **s: HopSkipJump(norm="linf", **s),
    "square": lambda **s: Square(**s),
    "square l2": lambda **s: Square(norm="l2", **s),
    "nes": lambda **s: NES(**s),
    "nes top-k": lambda **s: NES("top-k", pool=(X[::-1], Y[::-1]), **s),
    "nes labels": lambda **s: NES("labels", pool=(X[::-1], Y[::-1]), repeats=5, samples=10, **s),
    "zoo": lambda **s: ZOO(coordinates=8, **s),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("queries", [1, 2, 57, 301])
def test_budget_box_and_ball_hold(name, queries):
    asked = []

    def watched(points):
        assert points.min() >= 0 and points.max() <= 1 and points.dtype == np.float32
        asked.append(len(points))
        return linear(points)

    attack = MAKERS[name](max_queries=1000)
    oracle = Oracle(watched, attack.output, budget=queries)
    result = attack(oracle, X, Y, epsilon=0.02)
    assert result.queries.max() <= queries
    # All that the model saw is counted, less what the base asks before and after.
    assert result.queries.sum() == oracle.queries == sum(asked) - 2 * len(X)
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1 and (result.distance <= 0.02).all()


@pytest.mark.parametrize("name", MAKERS)
def test_repeats_by_seed_and_leaves_what_is_wrong_already(name):
    wrong = 1 - Y
    result = MAKERS[name](max_queries=300)(linear, X, wrong, epsilon=0.5)
    assert (result.queries == 1).all() and (result.distance == 0).all() and result.success.all()
    one, two, other = (MAKERS[name](max_queries=300, seed=seed)(linear, X, Y, epsilon=0.02).x_adv for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


@pytest.mark.parametrize("name", ["boundary", "hop_skip_jump", "sign_opt", "square", "zoo"])
def test_quantized_points_are_levels_and_adversarial(name):
    x = (np.rint(X * 255) / 255).astype(np.float32)
    result = MAKERS[name](max_queries=1500, quantize_levels=256)(linear, x, linear(x).argmax(1), epsilon=0.2)
    np.testing.assert_allclose(result.x_adv * 255, np.rint(result.x_adv * 255), atol=1e-4)
    assert result.success.mean() > 0.6 and (result.distance <= 0.2 + 1e-9).all()


@pytest.mark.parametrize("attack", [HopSkipJump, Boundary, OPTAttack])
def test_targeted_with_a_pool(attack):
    pool = (np.concatenate([X, 1 - X]), np.concatenate([Y, linear(1 - X).argmax(1)]))
    result = attack(max_queries=1500, targeted=True, pool=pool)(linear, X, 1 - Y, epsilon=None)
    assert result.success.all() and np.median(result.distance / EXACT["l2"]) < 1.2


@pytest.fixture(scope="module")
def digits_task(trained_digits_model, tiny_digits):
    x, y = tiny_digits.x_test[:8], tiny_digits.y_test[:8]
    return trained_digits_model, x, y, (tiny_digits.x_train[:200], tiny_digits.y_train[:200])


@pytest.mark.parametrize("attack", LABELS)
def test_label_attacks_on_digits(digits_task, attack):
    model, x, y, _ = digits_task
    few, many = (attack(max_queries=queries)(model, x, y, epsilon=None) for queries in (200, 800))
    assert few.success.all() and many.success.all()
    assert np.median(many.distance) < 0.85 * np.median(few.distance)


def test_score_attacks_on_digits(digits_task):
    model, x, y, pool = digits_task
    for attack in (Square(max_queries=1000), NES(max_queries=6000), NES("top-k", pool=pool, max_queries=6000)):
        result = attack(model, x, y, epsilon=0.3)
        assert result.success.mean() >= 0.85
        assert np.median(result.queries) < attack.max_queries / 2
    assert Square(norm="l2", max_queries=1000)(model, x, y, epsilon=2.5).success.mean() >= 0.7
    for zoo in (ZOO(max_queries=8000), ZOO("newton", max_queries=8000, hierarchy=(7, 14, 28))):
        result = zoo(model, x, y, epsilon=None)
        assert result.success.all() and np.median(result.distance) < 2.5


def test_boundary_steps_are_on_the_sphere_and_towards_the_example():
    x, point, noise = RNG.normal(size=(3, 4, 9))
    size = np.full(4, 0.3)
    moved = orthogonal_step(x, point, noise, size)
    np.testing.assert_allclose(np.linalg.norm(moved - x, axis=1), np.linalg.norm(point - x, axis=1))
    # Before it is put back on the sphere the step is orthogonal, 0.3 of the radius: a turn by its arc tangent.
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose((unit(moved - x) * unit(point - x)).sum(1), np.cos(np.arctan(0.3)))
    np.testing.assert_allclose(
        np.linalg.norm(source_step(x, point, size) - x, axis=1), 0.7 * np.linalg.norm(point - x, axis=1)
    )


def test_estimates_are_gradients_of_linear_functions():
    gradient = RNG.normal(size=5)
    noise = antithetic((1, 40_000, 5), RNG)
    np.testing.assert_array_equal(noise[:, :20_000], -noise[:, 20_000:])
    near = search_gradient(3.0 + 0.1 * noise @ gradient, noise, 0.1)[0]
    np.testing.assert_allclose(near, gradient, atol=0.05)
    directions = noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    moved = 2.0 + 0.01 * directions @ gradient
    estimate = randomized_gradient(np.array([2.0]), moved, directions, np.array([0.01]))[0]
    # The second moment of unit directions is the identity over their number.
    np.testing.assert_allclose(5 * estimate, gradient, atol=0.05)
    signs = np.where(directions @ gradient > 0.3, 1.0, -1.0)
    signed = np.einsum("bs,bsf->bf", signs, directions)
    direction = estimate_direction(signed, directions.sum(1), signs.mean(1))
    np.testing.assert_allclose(direction[0], gradient / np.linalg.norm(gradient), atol=0.02)


def test_scores_to_lower():
    scores = np.array([[-1.0, -3.0, -2.0], [-1.0, -3.0, -2.0]])
    np.testing.assert_allclose(margin(scores, np.array([1, 1]), targeted=True), [2, 2])
    np.testing.assert_allclose(margin(scores, np.array([0, 1]), targeted=False, confidence=0.5), [1, -0.5])
    answer = TopK(np.array([[4, 2], [1, 3]]), np.array([[-0.1, -3.0], [-0.5, -1.0]]))
    np.testing.assert_allclose(target_scores(answer, np.array([2, 7])), [-3, -1])


def test_square_shapes():
    assert [share_at(step, 1000, 0.8) for step in (0, 1, 2, 900)] == [0.8, 0.8, 0.4, 0.8 / 2**9]
    pattern = bump(3, 3)
    np.testing.assert_allclose(pattern / pattern[1, 1], np.where(np.eye(3)[1] + np.eye(3)[1][:, None] == 2, 1.0, 0.2))
    np.testing.assert_allclose(np.linalg.norm(signed_bump(5, RNG)), 1)


def test_zoo_pieces():
    x = np.linspace(0, 1, 4) + 0.125
    np.testing.assert_allclose(
        (interpolation(4, 8) @ x)[1:-1], np.interp(np.arange(1, 7) * 0.5 - 0.25, np.arange(4), x)
    )
    np.testing.assert_allclose(interpolation(3, 7).sum(1), 1)
    step, *_ = adam_step(np.zeros(2), np.zeros(2), np.zeros(2), np.array([3.0, -0.2]), 0.1)
    np.testing.assert_allclose(step, [-0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(newton_step(np.array([4.0, 4.0]), np.array([2.0, -2.0]), 1.0), [-2, -4])
    change = np.zeros((1, 36))
    change[0, 7] = -2
    near = pooled(change, (6, 6, 1)).reshape(6, 6)
    np.testing.assert_array_equal(near[:5, :5], 2 * np.outer(np.arange(5) < 4, np.arange(5) < 4))
    coarse, fine = _Space((8, 8, 2), 4), _Space((8, 8, 2), 8)
    values = RNG.normal(size=(2, coarse.coordinates))
    finer = fine.take_over(coarse, values)
    np.testing.assert_allclose(fine.points(finer), coarse.points(values))
    chosen = np.array([[3, 17], [0, 31]])
    one = np.zeros((2, coarse.coordinates))
    one[[0, 1], [17, 31]] = 1
    np.testing.assert_allclose(coarse.columns(chosen)[:, 1], coarse.points(one))


def test_blend():
    near = blend(np.zeros((1, 3)), np.array([[3.0, -1.0, 0.5]]), np.array([0.5]), "linf")
    np.testing.assert_allclose(near, [[1.5, -1, 0.5]])


def test_bad_settings():
    for make in (
        lambda: Boundary(norm="linf"),
        lambda: NES(samples=5),
        lambda: NES("labels"),
        lambda: ZOO(hierarchy=(8, 4)),
        lambda: HopSkipJump(pool=(X, Y[:2])),
        lambda: HopSkipJump(max_queries=0),
        lambda: NES()(linear, X, Y, epsilon=None),
        lambda: ZOO(hierarchy=(2, 4))(linear, X, Y, epsilon=None),
    ):
        with pytest.raises(ValueError, match="Argument"):
            make()
