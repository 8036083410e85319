"""What frozen features are worth: linear probe, few-shot ridge regression, k nearest neighbours; and of models of
images and text, zero-shot classification and retrieval."""

from eqvision.evaluators.embeddings import Embedder, ImageVectors
from eqvision.evaluators.features import FrozenFeatures, cached_features, extract_features, source_fingerprint
from eqvision.evaluators.few_shot import SHOTS, few_shot
from eqvision.evaluators.knn import knn, knn_votes
from eqvision.evaluators.linear_probe import L2S, LOGISTIC_L2S, ProbeResult, linear_probe
from eqvision.evaluators.logistic import Fit, logistic_regression
from eqvision.evaluators.retrieval import retrieval
from eqvision.evaluators.ridge import RidgeSystem, ridge_system
from eqvision.evaluators.run import EVALUATORS, check_evaluators, run_evaluators
from eqvision.evaluators.splits import class_ranks, rarest_class, shot_rows, validation_rows
from eqvision.evaluators.zero_shot import class_vectors, zero_shot

__all__ = [
    "EVALUATORS",
    "L2S",
    "LOGISTIC_L2S",
    "SHOTS",
    "Embedder",
    "Fit",
    "FrozenFeatures",
    "ImageVectors",
    "ProbeResult",
    "RidgeSystem",
    "cached_features",
    "check_evaluators",
    "class_ranks",
    "class_vectors",
    "extract_features",
    "few_shot",
    "knn",
    "knn_votes",
    "linear_probe",
    "logistic_regression",
    "rarest_class",
    "retrieval",
    "ridge_system",
    "run_evaluators",
    "shot_rows",
    "source_fingerprint",
    "validation_rows",
    "zero_shot",
]
