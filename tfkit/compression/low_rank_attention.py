"""Attention by narrower heads: another plain attention layer, with smaller products inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfkit.compression.low_rank_factors import HeadFactors, Options
from tfkit.compression.low_rank_sites import Site, Split, as_array, attention_cost, is_gated


class AttentionSplit(Split):
    """Attention with narrower heads: a smaller `key_dim` and a smaller `value_dim`.

    Its scores are x M_h y' with M_h = [Wq; bq] [Wk; bk]', and its outputs mix x [Wv; bv] Wo, both of a rank that the
    narrower heads lower; the biases are a last row, for an input that is always 1.
    """

    method = "svd"

    def __init__(self, site: Site, grams: dict[str, np.ndarray] | None, ridge: float) -> None:
        self.layer = layer = site.layer
        grams = grams or {}
        self.query, self.key, self.value = (
            _heads(dense) for dense in (layer.query_dense, layer.key_dense, layer.value_dense)
        )
        output = as_array(layer.output_dense.kernel)
        self.output_shape = output.shape[2:]
        self.output = output.reshape(*output.shape[:2], -1).transpose(0, 2, 1)  # (heads, out, value_dim)
        self.scores = HeadFactors(self.query, self.key, grams.get("query"), grams.get("key"), ridge)
        self.mixed = HeadFactors(self.value, self.output, grams.get("value"), None, ridge)
        scores, mixed = self.scores.losses(), self.mixed.losses()
        first = np.arange(1, len(scores) + 1)
        # A gate multiplies the value's dimensions one by one, so they cannot be rotated.
        second = np.array([layer.value_dim]) if is_gated(layer) else np.arange(1, len(mixed) + 1)
        mixed = np.zeros(1) if is_gated(layer) else mixed
        ranks = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
        self.options = Options(ranks, ((scores[:, None] + mixed) / 2).ravel())
        self.parameters, self.multiply_adds = attention_cost(layer, site, ranks[:, 0], ranks[:, 1])

    def layers(self, ranks: Sequence[int]) -> tuple[list[keras.Layer], float]:
        layer, (key_dim, value_dim) = self.layer, (int(rank) for rank in ranks)
        query, key = self.scores.factors(key_dim)
        # Keras divides the scores by the root of their dimension, which is another one now.
        query = query * math.sqrt(key_dim / layer.key_dim)
        config = {**layer.get_config(), "key_dim": key_dim, "value_dim": value_dim, "kernel_constraint": None}
        new = type(layer).from_config(config)
        new.build_from_config(layer.get_build_config())
        rotated = [(new.query_dense, query), (new.key_dense, key)]
        if is_gated(layer):
            for name in ("value_dense", "output_dense", "_gate_dense"):
                getattr(new, name).set_weights(getattr(layer, name).get_weights())
            value, output = self.value, self.output
        else:
            value, output = self.mixed.factors(value_dim)
            rotated.append((new.value_dense, value))
            new.output_dense.kernel.assign(output.transpose(0, 2, 1).reshape(layer.num_heads, -1, *self.output_shape))
            if layer.use_bias:
                new.output_dense.bias.assign(layer.output_dense.bias)
        for dense, factor in rotated:
            rows = factor.transpose(1, 0, 2)  # (inputs and perhaps the bias, heads, dimension)
            dense.kernel.assign(rows[: dense.kernel.shape[0]])
            if layer.use_bias:
                dense.bias.assign(rows[-1])
        losses = [
            self.scores.losses()[key_dim - 1],
            0.0 if is_gated(layer) else self.mixed.losses()[value_dim - 1],
        ]
        return [new], math.sqrt(sum(losses) / 2)


def _heads(dense: Any) -> np.ndarray:
    """Returns a projection's kernel with its bias as a last row, (heads, inputs, dimension)."""
    kernel = as_array(dense.kernel).transpose(1, 0, 2)
    return kernel if dense.bias is None else np.concatenate([kernel, as_array(dense.bias)[:, None]], axis=1)
