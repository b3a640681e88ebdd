"""Which layers TFLite computes in integers, and what their kernels ask of weights and of tensors."""

from __future__ import annotations

import keras

#: Their integer kernels take one scale for the whole weight only.
PER_TENSOR = (keras.layers.EinsumDense, keras.layers.Conv2DTranspose)
WEIGHTED = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    *PER_TENSOR,
)
#: Move or select values: their output lies on the grid of their input.
SAME_GRID = {
    "MaxPooling1D", "MaxPooling2D", "GlobalMaxPooling1D", "GlobalMaxPooling2D", "Flatten", "Reshape", "Permute",
    "ZeroPadding1D", "ZeroPadding2D", "Cropping1D", "Cropping2D", "RepeatVector", "Identity", "Dropout",
    "SpatialDropout1D", "SpatialDropout2D", "Transpose", "Squeeze", "ExpandDims", "ActivityRegularization",
}  # fmt: skip


def has_channel_scales(layer: keras.Layer, bits: int) -> bool:
    """Whether a file can hold one scale for each output channel of a kernel with integers of this width.

    The converter is told them for 2-D convolutions; for other layers it takes max|w| / 127, the 8-bit grid.
    """
    if isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)):
        return True
    return bits == 8 and not isinstance(layer, PER_TENSOR)
