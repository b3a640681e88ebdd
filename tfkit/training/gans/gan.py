"""GAN: a generator and a discriminator trained against each other, with any of eight objectives.

Paper: Goodfellow et al. Generative adversarial nets. NIPS 2014, https://arxiv.org/abs/1406.2661, and the papers that
`tfkit.training.gans.objectives` names. Two learning rates: Heusel et al., https://arxiv.org/abs/1706.08500.

Differs: the discriminator scores real and generated examples in one batch. `fit` takes the real examples of all the
discriminator's steps as one batch, so that each step has examples of its own.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.training.distribute.keras_mend import assign_all
from tfkit.training.gans.objectives import OBJECTIVES, gradient_penalty
from tfkit.training.wrapper import batch_size


@keras.saving.register_keras_serializable(package="tfkit")
class GAN(keras.Model):
    """Trains a generator against a discriminator in `fit`.

    Args:
        generator: noise (batch, latent) to examples; [noise, labels (batch,)] if `classes` are given.
        discriminator: examples to scores (batch, 1) without an activation; [examples, labels] if `classes` are given.
        objective: one of `OBJECTIVES`: "minimax", "non_saturating", "lsgan", "wgan", "wgan_gp", "hinge", "r1",
            "relativistic". For "hinge", give the discriminator spectral normalisation (`spectral=True` of `networks`).
        classes: number of labels of a conditional GAN; 0: unconditional. `fit` then needs labels.
        discriminator_steps: for each step of the generator; None: the objective's own.
        penalty_weight: of the gradient penalty; None: the objective's own.
        ema: decay of the moving average of the generator's weights, in [0, 1); 0: none.
        seed: of the noise.

    >>> from tfkit.training.gans import networks
    >>> gan = GAN(networks.mlp_generator(2, latent=4), networks.mlp_discriminator(2), "lsgan")
    >>> gan.compile()
    >>> history = gan.fit(np.zeros((32, 2), "float32"), batch_size=16, verbose=0)
    >>> gan.generate(5).shape
    (5, 2)
    """

    def __init__(
        self,
        generator: keras.Model,
        discriminator: keras.Model,
        objective: str = "non_saturating",
        *,
        classes: int = 0,
        discriminator_steps: int | None = None,
        penalty_weight: float | None = None,
        ema: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.objective = checks.choice("objective", objective, OBJECTIVES)
        self.losses_of = OBJECTIVES[objective]
        self.classes = checks.integer("classes", classes, 0)
        own = self.losses_of.discriminator_steps if discriminator_steps is None else discriminator_steps
        self.discriminator_steps = checks.integer("discriminator_steps", own, 1)
        weight = self.losses_of.weight if penalty_weight is None else penalty_weight
        self.penalty_weight = checks.number("penalty_weight", weight, 0)
        self.ema = checks.number("ema", ema, 0, 1, open_high=True)
        self.seed = checks.integer("seed", seed, 0)
        wanted = 2 if classes else 1
        for name, network in (("generator", generator), ("discriminator", discriminator)):
            if len(network.inputs) != wanted:
                rule = f"a model with {wanted} input{'s' * (wanted > 1)} when classes={classes}"
                raise checks.error(name, rule, len(network.inputs))
        if getattr(discriminator.layers[-1], "activation", None) not in (None, keras.activations.linear):
            raise checks.error("discriminator", "a model to scores, without a last activation", discriminator.name)
        self.generator = generator
        self.discriminator = discriminator
        self.averaged = keras.models.clone_model(generator) if self.ema else generator
        if self.ema:
            self.averaged.set_weights(generator.get_weights())
            self.averaged.trainable = False
        self.latent = int(generator.inputs[0].shape[-1])
        self._d_loss = keras.metrics.Mean(name="d_loss")
        self._g_loss = keras.metrics.Mean(name="g_loss")
        self.built = True

    def compile(  # type: ignore[override]
        self,
        generator_optimizer: keras.optimizers.Optimizer | None = None,
        discriminator_optimizer: keras.optimizers.Optimizer | None = None,
        **keywords: Any,
    ) -> None:
        """Sets the two optimizers; by default Adam with beta_1 = 0.5, at 1e-4 and, for the discriminator, 4e-4."""
        super().compile(optimizer=generator_optimizer or keras.optimizers.Adam(1e-4, beta_1=0.5), **keywords)
        self.discriminator_optimizer = discriminator_optimizer or keras.optimizers.Adam(4e-4, beta_1=0.5)
        self.optimizer.build(self.generator.trainable_variables)
        self.discriminator_optimizer.build(self.discriminator.trainable_variables)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return [self._d_loss, self._g_loss]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.averaged(inputs, training=training)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, labels, _ = keras.utils.unpack_x_y_sample_weight(data)
        x = tf.cast(x, self.compute_dtype)
        if self.classes and labels is None:
            raise checks.error("y", "labels, since the GAN is conditional", None)
        size = tf.maximum(batch_size(x) // self.discriminator_steps, 1)
        for step in range(self.discriminator_steps):
            part = slice(step * size, (step + 1) * size)
            self._d_loss.update_state(self._discriminator_step(x[part], self._labels(labels, part), step))
        part = slice(0, size)
        self._g_loss.update_state(self._generator_step(x[part], self._labels(labels, part)))
        if self.ema:
            old, new = self.averaged.variables, self.generator.variables
            pairs = [pair for pair in zip(old, new, strict=True) if "float" in pair[0].dtype]
            mixed = [self.ema * tf.convert_to_tensor(a) + (1 - self.ema) * tf.convert_to_tensor(b) for a, b in pairs]
            assign_all([a.value for a, _ in pairs], mixed)
        return self.get_metrics_result()

    def _labels(self, labels: Any, part: slice) -> Any:
        return tf.reshape(tf.cast(labels[part], tf.int32), (-1,)) if self.classes else None

    def noise(self, count: Any, draw: int) -> Any:
        """The noise of one draw of the current step, (count, latent)."""
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group if context is not None else 0
        step = tf.cast(self.optimizer._iterations.value, tf.int32) * (self.discriminator_steps + 1) + draw
        seed = tf.stack([self.seed + 7919 * replica, step])
        return tf.random.stateless_normal((count, self.latent), seed, dtype=self.compute_dtype)

    def _made(self, count: Any, labels: Any, draw: int) -> Any:
        noise = self.noise(count, draw)
        return self.generator([noise, labels] if self.classes else noise, training=True)

    def _score(self, x: Any, labels: Any) -> Any:
        return self.discriminator([x, labels] if self.classes else x, training=True)

    def _both(self, real: Any, fake: Any, labels: Any) -> tuple[Any, Any]:
        twice = tf.concat([labels, labels], axis=0) if self.classes else None
        scores = self._score(tf.concat([real, fake], axis=0), twice)
        count = tf.shape(real)[0]
        return scores[:count], scores[count:]

    def _discriminator_step(self, real: Any, labels: Any, draw: int) -> Any:
        fake = tf.stop_gradient(self._made(tf.shape(real)[0], labels, draw))
        weights = self.discriminator.trainable_variables
        kind = self.losses_of.penalty
        with tf.GradientTape() as tape:
            loss = self.losses_of.discriminator(*self._both(real, fake, labels))
            if kind and self.penalty_weight:
                points = real
                if kind == "wgan_gp":
                    shape = tf.concat([tf.shape(real)[:1], tf.ones(tf.rank(real) - 1, tf.int32)], axis=0)
                    step = tf.cast(self.discriminator_optimizer._iterations.value, tf.int32)
                    share = tf.random.stateless_uniform(shape, [self.seed + 1, step], dtype=real.dtype)
                    points = share * real + (1 - share) * fake
                penalty = gradient_penalty(lambda at: self._score(at, labels), points, kind)
                loss += self.penalty_weight * penalty
        gradients = tape.gradient(loss, weights)
        self.discriminator_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        if self.losses_of.clip:
            bound = self.losses_of.clip
            clipped = [tf.clip_by_value(tf.convert_to_tensor(weight), -bound, bound) for weight in weights]
            assign_all([weight.value for weight in weights], clipped)
        return loss

    def _generator_step(self, real: Any, labels: Any) -> Any:
        weights = self.generator.trainable_variables
        with tf.GradientTape() as tape:
            fake = self._made(tf.shape(real)[0], labels, self.discriminator_steps)
            if self.losses_of.uses_real:
                of_real, of_fake = self._both(real, fake, labels)
            else:
                of_real, of_fake = None, self._score(fake, labels)
            loss = self.losses_of.generator(of_real, of_fake)
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    def generate(
        self, count: int, labels: Any = None, *, seed: int = 0, averaged: bool = True, batch: int = 500
    ) -> np.ndarray:
        """Returns generated examples, (count, ...).

        Args:
            count: how many.
            labels: (count,) of a conditional GAN; None: all classes in turn.
            seed: of the noise.
            averaged: whether the averaged generator makes them, if there is one.
            batch: how many to make at a time.
        """
        checks.integer("count", count, 1)
        noise = np.random.default_rng(seed).normal(size=(count, self.latent)).astype("float32")
        inputs: Any = noise
        if self.classes:
            labels = np.arange(count) % self.classes if labels is None else np.asarray(labels)
            if labels.shape != (count,):
                raise checks.error("labels", f"of shape ({count},)", labels)
            inputs = [noise, labels.astype("int32")]
        return (self.averaged if averaged else self.generator).predict(inputs, batch_size=batch, verbose=0)

    def get_config(self) -> dict[str, Any]:
        names = ("objective", "classes", "discriminator_steps", "penalty_weight", "ema", "seed")
        networks = {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in
                    ("generator", "discriminator")}  # fmt: skip
        return {**super().get_config(), **networks, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GAN:
        made = {name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
                for name in ("generator", "discriminator")}  # fmt: skip
        return cls(**{**config, **made})

    def get_compile_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "generator_optimizer": serialize(self.optimizer),
            "discriminator_optimizer": serialize(self.discriminator_optimizer),
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**{name: keras.saving.deserialize_keras_object(each) for name, each in config.items()})
