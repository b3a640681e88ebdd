"""Recommenders: ratings, implicit events and sequences, judged by full rankings."""

from __future__ import annotations

from tfkit.recommenders.base import Recommender, RecommenderFileError
from tfkit.recommenders.bpr import BPR
from tfkit.recommenders.deep_cross import DeepCross
from tfkit.recommenders.dlrm import DLRM
from tfkit.recommenders.ease import EASE
from tfkit.recommenders.evaluation import Evaluation, bootstrap_interval, evaluate, rating_metrics, sampled_metrics
from tfkit.recommenders.features import Features
from tfkit.recommenders.ials import IALS
from tfkit.recommenders.interactions import Interactions
from tfkit.recommenders.item_knn import ItemKNN
from tfkit.recommenders.matrix_factorization import BiasedMF, RatingALS, SVDPlusPlus
from tfkit.recommenders.neumf import NeuMF
from tfkit.recommenders.popularity import Popularity
from tfkit.recommenders.sequential import BERT4Rec, GRU4Rec, SASRec
from tfkit.recommenders.serving import export_bundle, search_bundle
from tfkit.recommenders.splits import cold_start_split, k_fold, leave_one_out, random_split, temporal_split
from tfkit.recommenders.two_tower import TwoTower
from tfkit.recommenders.warp import WARP

__all__ = [
    "BERT4Rec",
    "BPR",
    "DLRM",
    "EASE",
    "GRU4Rec",
    "IALS",
    "SASRec",
    "WARP",
    "BiasedMF",
    "DeepCross",
    "Evaluation",
    "Features",
    "Interactions",
    "ItemKNN",
    "NeuMF",
    "Popularity",
    "RatingALS",
    "Recommender",
    "RecommenderFileError",
    "SVDPlusPlus",
    "TwoTower",
    "bootstrap_interval",
    "cold_start_split",
    "evaluate",
    "export_bundle",
    "k_fold",
    "leave_one_out",
    "random_split",
    "rating_metrics",
    "sampled_metrics",
    "search_bundle",
    "temporal_split",
]
