"""RAIS: importance sampling from what earlier steps have told, robust to what they have not.

Paper: Johnson, Guestrin. Training deep models faster with robust, approximate importance sampling. NeurIPS 2018,
https://papers.nips.cc/paper/7957-training-deep-models-faster-with-robust-approximate-importance-sampling. The gradient
norms v of all examples are taken to lie in the ellipsoid mean_i (v_i - <c, s_i>)^2 / <d, s_i> <= 1 over features s_i
of their history; of all distributions the one with the least worst case is p_i ~ <c, s_i> + k <d, s_i>. The ellipsoid
is the smallest that holds what was seen. SGD then takes steps r times as long and counts each r times in its schedule,
with the gain ratio r = E |g_uniform|^2 / E |g_sampled|^2.

Differs: features are the mean norm, an example's last norm, the average of its norms, and the mean norm times the share
of an epoch since it was seen. Gradient norms, and the moments of the gain ratio with them, are those at the last
layer's pre-activations, the paper's own substitute. The ellipsoid is learned between epochs, not beside them, and r is
at least 1.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy import optimize

from tfkit.internal import checks
from tfkit.training import sampling
from tfkit.training.wrapper import Wrapper, mean_reduction

FEATURES = 4


def smallest_ellipsoid(s: np.ndarray, v: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Learns the uncertainty set: the least sum_i <d, s_i> with mean_i w_i (v_i - <c, s_i>)^2 / <d, s_i> <= 1.

    The problem, with c and d at least 0, is convex, and its constraint holds with equality. Scaling d trades the one
    side for the other, so their product is minimised, by L-BFGS-B, and d is scaled at the end.

    Args:
        s: features of what was seen, (seen, features), at least 0.
        v: the norms that were seen, (seen,).
        w: weights 1 / (n p) with which they stand for all examples, (seen,).

    Returns:
        c and d, (features,).
    """
    unit = np.maximum(s.mean(axis=0), 1e-12)
    level = max(float(np.mean(w * v)), 1e-12)
    s, v = s / unit, v / level
    mean = np.average(s, axis=0, weights=w)
    size = s.shape[1]

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        c, d = z[:size], z[size:]
        off, spread = s @ c - v, s @ d + 1e-12
        misfit = np.mean(w * off**2 / spread) + 1e-12
        slope_c = (w * 2 * off / spread) @ s / len(v) / misfit
        slope_d = mean / (mean @ d) - (w * off**2 / spread**2) @ s / len(v) / misfit
        return float(np.log(misfit) + np.log(mean @ d)), np.concatenate([slope_c, slope_d])

    start = np.concatenate([optimize.nnls(np.sqrt(w)[:, None] * s, np.sqrt(w) * v)[0], np.ones(size)])
    bounds = [(0, None)] * size + [(1e-6, None)] * size
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    c, d = found[:size], found[size:]
    d = d * np.mean(w * (s @ c - v) ** 2 / (s @ d + 1e-12))
    return c * level / unit, d * level**2 / unit


def robust_probabilities(s: Any, c: Any, d: Any) -> Any:
    """Returns the sampling distribution with the least worst case over the ellipsoid, (examples,).

    p_i ~ <c, s_i> + k <d, s_i>, where k = sqrt(n / sum_i <d, s_i>) puts the worst case on the ellipsoid's surface.

    >>> s = tf.constant([[1.0], [3.0]])
    >>> robust_probabilities(s, tf.constant([1.0]), tf.constant([0.0])).numpy()
    array([0.25, 0.75], dtype=float32)
    """
    middle, spread = tf.linalg.matvec(s, c), tf.linalg.matvec(s, d)
    total = tf.reduce_sum(spread)
    count = tf.cast(tf.shape(s)[0], s.dtype)
    k = tf.where(total > 0, tf.sqrt(count / tf.where(total > 0, total, 1.0)), 0.0)
    return sampling.probabilities(middle + k * spread)


@keras.saving.register_keras_serializable(package="tfkit")
class GainSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The gain ratio times a schedule at the effective step; made by `RAIS.schedule`.

    Args:
        base: a number or a schedule.
        gain, effective: the variables of the wrapper; without them the base alone.
    """

    def __init__(self, base: Any, gain: Any = None, effective: Any = None) -> None:
        super().__init__()
        self.base, self.gain, self.effective = base, gain, effective

    def __call__(self, step: Any) -> Any:
        if self.effective is not None:
            step = self.effective
        rate = self.base(step) if callable(self.base) else tf.constant(self.base, tf.float32)
        return rate if self.gain is None else rate * tf.convert_to_tensor(self.gain)

    def get_config(self) -> dict[str, Any]:
        base = keras.saving.serialize_keras_object(self.base) if callable(self.base) else self.base
        return {"base": base}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GainSchedule:
        base = config["base"]
        return cls(keras.saving.deserialize_keras_object(base) if isinstance(base, dict) else base)


@keras.saving.register_keras_serializable(package="tfkit")
class RAIS(Wrapper):
    """Wraps a model so that `fit(x, y)` samples robustly, and in fewer steps comes as far as with uniform sampling.

    `fit` counts epochs as uniform sampling would need them, and stops when the effective steps have reached their
    number; `effective_epochs` says how far a real epoch came.

    Args:
        model: the model to train, with one output.
        forget: share of the newest step in the moving averages of the gain ratio's moments.
        history: share of the newest norm in the average of an example's norms.
        oracle: sample by the exact scores of all examples, computed anew before each step (O-SGD): as slow as it is
            good, for comparison.
        seed: of the draws.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> rais = RAIS(model)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> rais.compile(keras.optimizers.SGD(rais.schedule(0.1)), loss)
    >>> history = rais.fit(np.ones((64, 2), "float32"), np.arange(64) % 3, batch_size=8, epochs=2, verbose=0)
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        forget: float = 0.02,
        history: float = 0.5,
        oracle: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.forget = checks.number("forget", forget, 0, 1)
        self.history_share = checks.number("history", history, 0, 1)
        self.oracle = bool(oracle)
        self.seed = checks.integer("seed", seed, 0)
        self._gain = self.add_weight(name="gain", initializer="ones", trainable=False)
        self._effective = self.add_weight(name="effective_steps", initializer="zeros", trainable=False)
        # Of the gain ratio: E|g_U1|^2, E|g_R1|^2, E|g_R|^2, and the mean norm; then c and d.
        self._moments = self.add_weight(shape=(4,), name="moments", initializer="zeros", trainable=False)
        self._ellipsoid = self.add_weight(shape=(2, FEATURES), name="ellipsoid", initializer="zeros", trainable=False)
        self._state: dict[str, tf.Variable] = {}

    def schedule(self, base: Any) -> GainSchedule:
        """Returns the learning rate for the optimizer: the gain ratio times `base` (a number or a schedule)."""
        return GainSchedule(base, self._gain, self._effective)

    def compile(self, *arguments: Any, **keywords: Any) -> None:
        """As `keras.Model.compile`; the loss must be one mean over examples, which is Keras' default."""
        super().compile(*arguments, **keywords)
        if isinstance(self.loss, (list, tuple, dict)) or not mean_reduction(self.loss):
            raise checks.error("loss", "one loss with reduction='sum_over_batch_size'", self.loss)

    @property
    def gain(self) -> float:
        """The gain ratio r."""
        return float(self._gain)

    @property
    def effective_steps(self) -> float:
        """The steps that uniform sampling would have taken."""
        return float(self._effective)

    def fit(  # type: ignore[override]
        self, x: Any, y: Any, batch_size: int = 32, epochs: int = 1, callbacks: Any = (), **keywords: Any
    ) -> keras.callbacks.History:
        """Trains on arrays until the effective steps are those of `epochs` epochs; see `keras.Model.fit`."""
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError("RAIS keeps what it knows of all examples on one device. Train outside of a strategy.")
        checks.integer("batch_size", batch_size, 1, len(x))
        steps = len(x) // batch_size
        # Resource variables, not weights: they belong to the data, not to the model that is saved.
        self._state = {
            "x": tf.convert_to_tensor(x),
            "y": tf.convert_to_tensor(y),
            "features": tf.Variable(tf.zeros((len(x), 2)), name="norms"),
            "seen": tf.Variable(tf.fill((len(x),), -1.0), name="seen"),
            "s": tf.Variable(tf.zeros((steps * batch_size, FEATURES)), name="seen_features"),
            "v": tf.Variable(tf.zeros((steps * batch_size,)), name="seen_norms"),
            "w": tf.Variable(tf.zeros((steps * batch_size,)), name="seen_weights"),
        }
        self._effective.assign(0.0)
        self._batch = batch_size
        self.make_train_function(force=True)
        watch = _Watch(steps, epochs * steps)
        data = tf.data.Dataset.range(steps)
        return super().fit(data, epochs=epochs, callbacks=[watch, *callbacks], shuffle=False, **keywords)

    def features(self, step: Any) -> Any:
        """Returns the features of all examples, (examples, 4)."""
        state = self._state
        level, per_epoch = self._moments[3], tf.cast(len(state["x"]) / self._batch, tf.float32)
        known = state["seen"] >= 0
        age = tf.minimum((step - state["seen"]) / per_epoch, 1.0)
        norms = tf.where(known[:, None], state["features"], level)
        mean = tf.fill((len(state["x"]),), level)
        return tf.stack([mean, norms[:, 0], norms[:, 1], level * tf.where(known, age, 1.0)], axis=1)

    def train_step(self, data: Any) -> dict[str, Any]:
        state, step = self._state, tf.cast(self.optimizer.iterations, tf.float32)
        s = self.features(step)
        if self.oracle:
            p = sampling.probabilities(sampling.scores_of(self.model, self.loss, state["x"], state["y"])[0], 0.01)
        else:
            p = robust_probabilities(s, self._ellipsoid[0], self._ellipsoid[1])  # uniform until it is learned
        draw = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        indices = sampling.resample(p, self._batch, draw)
        weights = sampling.importance_weights(p, indices)
        x, y = tf.gather(state["x"], indices), tf.gather(state["y"], indices)
        with tf.GradientTape() as tape:
            with sampling.without_activation(self.model) as activation:
                z = self.model(x, training=True)
            predicted = activation(z)
            loss = self.compute_loss(x, y, predicted, weights, training=True)
        by_z, *gradients = tape.gradient(loss, [z, *self.trainable_weights], unconnected_gradients="zero")
        self._loss_tracker.update_state(loss, sample_weight=tf.cast(self._batch, tf.float32))
        by_z = tf.reshape(by_z, (self._batch, -1))
        norms = tf.norm(by_z, axis=1) * self._batch / weights
        self._remember(step, indices, norms, weights, tf.gather(s, indices))
        self._measure_gain(norms, weights, tf.reduce_sum(tf.square(tf.reduce_sum(by_z, axis=0))))
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self._effective.assign(self._effective + self._gain)
        self.compute_metrics(x, y, predicted, sample_weight=weights)
        return self.get_metrics_result()

    def _remember(self, step: Any, indices: Any, norms: Any, weights: Any, s: Any) -> None:
        """Keeps the norms of examples, and the last epoch's norms with the features from which to predict them."""
        state = self._state
        at = indices[:, None]
        old = tf.where(tf.gather(state["seen"], indices) >= 0, tf.gather(state["features"][:, 1], indices), norms)
        average = self.history_share * norms + (1 - self.history_share) * old
        state["features"].scatter_nd_update(at, tf.stack([norms, average], axis=1))
        state["seen"].scatter_nd_update(at, tf.fill((self._batch,), step))
        rows = state["v"].shape[0] // self._batch
        place = (tf.cast(step, tf.int32) % rows) * self._batch + tf.range(self._batch)
        for name, value in (("s", s), ("v", norms), ("w", weights)):
            state[name].scatter_nd_update(place[:, None], value)

    def _measure_gain(self, norms: Any, weights: Any, squared: Any) -> None:
        """r = 1 + (E |g_U1|^2 - E |g_R1|^2) / (|M| E |g_R|^2), each moment a moving average."""
        one_uniform = tf.reduce_mean(weights * tf.square(norms))
        one_sampled = tf.reduce_mean(tf.square(weights * norms))
        now = tf.stack([one_uniform, one_sampled, squared, tf.reduce_mean(weights * norms)])
        share = tf.where(self._effective < 0.5, 1.0, self.forget)
        moments = share * now + (1 - share) * self._moments
        self._moments.assign(moments)
        gain = 1 + (moments[0] - moments[1]) / (self._batch * tf.maximum(moments[2], 1e-30))
        known = tf.reduce_sum(self._ellipsoid) > 0
        self._gain.assign(tf.where(tf.logical_or(known, self.oracle), tf.maximum(gain, 1.0), 1.0))

    def learn_ellipsoid(self) -> None:
        """Learns c and d from the norms of the last epoch."""
        kept = self._state["w"].numpy() > 0
        s, v, w = (self._state[name].numpy()[kept].astype(np.float64) for name in ("s", "v", "w"))
        if len(v) > FEATURES and v.max() > 0:
            self._ellipsoid.assign(np.stack(smallest_ellipsoid(s, v, w)))

    def get_config(self) -> dict[str, Any]:
        names = {"forget": self.forget, "history": self.history_share, "oracle": self.oracle, "seed": self.seed}
        return {**super().get_config(), **names}


class _Watch(keras.callbacks.Callback):
    """Learns the ellipsoid after each epoch, and ends training when the effective steps are done."""

    def __init__(self, steps: int, total: int) -> None:
        super().__init__()
        self.steps, self.total = steps, total

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.model.effective_steps >= self.total:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.learn_ellipsoid()
        if logs is not None:
            logs["effective_epochs"] = self.model.effective_steps / self.steps
            logs["gain"] = self.model.gain
