"""Kinds of work that the loop does: their data, model, loss and evaluation, from a configuration."""

from eqvision.problems.classification import Classification, classification_problem
from eqvision.problems.detection import Detection, detection_problem
from eqvision.problems.problem import Counts, Problem

__all__ = ["Classification", "Counts", "Detection", "Problem", "classification_problem", "detection_problem"]
