"""Random self-ensemble (RSE): noise before every convolution, in training and in use, and the mean of several draws.

Paper: Liu, Cheng, Zhang, Hsieh. Towards robust neural networks via random self-ensemble. ECCV 2018,
https://arxiv.org/abs/1712.00673, algorithm 1: the noise layers add normal noise of the deviation sigma_init before the
first convolution and sigma_inner before the others; the network is trained with it, and predicts by the mean of the
probabilities over n draws.

Differs: a network without convolutions gets its noise before the fully connected layers. The ensemble gives the
logarithm of the mean probabilities, which losses and attacks take as logits.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks, surgery

CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
#: Least probability whose logarithm is taken.
LEAST = 1e-12


@keras.saving.register_keras_serializable(package="tfkit")
class RandomNoise(keras.layers.Layer):
    """Adds normal noise, in training and in use, where `keras.layers.GaussianNoise` adds it in training only.

    It draws by `RandomStandardNormal`, which TFLite has: the exported layer is random too.

    Args:
        stddev: deviation of the noise, in units of the input.
        seed: of the noise; the draws of one compiled function repeat.
    """

    def __init__(self, stddev: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stddev = checks.number("stddev", stddev, 0)
        self.seed = None if seed is None else checks.integer("seed", seed, 0)
        # XLA draws by a generator of its own, which knows no seeds.
        self.supports_jit = False
        self.built = True

    def call(self, inputs: Any) -> Any:
        return inputs + self.stddev * tf.random.normal(tf.shape(inputs), dtype=inputs.dtype, seed=self.seed)

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "stddev": self.stddev, "seed": self.seed}


def with_noise(model: keras.Model, init_noise: float, inner_noise: float, seed: int | None = None) -> keras.Model:
    """Returns a copy of a model with a noise layer before every convolution.

    Args:
        model: functional or sequential, built. Its weights are copied.
        init_noise: deviation before the first convolution; inner_noise: before the others. 0: no layer.
        seed: of the first noise layer; the others count on from it.

    Raises:
        ValueError: the model has neither convolutions nor fully connected layers.
    """
    leaves = list(surgery.leaf_layers(model))
    kinds: Any = next(
        (k for k in (CONVOLUTIONS, keras.layers.Dense) if any(isinstance(leaf, k) for leaf in leaves)), None
    )
    if kinds is None:
        raise checks.error("model", "one with convolutions or fully connected layers", model)
    placed = 0

    def call(original: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal placed
        if not isinstance(original, kinds):
            return layer(*args, **kwargs)
        deviation = inner_noise if placed else init_noise
        noise = RandomNoise(deviation, None if seed is None else seed + placed, name=f"noise_{placed}")
        placed += 1
        inputs, *rest = args
        return layer(noise(inputs) if deviation else inputs, *rest, **kwargs)

    return surgery.rebuild(model, call=call)


@keras.saving.register_keras_serializable(package="tfkit")
class RandomSelfEnsemble(keras.Model):
    """A network with noise inside, that predicts by the mean of several draws.

    `compile` and `fit` it as any Keras model: training draws once for each example, prediction `samples` times.

    Args:
        model: functional or sequential, built, to logits or probabilities; copied. One that has `RandomNoise` layers
            already keeps them as they are.
        init_noise: deviation before the first convolution, in units of the input.
        inner_noise: deviation before the others.
        samples: draws a prediction.
        from_logits: whether the model gives logits; then the ensemble gives the logarithms of its mean
            probabilities, and else the mean probabilities.
        seed: of the noise.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        init_noise: float = 0.2,
        inner_noise: float = 0.1,
        samples: int = 10,
        from_logits: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.init_noise = checks.number("init_noise", init_noise, 0)
        self.inner_noise = checks.number("inner_noise", inner_noise, 0)
        self.samples = checks.integer("samples", samples, 1)
        self.from_logits = bool(from_logits)
        self.seed = seed
        noisy = any(isinstance(leaf, RandomNoise) for leaf in surgery.leaf_layers(model))
        self.model = model if noisy else with_noise(model, self.init_noise, self.inner_noise, seed)
        self.build(self.model.input_shape)

    def build(self, input_shape: Any) -> None:
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if training:
            return self.model(inputs, training=True)
        return self._ensemble(inputs, self.samples)

    def single(self, inputs: Any) -> Any:
        """Returns the prediction of one draw, as the network gives it."""
        return self.model(inputs, training=False)

    def deployed(self, samples: int | None = None) -> keras.Model:
        """Returns the ensemble as one plain model, to be saved or exported.

        Args:
            samples: draws a prediction; None: as many as here.

        Returns:
            A functional model that shares its weights with this one. `tfkit.export.convert` makes one file of it, which
            draws its own noise at each run.
        """
        count = self.samples if samples is None else checks.integer("samples", samples, 1)
        inputs = keras.Input(self.model.input_shape[1:], dtype=self.model.inputs[0].dtype, name="image")
        return keras.Model(inputs, self._ensemble(inputs, count), name=f"{self.model.name}_ensemble")

    def _ensemble(self, inputs: Any, samples: int) -> Any:
        drawn = self.model(keras.ops.repeat(inputs, samples, axis=0), training=False)
        probabilities = keras.ops.softmax(drawn, axis=-1) if self.from_logits else drawn
        # (batch * samples, classes) -> (batch, samples, classes): the draws of an example lie together.
        mean = keras.ops.mean(keras.ops.reshape(probabilities, (-1, samples, drawn.shape[-1])), axis=1)
        return keras.ops.log(keras.ops.maximum(mean, LEAST)) if self.from_logits else mean

    def get_config(self) -> dict[str, Any]:
        names = ("init_noise", "inner_noise", "samples", "from_logits", "seed")
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RandomSelfEnsemble:
        return cls(**{**config, "model": keras.saving.deserialize_keras_object(config["model"])})
