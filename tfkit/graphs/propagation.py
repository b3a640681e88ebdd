"""Propagation: the product of a sparse matrix and a dense one, with the gradient of the dense one.

How was chosen by measurement. TensorFlow's coordinate kernel has a fast path below 32 columns and takes three to five
times as long a column beyond it, forward and backward. So narrow products use it as it is. Wide ones go through CSR,
conversion included 1.3 to 1.6 times faster than the same columns in blocks of 31; its transposed product is not, so
that the gradient takes the blocks. `gather` with `segment_sum` was slower than all of them but the plain wide kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import tensorflow as tf

from tfkit.internal import checks

#: The most columns of the coordinate kernel's fast path.
BLOCK = 31
CSR_COLUMNS = 48


def to_tensor(matrix: Any) -> Any:
    """Returns a `tf.SparseTensor` for a SciPy matrix, sorted by row, and a dense tensor for anything else."""
    if isinstance(matrix, (tf.SparseTensor, tf.Tensor)):
        return matrix
    if not sp.issparse(matrix):
        return tf.convert_to_tensor(np.asarray(matrix, "float32"))
    csr = sp.csr_array(matrix)
    csr.sort_indices()
    rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    indices = np.stack([rows, csr.indices], axis=1).astype(np.int64)
    return tf.SparseTensor(indices, csr.data.astype("float32"), csr.shape)


def is_sparse(matrix: Any) -> bool:
    """Whether it is a `tf.SparseTensor`, or the symbol of one."""
    return isinstance(matrix, tf.SparseTensor) or bool(getattr(matrix, "sparse", False))


def propagate(matrix: Any, x: tf.Tensor) -> tf.Tensor:
    """Returns matrix @ x. Gradients flow into `x`, and into `matrix` only where it is dense.

    Args:
        matrix: (rows, columns), a dense tensor or a `tf.SparseTensor` sorted by row.
        x: (columns, dimensions).
    """
    if not isinstance(matrix, tf.SparseTensor):
        return tf.matmul(matrix, x)
    indices, values, shape = matrix.indices, tf.cast(matrix.values, x.dtype), matrix.dense_shape

    @tf.custom_gradient
    def product(inner: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            return in_blocks(indices, values, shape, upstream, adjoint=True)

        return forward(indices, values, shape, inner), gradient

    found = product(x)
    found.set_shape((matrix.shape[0], x.shape[1]))
    return found


def propagate_weighted(indices: tf.Tensor, weights: tf.Tensor, shape: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns the product of the sparse matrix of these `weights` with `x`; gradients flow into both.

    Args:
        indices: (edges, 2), sorted by row.
        weights: (edges,).
        shape: of the matrix.
        x: (columns, dimensions).
    """

    @tf.custom_gradient
    def product(w: tf.Tensor, inner: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            ends = tf.gather(upstream, indices[:, 0]) * tf.gather(inner, indices[:, 1])
            return tf.reduce_sum(ends, axis=1), in_blocks(indices, w, shape, upstream, adjoint=True)

        return forward(indices, w, shape, inner), gradient

    return product(weights, x)


def forward(indices: tf.Tensor, values: tf.Tensor, shape: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """The product by the kernel that is the fastest for this width, without a gradient of its own."""
    if x.shape[1] is None or x.shape[1] < CSR_COLUMNS:
        return in_blocks(indices, values, shape, x)
    matrix = tf.raw_ops.SparseTensorToCSRSparseMatrix(indices=indices, values=values, dense_shape=shape)
    return tf.raw_ops.SparseMatrixMatMul(a=matrix, b=x)


def in_blocks(
    indices: tf.Tensor, values: tf.Tensor, shape: tf.Tensor, x: tf.Tensor, *, adjoint: bool = False
) -> tf.Tensor:
    """The product by the coordinate kernel, in blocks of nearly equal width that its fast path takes."""
    matrix = tf.SparseTensor(indices, values, shape)
    width = x.shape[1]
    if width is None or width <= BLOCK:
        return tf.sparse.sparse_dense_matmul(matrix, x, adjoint_a=adjoint)
    count = -(-width // BLOCK)
    sizes = [width // count + (i < width % count) for i in range(count)]
    parts = [tf.sparse.sparse_dense_matmul(matrix, part, adjoint_a=adjoint) for part in tf.split(x, sizes, axis=1)]
    return tf.concat(parts, axis=1)


def check_inputs(inputs: Any, *, least: int = 2) -> tuple[Any, ...]:
    """Returns the layer's inputs as a tuple, or raises with what they must be."""
    if not isinstance(inputs, (tuple, list)) or len(inputs) < least:
        raise checks.error("inputs", "(features, adjacency)", inputs, "Pass both in one tuple.")
    return tuple(inputs)
