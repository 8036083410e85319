"""Kinds of work that the loop does: their data, model, loss and evaluation, from a configuration."""

from eqvision.problems.choose import make_problem
from eqvision.problems.classification import Classification, classification_problem
from eqvision.problems.contrastive import Contrastive, contrastive_problem
from eqvision.problems.detection import Detection, detection_problem
from eqvision.problems.glue import Glue, glue_problem
from eqvision.problems.language import Language, language_problem
from eqvision.problems.masked_image import MaskedImage, masked_problem
from eqvision.problems.open_vocabulary import OpenVocabulary, open_vocabulary_problem
from eqvision.problems.problem import Counts, Problem
from eqvision.problems.segmentation import Segmentation, segmentation_problem

__all__ = [
    "Classification",
    "Contrastive",
    "Counts",
    "Detection",
    "Glue",
    "Language",
    "MaskedImage",
    "OpenVocabulary",
    "Problem",
    "Segmentation",
    "classification_problem",
    "contrastive_problem",
    "detection_problem",
    "glue_problem",
    "language_problem",
    "make_problem",
    "masked_problem",
    "open_vocabulary_problem",
    "segmentation_problem",
]
