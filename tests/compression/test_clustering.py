import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit.compression import WeightClustering
from tfkit.compression.clustering import (
    SharedValues,
    entropy_constrained_1d,
    initial_centroids,
    is_clustered,
    kmeans_1d,
    nearest,
)


def lloyd_reference(values, centroids, rounds=500):
    """Lloyd's algorithm as textbooks write it."""
    centroids = np.sort(centroids).astype(np.float64)
    for _ in range(rounds):
        labels = np.abs(values[:, None] - centroids[None]).argmin(1)
        centroids = np.array(
            [values[labels == k].mean() if np.any(labels == k) else centroids[k] for k in range(len(centroids))]
        )
        centroids = np.sort(centroids)
    return centroids


@pytest.mark.parametrize("initialization", ["linear", "density", "random"])
def test_kmeans_is_lloyds(initialization):
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000)
    start = initial_centroids(values, 8, initialization, rng)
    np.testing.assert_allclose(kmeans_1d(values, start), lloyd_reference(values, start), atol=1e-12)


def test_initialisations_of_the_paper():
    values = np.concatenate([np.linspace(-1, 0, 1000), [3.0]])
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(initial_centroids(values, 5, "linear", rng), [-1, 0, 1, 2, 3])
    assert (initial_centroids(values, 5, "density", rng)[:-1] <= 0).all()
    assert set(initial_centroids(values, 5, "random", rng)) <= set(values)


def test_nearest_picks_the_nearest():
    rng = np.random.default_rng(0)
    values, centroids = rng.normal(size=500), np.sort(rng.normal(size=9))
    expected = np.abs(values[:, None] - centroids).argmin(1)
    np.testing.assert_array_equal(nearest(values, centroids), expected)


def test_gradient_of_a_shared_value_is_the_sum_over_its_weights():
    # Equation 3: dL/dC_k = sum over i, j of dL/dW_ij 1(I_ij = k).
    shared = SharedValues(2)
    shared.build((2, 3))
    shared.adapt(np.array([[1.0, 1.1, 0.0], [-2.0, -2.2, 1.05]], "float32"))
    upstream = np.array([[1.0, 10.0, 100.0], [1000.0, 10000.0, 0.5]], "float32")
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(shared.transform(tf.zeros((2, 3))) * upstream)
    gradient = tape.gradient(value, shared.codebook.value)
    np.testing.assert_allclose(tf.convert_to_tensor(gradient), [11000.0, 11.5])


def test_codebook_size_counts_zero():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(40, 40)).astype("float32")
    for zeros in (0, 800):
        model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(40)])
        sparse = weight.copy()
        sparse.flat[:zeros] = 0
        model.layers[0].kernel.assign(sparse)
        final = WeightClustering(3).apply(model)
        kernel = np.asarray(final.layers[-1].kernel)
        assert len(np.unique(kernel)) == 8
        np.testing.assert_array_equal(kernel == 0, sparse == 0)


def test_enough_bits_change_nothing():
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(20)])
    final = WeightClustering(8).apply(model)
    np.testing.assert_array_equal(final.layers[-1].kernel, model.layers[-1].kernel)


def test_seed_repeats_random_initialisation():
    model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(30)])

    def centroids(seed):
        final = WeightClustering(3, initialization="random", seed=seed).apply(model)
        return np.unique(np.asarray(final.layers[-1].kernel))

    np.testing.assert_array_equal(centroids(0), centroids(0))
    assert not np.array_equal(centroids(0), centroids(1))


def test_normalization_is_folded_so_that_the_file_shares_values(tmp_path):
    from tfkit.export import convert
    from tfkit.export.runner import Runner

    inputs = keras.Input((6, 6, 2))
    norm = keras.layers.BatchNormalization()
    model = keras.Model(inputs, norm(keras.layers.Conv2D(8, 3, name="conv")(inputs)))
    norm.gamma.assign(np.linspace(0.5, 2, 8))
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype("float32")
    folded = WeightClustering(8).apply(model)  # 144 weights: 8 bits lose nothing.
    np.testing.assert_allclose(folded(x), model(x), atol=1e-5)
    final = WeightClustering(3).apply(model)
    assert len(np.unique(np.asarray(final.get_layer("conv").kernel))) == 8
    np.testing.assert_allclose(Runner(convert(final, tmp_path / "m.tflite"))(x), final(x), atol=1e-5)
    kept = WeightClustering(3, fold=False).apply(model)
    assert any(isinstance(layer, keras.layers.BatchNormalization) for layer in kept.layers)


def test_what_counts_as_clustered():
    rng = np.random.default_rng(0)
    assert not is_clustered(rng.normal(size=100))
    assert is_clustered(rng.choice([0.0, 0.5, -0.5], size=100))
    assert not is_clustered(np.zeros(10))


def test_all_zero_and_constant_weights():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, kernel_initializer="zeros", name="zero"),
                              keras.layers.Dense(4, kernel_initializer="ones", name="one")])  # fmt: skip
    final = WeightClustering(2).apply(model)
    np.testing.assert_array_equal(final.get_layer("zero").kernel, np.zeros((4, 4)))
    np.testing.assert_array_equal(final.get_layer("one").kernel, np.ones((4, 4)))


def entropy_bits(assignment, zeros=0):
    counts = np.bincount(assignment).astype(float)
    counts = np.append(counts[counts > 0], zeros) if zeros else counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def ecvq_reference(values, centroids, price, rounds):
    """Entropy-constrained quantization as the paper writes it: every weight against every value."""
    lengths = np.zeros(len(centroids))
    for _ in range(rounds):
        labels = ((values[:, None] - centroids) ** 2 + price * lengths).argmin(1)
        used = np.unique(labels)
        centroids = np.array([values[labels == k].mean() for k in used])
        lengths = -np.log2(np.array([np.mean(labels == k) for k in used]))
    return centroids, np.searchsorted(used, labels)


def test_entropy_constrained_against_the_plain_algorithm():
    rng = np.random.default_rng(0)
    values = rng.standard_t(4, size=3000)
    start = np.sort(rng.choice(values, 12, replace=False))
    for price in (0.0, 0.02, 0.2):
        found = entropy_constrained_1d(values, start, price)
        centroids, labels = ecvq_reference(values, start, price, len(found.cost))
        np.testing.assert_allclose(found.values, centroids, atol=1e-12)
        np.testing.assert_array_equal(found.assignment, labels)
        assert (np.diff(found.cost) <= 1e-12).all()
        distance = np.mean((values - found.values[found.assignment]) ** 2)
        assert found.cost[-1] == pytest.approx(distance + price * entropy_bits(found.assignment) / len(values))


def test_without_a_price_it_is_kmeans():
    rng = np.random.default_rng(1)
    values = rng.normal(size=1500)
    start = initial_centroids(values, 9, "linear", rng)
    found = entropy_constrained_1d(values, start, 0.0, max_rounds=1000)
    np.testing.assert_allclose(found.values, kmeans_1d(values, start), atol=1e-3)


def test_a_higher_price_buys_fewer_bits_and_zero_stays_where_it_is():
    rng = np.random.default_rng(2)
    values = rng.normal(size=4000)
    values = values[np.abs(values) > 0.7]  # what pruning leaves
    start = np.linspace(values.min(), values.max(), 15)
    bits, zeros = [], 4000 - len(values)
    for price in (0.0, 0.02, 0.1, 0.3):
        found = entropy_constrained_1d(values, start, price, zeros=zeros)
        assert 0.0 in found.values
        counts = np.bincount(found.assignment, minlength=len(found.values)) + zeros * (found.values == 0)
        bits.append(float(-(counts[counts > 0] * np.log2(counts[counts > 0] / 4000)).sum()))
    assert (np.diff(bits) < 0).all() and bits[-1] < 0.7 * bits[0]


def test_the_price_reaches_the_weights_and_biases_are_short():
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(40, 50)).astype("float32")
    kernel[rng.random(kernel.shape) < 0.8] = 0
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(50, name="fc")])
    bias = rng.normal(size=50).astype("float32")
    model.get_layer("fc").set_weights([kernel, bias])

    def entropy(price, **options):
        final = WeightClustering(4, entropy=price, **options).apply(model)
        values, counts = np.unique(np.asarray(final.get_layer("fc").kernel), return_counts=True)
        assert len(values) <= 16 and not np.asarray(final.get_layer("fc").kernel)[kernel == 0].any()
        return -(counts * np.log2(counts / counts.sum())).sum(), np.asarray(final.get_layer("fc").bias)

    plain, same = entropy(0.0)
    cheap, short = entropy({"fc": 0.1}, short_biases=True)
    assert cheap < 0.85 * plain
    np.testing.assert_array_equal(same, bias)
    assert not (short.view("uint32") & 0xFFFF).any()  # the lower half of each float is gone
    np.testing.assert_allclose(short, bias, rtol=2**-8)
    np.testing.assert_array_equal(model.get_layer("fc").bias, bias)


def test_a_price_beyond_measure_leaves_the_layer_alive():
    model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(40)])
    kernel = np.zeros((30, 40), "float32")
    kernel.flat[:40] = np.random.default_rng(0).normal(1.0, 0.1, size=40)
    model.layers[0].kernel.assign(kernel)
    assert np.asarray(WeightClustering(4, entropy=1.0).apply(model).layers[-1].kernel).any()


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 0}, {"bits": 9}, {"bits": {"fc": 12}}, {"initialization": "kmeans++"}, {"entropy": 2.0}],
)
def test_bad_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        WeightClustering(**arguments)
