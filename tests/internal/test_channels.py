import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.internal import channels, surgery
from tfkit.internal.channels import ChannelGraph, macs

L = keras.layers


def silence(graph, gone):
    """Makes the channels of these roots exactly zero in the graph's model: weights, biases, normalizations."""
    for cut in graph.slices:
        if cut.role:
            array = np.moveaxis(keras.ops.convert_to_numpy(cut.variable).copy(), cut.axis, 0)
            array[np.isin(graph.root[cut.ids], gone)] = 0
            cut.variable.assign(np.moveaxis(array, 0, cut.axis))


def randomize(model):
    rng = np.random.default_rng(3)
    for variable in model.weights:
        low = 0.5 if "variance" in variable.path else -1.0
        variable.assign(rng.uniform(low, 1, variable.shape))


def check(model, x, seed=0):
    """Removing channels that are zero must change nothing; returns the groups."""
    flat = channels.flatten(model)
    randomize(flat)
    graph = ChannelGraph(flat)
    rng = np.random.default_rng(seed)
    groups = graph.groups()
    gone = [rng.choice(g.roots, rng.integers(1, len(g.roots)), replace=False) for g in groups if len(g.roots) > 1]
    gone = np.concatenate([np.empty(0, int), *gone])
    protected = [graph.root[b.ids][0] for g in groups for b in g.blocks]
    gone = np.setdiff1d(gone, protected)
    silence(graph, gone)
    keep = graph.kept(gone)
    small = graph.shrink(keep)
    expected = flat(x)
    size = max(float(np.abs(t).max()) for t in keras.tree.flatten(expected))
    assert zoo.largest_difference(expected, small(x)) <= 1e-5 * max(size, 1.0)
    assert (small.count_params() < flat.count_params()) == bool(len(gone))
    assert macs(small) == graph.macs(keep)
    return groups


def names(groups):
    return [[block.layer.name for block in group.blocks] for group in groups]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_no_model_of_the_zoo_becomes_wrong(name):
    check(*zoo.MODELS[name]())


def se_gate(x, filters):
    gate = L.Reshape((1, 1, filters))(L.GlobalAveragePooling2D()(x))
    gate = L.Conv2D(3, 1, activation="relu", name="squeeze")(gate)
    return L.Multiply()([x, L.Conv2D(filters, 1, activation="sigmoid", name="excite")(gate)])


def image(*layers):
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, L.Dense(4, name="logits")(L.Flatten()(x)))


def conv(filters=6, name=None, **settings):
    return L.Conv2D(filters, 3, padding="same", name=name, **settings)


def residual():
    a = conv(name="a")
    return image(
        a, L.ReLU(), lambda x: L.Add()([x, L.BatchNormalization()(conv(name="b")(x))]), L.MaxPooling2D(2)
    )  # fmt: skip


def nested_and_shared():
    block = keras.Sequential([keras.Input((8, 8, 6)), conv(name="in"), L.PReLU(shared_axes=[1, 2]), conv(name="out")])
    return image(conv(name="a"), block, block)


def concatenated_twice():
    return image(
        lambda x: L.Concatenate()([conv(4, "a")(x), x, conv(5, "b")(x)]),
        L.BatchNormalization(),
        lambda x: L.Concatenate(axis=1)([conv(6, "c")(x), conv(6, "d")(x)]),
    )


GRAPHS = {
    "residual": (residual, [["a", "b"]]),
    "concatenation": (concatenated_twice, [["a"], ["b"], ["c", "d"]]),
    "depthwise": (
        lambda: image(conv(4, "a"), L.DepthwiseConv2D(3, depth_multiplier=2), L.PReLU(), conv(4, "b", strides=2)),
        [["a"], ["b"]],
    ),
    "depthwise twice": (
        lambda: image(
            conv(3, "a"), L.DepthwiseConv2D(2, depth_multiplier=2), L.DepthwiseConv2D(2, depth_multiplier=3),
            L.SeparableConv2D(4, 2, depth_multiplier=2, name="b"),
        ),
        [["a"], ["b"]],
    ),
    "multiplied channels tied to filters": (
        lambda: image(conv(3, "a"), lambda x: L.Add()([
            L.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x), conv(6, "b")(x)])),
        [["a", "b"]],
    ),
    "nested and shared": (nested_and_shared, [["a", "out"], ["in"]]),
    "gate": (lambda: image(conv(name="a"), lambda x: se_gate(x, 6)), [["a", "excite"], ["squeeze"]]),
    "gate of operations": (
        lambda: image(conv(name="a"), lambda x: x * keras.ops.sigmoid(
            conv(1, "mask")(x) + L.Dense(6, name="gate")(keras.ops.mean(x, axis=[1, 2], keepdims=True)))),
        [["a", "gate"]],
    ),
    "broadcast": (lambda: image(conv(name="a"), lambda x: L.Multiply()([x, conv(1, "mask")(x)])), [["a"]]),
    "reshaped units": (
        lambda: image(L.Flatten(), L.Dense(24, name="a"), L.Reshape((2, 2, 6)), L.UpSampling2D(), conv(4, "b")),
        [["a"], ["b"]],
    ),
    "rows of a reshape": (
        lambda: image(conv(name="a"), L.Reshape((64, 6)), L.Conv1D(4, 3, name="b"), L.Permute((2, 1)), L.Flatten()),
        [["a"], ["b"]],
    ),
    "split channels": (lambda: image(conv(name="a"), L.Reshape((8, 8, 2, 3)), L.Dense(4, name="b")), [["a"], ["b"]]),
    "other axis": (lambda: image(conv(name="a"), L.Permute((3, 1, 2)), L.Dense(5, name="b")), [["b"]]),
    "transposed": (lambda: image(conv(name="a"), L.Conv2DTranspose(5, 3, strides=2, name="b")), [["a"], ["b"]]),
    "grouped": (lambda: image(conv(6, "a"), conv(6, "b", groups=2), conv(4, "c")), [["c"]]),
    "stochastic depth": (
        lambda: image(conv(name="a"), L.Dropout(0.2, noise_shape=(None, 1, 1, 1)), conv(4, "b")), [["a"], ["b"]]),
    "noise for each channel": (
        lambda: image(conv(name="a"), L.Dropout(0.2, noise_shape=(None, 1, 1, 6)), conv(4, "b")), [["b"]]),
    "softmax": (lambda: image(conv(6, "a", activation="softmax"), conv(4, "b"), L.Softmax()), []),
    "unknown": (
        lambda: image(conv(name="a"), conv(name="b"), L.Lambda(lambda x: x[..., ::-1]), conv(4, "c")),
        [["a"], ["c"]],
    ),
    "group normalization": (lambda: image(conv(name="a"), L.GroupNormalization(2), conv(4, "b")), [["b"]]),
    "normalized rows": (lambda: image(conv(name="a"), L.BatchNormalization(axis=1), conv(4, "b")), [["b"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_removing_silent_channels_changes_nothing(name):
    make, expected = GRAPHS[name]
    assert names(check(make(), zoo._normal(3, 8, 8, 3))) == expected


def test_attention_loses_heads_and_keeps_its_function():
    query, memory = keras.Input((5, 6), name="query"), keras.Input((7, 4), name="memory")
    mask = keras.Input((5, 7), dtype="bool", name="mask")
    x = L.Dense(8, name="a")(query)
    attended = L.MultiHeadAttention(4, 3, value_dim=2, name="b")(x, L.Dense(6, name="c")(memory), attention_mask=mask)
    hidden = L.EinsumDense("abc,cd->abd", (None, 9), bias_axes="d", activation="relu", name="d")(L.Add()([x, attended]))
    model = keras.Model([query, memory, mask], L.Dense(2)(hidden))
    data = [zoo._normal(3, 5, 6), zoo._normal(3, 7, 4), np.random.default_rng(0).random((3, 5, 7)) < 0.7]
    groups = check(model, data)
    assert [(g.kind, len(g.roots)) for g in groups] == [("channels", 8), ("channels", 6), ("heads", 4), ("channels", 9)]
    assert names(groups) == [["a", "b"], ["c"], ["b"], ["d"]]

    graph = ChannelGraph(model, kinds=["heads"])
    (heads,) = graph.groups()
    small = graph.shrink(graph.kept(heads.roots[1:]))
    assert small.get_layer("b").num_heads == 1
    assert small.get_layer("b").get_config()["key_dim"] == 3
    again = keras.Model.from_config(small.get_config())
    assert [w.shape for w in again.weights] == [w.shape for w in small.weights]


def test_attention_scores_keep_all_heads():
    inputs = keras.Input((5, 6))
    outputs = L.MultiHeadAttention(4, 3)(inputs, inputs, return_attention_scores=True)
    assert ChannelGraph(keras.Model(inputs, outputs)).groups() == []


def test_layer_normalization_normalizes_what_is_left():
    model = keras.Sequential([keras.Input((4,)), L.Dense(6, name="a"), L.LayerNormalization(epsilon=1e-3), L.Dense(2)])
    randomize(model)
    x = zoo._normal(5, 4)
    graph = ChannelGraph(channels.flatten(model))
    (group,) = graph.groups()
    small = graph.shrink(graph.kept(group.roots[[1, 4]]))
    left = [0, 2, 3, 5]
    w, b, gamma, beta, v, c = (np.asarray(weight) for weight in model.weights)
    h = x @ w[:, left] + b[left]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-3) * gamma[left] + beta[left]
    np.testing.assert_allclose(np.asarray(small(x)), h @ v[left] + c, rtol=1e-4, atol=1e-5)


def random_model(seed):
    """Draws a graph: each new tensor is made from tensors that exist, whatever their sizes."""
    rng = np.random.default_rng(seed)
    inputs = keras.Input((6, 6, 3))
    tensors = [conv(int(rng.integers(2, 7)))(inputs)]
    for _ in range(7):
        x = tensors[rng.integers(len(tensors))]
        same = [t for t in tensors if t.shape == x.shape]
        other = same[rng.integers(len(same))]
        near = [t for t in tensors if t.shape[1:3] == x.shape[1:3]]
        filters = int(x.shape[-1] if rng.random() < 0.5 else rng.integers(2, 7))
        makers = [
            lambda x=x, f=filters: conv(f, activation="relu")(x),
            lambda x=x: L.DepthwiseConv2D(3, padding="same", depth_multiplier=int(rng.integers(1, 3)))(x),
            lambda x=x: L.BatchNormalization()(x),
            lambda x=x: L.PReLU()(x),
            lambda x=x, o=other: L.Add()([x, o]),
            lambda x=x, o=other: L.Multiply()([x, o]),
            lambda x=x, n=near: L.Concatenate()([x, n[rng.integers(len(n))]]),
            lambda x=x, f=filters: L.SeparableConv2D(f, 3, padding="same")(x),
            lambda x=x: L.MaxPooling2D(2, padding="same")(x),
            lambda x=x: x * L.Dense(x.shape[-1], activation="relu")(L.GlobalAveragePooling2D(keepdims=True)(x)),
            lambda x=x: L.Reshape((x.shape[2], x.shape[1], x.shape[3]))(x),
        ]
        tensors.append(makers[rng.integers(len(makers))]())
    ends = [L.Dense(2)(L.Flatten()(t)) for t in tensors[-2:]]
    return keras.Model(inputs, ends)


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_never_become_wrong(seed):
    check(random_model(seed), zoo._normal(2, 6, 6, 3), seed)


def test_reasons_name_the_layer_that_keeps_the_channels():
    model = image(conv(name="a"), L.Lambda(lambda x: x + 1, name="odd"), conv(4, "b"))
    left = ChannelGraph(model, selects=lambda layer: layer.name != "b").left_alone()
    assert "odd" in left["a"]
    assert "exclude" in left["b"]
    assert "output" in left["logits"]


def test_layers_that_carry_more_than_their_class_says_stay():
    model = image(conv(name="a"), conv(name="b"))
    model.get_layer("b").kernel_constraint = zoo_constraint = type("Grid", (keras.constraints.Constraint,), {})()
    assert zoo_constraint is not None
    assert ChannelGraph(model).groups() == []

    adapted = keras.Sequential([keras.Input((4,)), L.Dense(6), L.Dense(3)])
    adapted.layers[0].enable_lora(2)
    assert ChannelGraph(surgery.as_functional(adapted)).groups() == []


def test_components_are_those_of_a_depth_first_search():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 60, (2, 45))
    root = channels._components(60, [(first[:20], second[:20]), (first[20:], second[20:])])
    neighbours = {i: set() for i in range(60)}
    for a, b in zip(first, second, strict=True):
        neighbours[a].add(b)
        neighbours[b].add(a)
    for start in range(60):
        seen, stack = {start}, [start]
        while stack:
            new = neighbours[stack.pop()] - seen
            seen |= new
            stack += new
        assert root[start] == min(seen)


MACS = {
    "conv": (L.Conv2D(5, 3, strides=2), (9, 9, 2), 4 * 4 * 9 * 2 * 5),
    "grouped": (L.Conv2D(6, 3, groups=2), (8, 8, 4), 36 * 9 * 2 * 6),
    "depthwise": (L.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4), 36 * 9 * 8),
    "separable": (L.SeparableConv2D(5, 3, depth_multiplier=2), (8, 8, 4), 36 * (9 * 8 + 8 * 5)),
    "transposed": (L.Conv2DTranspose(5, 3, strides=2), (4, 4, 2), 16 * 9 * 2 * 5),
    "dense": (L.Dense(5), (7, 4), 7 * 4 * 5),
    "einsum": (L.EinsumDense("abc,cde->abde", (None, 3, 2)), (7, 4), 7 * 4 * 3 * 2),
    "lstm": (L.LSTM(5), (7, 4), 7 * (4 + 5) * 20),
    "bidirectional": (L.Bidirectional(L.GRU(5)), (7, 4), 2 * 7 * (4 + 5) * 15),
    "distributed": (L.TimeDistributed(L.Conv2D(5, 3)), (7, 6, 6, 2), 7 * 16 * 9 * 2 * 5),
    "pooling": (L.GlobalAveragePooling1D(), (7, 4), 0),
    "open length": (L.Conv1D(5, 3), (None, 4), 3 * 4 * 5),
}


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds(name):
    layer, shape, expected = MACS[name]
    inputs = keras.Input(shape)
    assert macs(keras.Model(inputs, layer(inputs))) == expected


def test_multiply_adds_of_attention_and_shared_layers():
    x = keras.Input((5, 6))
    projections, products = 4 * 5 * 6 * 2 * 3, 2 * 5 * 5 * 2 * 3
    assert macs(keras.Model(x, L.MultiHeadAttention(2, 3)(x, x))) == projections + products
    shared = L.Dense(6)
    assert macs(keras.Model(x, shared(shared(x)))) == 2 * 5 * 36
