"""A row for each public class. A class without one fails the tests, and so does a row without a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from tfkit import compression, graphs, recommenders
from tfkit.compression import fake_quantize, low_precision, pruning, relaxed_quantization
from tfkit.robustness import attacks, defenses


class Row(NamedTuple):
    """How to make an object for the tests, and which promises it gives.

    Attributes:
        make: makes an object.
        exports: for a compressor, the `quantization` with which its result is exported.
    """

    make: Callable[[], Any]
    exports: str = "float32"


#: Public modules, whose `__all__` is the public interface.
MODULES = (
    "tfkit.compression",
    "tfkit.data",
    "tfkit.export",
    "tfkit.graphs",
    "tfkit.graphs.embeddings",
    "tfkit.models",
    "tfkit.recommenders",
    "tfkit.robustness.attacks",
    "tfkit.robustness.defenses",
    "tfkit.robustness.poisoning",
)

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

COMPRESSORS: dict[str, Row] = {
    "tfkit.compression.MagnitudePruning": Row(lambda: compression.MagnitudePruning(0.5, frequency=1)),
    "tfkit.compression.BlockPruning": Row(lambda: compression.BlockPruning(0.5, frequency=1)),
    "tfkit.compression.NMPruning": Row(lambda: compression.NMPruning(1, 2, frequency=1)),
    "tfkit.compression.RigL": Row(lambda: compression.RigL(0.5, frequency=1, seed=3)),
    "tfkit.compression.MovementPruning": Row(lambda: compression.MovementPruning(0.5, frequency=1)),
    "tfkit.compression.SaliencyPruning": Row(
        lambda: compression.SaliencyPruning(0.5, "hessian", data=(example((8, 8, 8, 1)), np.arange(8) % 4), loss=LOSS)
    ),
    "tfkit.compression.LotteryTicket": Row(lambda: compression.LotteryTicket(0.5, 1)),
    "tfkit.compression.WeightClustering": Row(lambda: compression.WeightClustering(3, initialization="random", seed=3)),
    "tfkit.compression.QuantizationAware": Row(compression.QuantizationAware, exports="int8-qat"),
    "tfkit.compression.LowRank": Row(lambda: compression.LowRank(budget=0.6)),
    "tfkit.compression.QuantizedNeuralNetwork": Row(compression.QuantizedNeuralNetwork, exports="int8-qat"),
    "tfkit.compression.RelaxedQuantization": Row(compression.RelaxedQuantization, exports="int8-qat"),
    "tfkit.compression.DeepCompression": Row(lambda: compression.DeepCompression(0.5, 3)),
    "tfkit.compression.StructuredPruning": Row(lambda: compression.StructuredPruning(0.5)),
    "tfkit.compression.ProxQuant": Row(lambda: compression.ProxQuant(2, regularizer="l2")),
    "tfkit.compression.BinaryConnect": Row(compression.BinaryConnect),
    "tfkit.compression.AdaptiveQuantization": Row(lambda: compression.AdaptiveQuantization(10.0, end=1.0)),
    "tfkit.compression.PostTrainingQuantization": Row(
        lambda: compression.PostTrainingQuantization(example((20, 8, 8, 1)), calibration="mse", weight_scale="mse"),
        exports="int8-qat",
    ),
    "tfkit.compression.Chain": Row(
        lambda: compression.Chain([compression.DeepCompression(0.6, 4), compression.QuantizationAware()]),
        exports="int8-qat",
    ),
}

#: Keras objects: configuration and weights make a round trip.
LAYERS: dict[str, Row] = {
    "tfkit.compression.Reparameterized": Row(
        lambda: compression.Reparameterized(_built(keras.layers.Dense(3)), {"kernel": [pruning.PruningMask(0.5)]})
    ),
    "tfkit.compression.ShiftBatchNormalization": Row(compression.ShiftBatchNormalization),
    "tfkit.compression.low_precision.LowPrecisionActivation": Row(
        lambda: low_precision.LowPrecisionActivation(2, limit=2.0, unit=0.5)
    ),
    "tfkit.compression.low_precision.IntegerSign": Row(low_precision.IntegerSign),
    "tfkit.compression.relaxed_quantization.RelaxedQuantizeActivation": Row(
        lambda: relaxed_quantization.RelaxedQuantizeActivation(4, noise=0.2)
    ),
    "tfkit.robustness.defenses.BitDepthReduction": Row(lambda: defenses.BitDepthReduction(2, straight_through=True)),
    # With noise, no two calls agree.
    "tfkit.robustness.defenses.RandomNoise": Row(lambda: defenses.RandomNoise(0.0, seed=1)),
    "tfkit.compression.fake_quantize.FakeQuantize": Row(lambda: fake_quantize.FakeQuantize(minimum=-1.0, maximum=2.0)),
    "tfkit.graphs.FeatureDropout": Row(lambda: graphs.FeatureDropout(0.3, seed=1)),
    "tfkit.graphs.PairNorm": Row(lambda: graphs.PairNorm(0.5, individually=True)),
}

#: Attacks, small enough for a linear model of 24 inputs.
ATTACKS: dict[str, Row] = {
    "tfkit.robustness.attacks.AutoPGD": Row(lambda: attacks.AutoPGD(6, seed=1)),
    "tfkit.robustness.attacks.Boundary": Row(lambda: attacks.Boundary(max_queries=200, seed=1)),
    "tfkit.robustness.attacks.CarliniWagnerL0": Row(lambda: attacks.CarliniWagnerL0(iterations=20, seed=1)),
    "tfkit.robustness.attacks.CarliniWagnerL2": Row(lambda: attacks.CarliniWagnerL2(3, iterations=20, seed=1)),
    "tfkit.robustness.attacks.CarliniWagnerLinf": Row(lambda: attacks.CarliniWagnerLinf(iterations=20, seed=1)),
    "tfkit.robustness.attacks.DeepFool": Row(lambda: attacks.DeepFool(seed=1)),
    "tfkit.robustness.attacks.Ensemble": Row(lambda: attacks.Ensemble([attacks.FGSM(), attacks.PGD(3)])),
    "tfkit.robustness.attacks.FGSM": Row(attacks.FGSM),
    "tfkit.robustness.attacks.HopSkipJump": Row(lambda: attacks.HopSkipJump(max_queries=200, seed=1)),
    "tfkit.robustness.attacks.MomentumIterative": Row(lambda: attacks.MomentumIterative(seed=1)),
    "tfkit.robustness.attacks.NES": Row(lambda: attacks.NES(max_queries=200, seed=1)),
    "tfkit.robustness.attacks.OPTAttack": Row(lambda: attacks.OPTAttack(max_queries=200, seed=1)),
    "tfkit.robustness.attacks.PGD": Row(lambda: attacks.PGD(5, restarts=2, seed=1)),
    "tfkit.robustness.attacks.SignOPT": Row(lambda: attacks.SignOPT(max_queries=200, seed=1)),
    "tfkit.robustness.attacks.Square": Row(lambda: attacks.Square(max_queries=200, seed=1)),
    "tfkit.robustness.attacks.Transfer": Row(lambda: attacks.Transfer(linear, attacks.PGD(5, seed=1))),
    "tfkit.robustness.attacks.VideoPGD": Row(lambda: attacks.VideoPGD("shared", 2, steps=5, seed=1)),
    "tfkit.robustness.attacks.ZOO": Row(lambda: attacks.ZOO(coordinates=8, max_queries=200, seed=1)),
}

#: Recommenders, with settings that are not their defaults.
RECOMMENDERS: dict[str, Row] = {
    "tfkit.recommenders.BERT4Rec": Row(lambda: recommenders.BERT4Rec(8, 6, 1, loss="softmax", epochs=1)),
    "tfkit.recommenders.BPR": Row(lambda: recommenders.BPR(4, epochs=2, negatives="dynamic", candidates=3)),
    "tfkit.recommenders.BiasedMF": Row(lambda: recommenders.BiasedMF(4, epochs=2, decay=0.9)),
    "tfkit.recommenders.DLRM": Row(lambda: recommenders.DLRM(4, (8,), (8, 4), epochs=1)),
    "tfkit.recommenders.DeepCross": Row(lambda: recommenders.DeepCross(4, hidden=(8,), rank=2, epochs=1)),
    "tfkit.recommenders.EASE": Row(lambda: recommenders.EASE(20.0)),
    "tfkit.recommenders.GRU4Rec": Row(lambda: recommenders.GRU4Rec(8, 6, 1, epochs=1)),
    "tfkit.recommenders.IALS": Row(lambda: recommenders.IALS(4, formulation="hu", epochs=2, solver_steps=None)),
    "tfkit.recommenders.ItemKNN": Row(lambda: recommenders.ItemKNN(5, 2.0)),
    "tfkit.recommenders.NeuMF": Row(lambda: recommenders.NeuMF(4, (8,), "mlp", epochs=1)),
    "tfkit.recommenders.Popularity": Row(recommenders.Popularity),
    "tfkit.recommenders.RatingALS": Row(lambda: recommenders.RatingALS(4, penalty=0.2, epochs=2)),
    "tfkit.recommenders.SASRec": Row(lambda: recommenders.SASRec(8, 6, 1, loss="gbce", negatives=4, epochs=1)),
    "tfkit.recommenders.SVDPlusPlus": Row(lambda: recommenders.SVDPlusPlus(4, epochs=2)),
    "tfkit.recommenders.TwoTower": Row(lambda: recommenders.TwoTower(4, (8,), mixed_negatives=4, epochs=1)),
    "tfkit.recommenders.WARP": Row(lambda: recommenders.WARP(4, epochs=2, margin=0.5)),
}

#: Results, errors, base classes and what reads a file: tested where they are made.
OTHERS: set[str] = {
    "tfkit.compression.Compressor",
    "tfkit.compression.DistillationLoss",
    "tfkit.compression.Distiller",
    "tfkit.compression.EqualizedPair",
    "tfkit.compression.LayerSpeed",
    "tfkit.compression.LowRankRow",
    "tfkit.compression.NoEffectWarning",
    "tfkit.compression.Report",
    "tfkit.compression.SearchResult",
    "tfkit.compression.Sensitivity",
    "tfkit.compression.SensitivityRow",
    "tfkit.compression.Settings",
    "tfkit.compression.ShiftBasedAdaMax",
    "tfkit.compression.SparsitySpeed",
    "tfkit.compression.StructuredReport",
    "tfkit.compression.WeightTransform",
    "tfkit.data.DataError",
    "tfkit.data.Dataset",
    "tfkit.data.Location",
    "tfkit.recommenders.Evaluation",
    "tfkit.recommenders.Features",
    "tfkit.recommenders.Interactions",
    "tfkit.recommenders.Recommender",
    "tfkit.recommenders.RecommenderFileError",
    "tfkit.robustness.attacks.AdversarialResult",
    "tfkit.robustness.attacks.Attack",
    "tfkit.robustness.attacks.BlackBoxAttack",
    "tfkit.robustness.attacks.BudgetExhaustedError",
    "tfkit.robustness.attacks.DetectorTask",
    "tfkit.robustness.attacks.Finding",
    "tfkit.robustness.attacks.Oracle",
    "tfkit.robustness.attacks.RobustnessReport",
    "tfkit.robustness.attacks.TopK",
    "tfkit.robustness.defenses.AdversarialTraining",
    "tfkit.robustness.defenses.CatastrophicOverfitting",
    "tfkit.robustness.defenses.Certificate",
    "tfkit.robustness.defenses.FalseSecurityWarning",
    "tfkit.robustness.defenses.FastAdversarialTraining",
    "tfkit.robustness.defenses.FreeAdversarialTraining",
    "tfkit.robustness.defenses.MedianFilter",
    "tfkit.robustness.defenses.RandomSelfEnsemble",
    "tfkit.robustness.defenses.RandomizedSmoothing",
    "tfkit.robustness.defenses.TRADES",
    "tfkit.robustness.poisoning.BlendedTrigger",
    "tfkit.robustness.poisoning.ClassFinding",
    "tfkit.robustness.poisoning.Detection",
    "tfkit.robustness.poisoning.DetectionScore",
    "tfkit.robustness.poisoning.PatchTrigger",
    "tfkit.robustness.poisoning.PoisonEvaluation",
    "tfkit.robustness.poisoning.PoisonRecord",
    "tfkit.export.ConversionError",
    "tfkit.export.LatencyRatio",
    "tfkit.export.MeasureError",
    "tfkit.export.Measurement",
    "tfkit.export.NarrowRow",
    "tfkit.export.OutputParity",
    "tfkit.export.PackError",
    "tfkit.export.PackResult",
    "tfkit.export.ParityError",
    "tfkit.export.ParityReport",
    "tfkit.export.PrecisionRow",
    "tfkit.export.Runner",
    "tfkit.export.RunnerError",
    "tfkit.export.SparsifyError",
    "tfkit.export.SparsifyResult",
    # Graph layers take pairs, and are saved and loaded in tests/graphs.
    "tfkit.graphs.APPNP",
    "tfkit.graphs.Batch",
    "tfkit.graphs.Block",
    "tfkit.graphs.ClusterSampler",
    "tfkit.graphs.DeepGCN",
    "tfkit.graphs.DropEdge",
    "tfkit.graphs.GAT",
    "tfkit.graphs.GATConv",
    "tfkit.graphs.GCN",
    "tfkit.graphs.GCNConv",
    "tfkit.graphs.GCNII",
    "tfkit.graphs.GCNIIConv",
    "tfkit.graphs.GIN",
    "tfkit.graphs.GINConv",
    "tfkit.graphs.Graph",
    "tfkit.graphs.GraphBatch",
    "tfkit.graphs.GraphLayer",
    "tfkit.graphs.GraphModel",
    "tfkit.graphs.GraphSAGE",
    "tfkit.graphs.History",
    "tfkit.graphs.JumpingKnowledge",
    "tfkit.graphs.LayerWiseSampler",
    "tfkit.graphs.NeighbourSampler",
    "tfkit.graphs.NodeModel",
    "tfkit.graphs.PageRankPropagation",
    "tfkit.graphs.SAGEConv",
    "tfkit.graphs.SGC",
    "tfkit.graphs.SGCConv",
    "tfkit.graphs.SaintSampler",
    "tfkit.graphs.Sampler",
    "tfkit.graphs.VRGCN",
    "tfkit.graphs.embeddings.DeepWalk",
    "tfkit.graphs.embeddings.Embedding",
    "tfkit.graphs.embeddings.F1",
    "tfkit.graphs.embeddings.GraRep",
    "tfkit.graphs.embeddings.HOPE",
    "tfkit.graphs.embeddings.LINE",
    "tfkit.graphs.embeddings.LaplacianEigenmaps",
    "tfkit.graphs.embeddings.LinkSplit",
    "tfkit.graphs.embeddings.NetMF",
    "tfkit.graphs.embeddings.Node2Vec",
    "tfkit.graphs.embeddings.VERSE",
}


def _built(layer: keras.Layer) -> keras.Layer:
    layer.build((None, 4))
    return layer


def example(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def linear(points: Any) -> Any:
    """Logits of three classes: linear in 24 inputs, of whatever shape."""
    weights = np.random.default_rng(1).normal(size=(24, 3)).astype("float32")
    return keras.ops.matmul(keras.ops.reshape(points, (-1, 24)), weights - weights.mean(axis=0))
