"""Rounding errors: how far a computed number can be from the one that mathematics means.

A sum of n products computed in floating point with unit roundoff u, in whatever order, is within
gamma(n) * sum |a_i| |b_i| of the exact one, gamma(n) = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd edition, section 3.1). Two errors of this kind stand between a certificate and the truth.

The network's own. A network that runs in float32 computes W x + b + e with |e| <= gamma32 (|W| |x| + |b|). The bounds
treat e as one more perturbation, in a box around each node's output: a certificate for `arithmetic="float32"` then
holds for every order of summation, with or without fused multiply-add, and for inputs that were rounded to float32.
With `arithmetic="real"` it holds for the function that the weights define, which no machine computes exactly.

The computation of the bounds. A backward pass computes coefficients A' W with an error E, |E| <= gamma64 |A'| |W|. What
matters is E z for the values z that the node below can take, at most gamma64 |A'| (|W| max|z|): the same form, with
another unit. So each node gets one array `error`, the sum of both, and a row with coefficients A loses sum |A| error.
All that decides is computed in float64, whose unit is half a billion times smaller than that of float32.
"""

from __future__ import annotations

from tfkit.internal import checks

#: Unit roundoff of float64 and float32.
UNIT64 = 2.0**-53
UNIT32 = 2.0**-24
#: What a network is taken to compute in; the unit of its rounding errors. Those of int8 files are in their nodes. With
#: "ignored" there is no account at all: in training, where the bounds are a loss, not a certificate.
ARITHMETIC = {"real": 0.0, "float32": UNIT32, "int8": 0.0, "ignored": 0.0}
#: Errors of an elementary function, in units: those of TensorFlow's vectorized float32 functions are below 8.
FUNCTION_UNITS = 16
#: Errors of the same order as those accounted for, from computing the account itself, are met by counting double.
SAFETY = 2.0


def gamma(terms: int, unit: float) -> float:
    """The relative error of a sum of so many products, see Higham.

    >>> gamma(10, 0.0)
    0.0
    """
    return terms * unit / (1 - terms * unit)


def sum_error(terms: int, size: int, arithmetic: str) -> float:
    """The factor of |W| |z| + |b| in a node's `error`.

    Args:
        terms: products that the node sums up for one number.
        size: numbers of the node's output; a backward pass adds up so many.
        arithmetic: "real" or "float32", what the network computes in.
    """
    own = gamma(terms, ARITHMETIC[arithmetic]) if terms > 1 else terms * ARITHMETIC[arithmetic]
    return own + SAFETY * gamma(terms + size + 16, UNIT64)


def check_arithmetic(arithmetic: str) -> str:
    """Returns it if it is a known one."""
    return checks.choice("arithmetic", arithmetic, ("real", "float32"))
