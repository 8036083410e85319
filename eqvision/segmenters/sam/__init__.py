"""Segment Anything (Kirillov et al. 2023): the model, and what people do with it."""

from eqvision.segmenters.sam.automatic import (
    FoundMask,
    MaskSearch,
    count_points,
    crop_boxes,
    find_masks,
    point_grid,
    stability_score,
)
from eqvision.segmenters.sam.clicks import ClickScores, box_prompts, score_clicks
from eqvision.segmenters.sam.images import Geometry, geometry, prepare_image, resize_logits, resize_masks, to_input
from eqvision.segmenters.sam.model import SAM, choose_masks, prompted_sam, sam, sam_vit_b, sam_vit_h, sam_vit_l
from eqvision.segmenters.sam.predictor import NoImageError, PredictedMasks, Predictor, SmallMasks
from eqvision.segmenters.sam.rounds import Rounds, error_points, first_prompts, train_rounds
from eqvision.segmenters.sam.small import sam_small

__all__ = [
    "SAM",
    "ClickScores",
    "FoundMask",
    "Geometry",
    "MaskSearch",
    "NoImageError",
    "PredictedMasks",
    "Predictor",
    "Rounds",
    "SmallMasks",
    "box_prompts",
    "choose_masks",
    "count_points",
    "crop_boxes",
    "error_points",
    "find_masks",
    "first_prompts",
    "geometry",
    "point_grid",
    "prepare_image",
    "prompted_sam",
    "resize_logits",
    "resize_masks",
    "sam",
    "sam_small",
    "sam_vit_b",
    "sam_vit_h",
    "sam_vit_l",
    "score_clicks",
    "stability_score",
    "to_input",
    "train_rounds",
]
