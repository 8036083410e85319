"""The problem of a configuration."""

from eqvision.problems.classification import classification_problem
from eqvision.problems.contrastive import contrastive_problem
from eqvision.problems.detection import detection_problem
from eqvision.problems.glue import glue_problem
from eqvision.problems.language import language_problem
from eqvision.problems.masked_image import masked_problem
from eqvision.problems.open_vocabulary import open_vocabulary_problem
from eqvision.problems.problem import Problem
from eqvision.problems.prompted import prompted_problem
from eqvision.problems.segmentation import segmentation_problem
from eqvision.recipes import (
    ContrastiveConfig,
    DetectionConfig,
    GlueConfig,
    LanguageConfig,
    MaskedConfig,
    OpenVocabularyConfig,
    PromptedConfig,
    RunConfig,
    SegmentationConfig,
)


def make_problem(config: RunConfig) -> Problem:
    """Raises what its function raises for data and a model that do not fit together."""
    if isinstance(config, DetectionConfig):
        return detection_problem(config)
    if isinstance(config, SegmentationConfig):
        return segmentation_problem(config)
    if isinstance(config, PromptedConfig):
        return prompted_problem(config)
    if isinstance(config, ContrastiveConfig):
        return contrastive_problem(config)
    if isinstance(config, MaskedConfig):
        return masked_problem(config)
    if isinstance(config, LanguageConfig):
        return language_problem(config)
    if isinstance(config, GlueConfig):
        return glue_problem(config)
    if isinstance(config, OpenVocabularyConfig):
        return open_vocabulary_problem(config)
    return classification_problem(config)
