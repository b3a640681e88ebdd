import keras
import numpy as np
import pytest

from tfkit.compression.lottery_ticket import LotteryTicket
from tfkit.compression.masking import pruning_masks
from tfkit.internal import surgery

X = np.random.default_rng(0).normal(size=(6, 10)).astype("float32")


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((10,)), keras.layers.Dense(20, activation="relu"), keras.layers.Dense(8)])


def train(model, callbacks):
    keras.utils.set_random_seed(1)
    model.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=True)  # Six steps are not worth a compilation.
    model.fit(X, np.ones((6, 8)), batch_size=3, epochs=3, verbose=0, callbacks=callbacks)


class Trainer:
    """Notes the effective weights before each training, and the weights after each step."""

    def __init__(self):
        self.before, self.biases, self.steps = [], [], []

    def __call__(self, model, callbacks):
        self.before.append(effective(model))
        self.biases.append([np.array(surgery.source(layer).bias) for layer in surgery.leaf_layers(model)])
        states = []
        note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: states.append(effective(model)))
        train(model, [*callbacks, note])
        self.steps.append(states)


def effective(model):
    found = []
    for layer in surgery.leaf_layers(model):
        weights = surgery.compressible_weights(surgery.source(layer))
        values = layer.effective_weights() if hasattr(layer, "effective_weights") else weights
        found += [np.array(values[name]) for name in weights]
    return found


def kernels(model):
    return [np.asarray(layer.kernel) for layer in surgery.leaf_layers(model)]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_tickets_are_the_first_weights_with_the_mask(scope):
    model, trainer = network(), Trainer()
    final = LotteryTicket(0.75, 2, scope=scope).apply(model, trainer)
    start = kernels(model)
    assert len(trainer.before) == 3
    for number, kept in enumerate([360, 180, 90]):  # Half of what is left, twice.
        ticket = trainer.before[number]
        assert sum(np.count_nonzero(t) for t in ticket) == kept
        for t, w in zip(ticket, start, strict=True):
            np.testing.assert_array_equal(t, np.where(t != 0, w, 0))
    assert not any(bias.any() for biases in trainer.biases for bias in biases)  # They are rewound too.
    # The survivors are the largest weights at the end of the training before.
    ends, ticket = trainer.steps[0][-1], trainer.before[1]
    if scope == "layer":
        for end, t in zip(ends, ticket, strict=True):
            assert np.abs(end[t == 0]).max() <= np.abs(end[t != 0]).min()
    for last, t in zip(kernels(final), trainer.before[2], strict=True):
        np.testing.assert_array_equal(last == 0, t == 0)
        assert np.mean(last[t != 0] != t[t != 0]) > 0.5  # Units may be dead.


@pytest.mark.parametrize(("rewind", "step"), [(0.5, 3), (10**6, 6), (None, 6)])
def test_rewinding_to_a_later_step_or_not_at_all(rewind, step):
    trainer = Trainer()
    LotteryTicket(0.5, 1, rewind=rewind).apply(network(), trainer)
    reached = trainer.steps[0][step - 1]
    for t, w in zip(trainer.before[1], reached, strict=True):
        np.testing.assert_array_equal(t, np.where(t != 0, w, 0))


def test_training_is_needed():
    with pytest.raises(ValueError, match="fit"):
        LotteryTicket().apply(network())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"sparsity": 1.0}, "share in"), ({"rounds": 0}, "rounds"), ({"rewind": -1}, "rewind"), ({"scope": "x"}, "scope")],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LotteryTicket(**arguments)


def test_without_its_rounds_a_model_is_pruned_with_a_warning():
    """A joint chain trains once, and `finalize` must not give a dense model back in silence."""
    ticket = LotteryTicket(0.75)
    prepared = ticket.prepare(network())
    train(prepared, ticket.callbacks())
    with pytest.warns(UserWarning, match="apply"):
        final = ticket.finalize(prepared)
    assert [int(np.sum(kernel == 0)) for kernel in kernels(final)] == [150, 120]
    assert all((np.array(masked.mask.mask) == 1).all() for masked in pruning_masks(prepared))
