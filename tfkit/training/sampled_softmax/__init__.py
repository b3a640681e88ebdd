"""Sampled softmax: the loss over many classes from a few of them, drawn by samplers from uniform to adaptive."""

from __future__ import annotations

from tfkit.training.sampled_softmax.base import Sampler, Samples
from tfkit.training.sampled_softmax.fixed import FixedSampler, LogUniformSampler, UniformSampler, UnigramSampler
from tfkit.training.sampled_softmax.kernel import KernelSampler
from tfkit.training.sampled_softmax.layer import SampledSoftmax
from tfkit.training.sampled_softmax.loss import in_batch_softmax, sampled_softmax_loss
from tfkit.training.sampled_softmax.rff import FourierSampler
from tfkit.training.sampled_softmax.softmax import SoftmaxSampler

__all__ = [
    "FixedSampler",
    "FourierSampler",
    "KernelSampler",
    "LogUniformSampler",
    "SampledSoftmax",
    "Sampler",
    "Samples",
    "SoftmaxSampler",
    "UniformSampler",
    "UnigramSampler",
    "in_batch_softmax",
    "sampled_softmax_loss",
]
