"""Optimisation: schedules, optimizers, parameter groups, clipping and the average of the parameters."""

from eqvision.optim.adafactor import scale_by_adafactor
from eqvision.optim.by_name import optimizer_names
from eqvision.optim.clipping import clip_adaptive
from eqvision.optim.ema import ema_decay, update_ema
from eqvision.optim.groups import (
    ParameterSettings,
    decay_mask,
    frozen_mask,
    layer_factors,
    parameter_settings,
)
from eqvision.optim.optimizers import make_optimizer, scale_by_layer_trust_ratio
from eqvision.optim.presets import adafactor_stable, adafactor_vit_g
from eqvision.optim.schedules import (
    constant,
    cooldown,
    cosine,
    cosine_restarts,
    linear,
    make_schedule,
    polynomial,
    product,
    rsqrt,
    step_decay,
    warmup,
)
from eqvision.optim.table import parameter_table

__all__ = [
    "ParameterSettings",
    "adafactor_stable",
    "adafactor_vit_g",
    "clip_adaptive",
    "constant",
    "cooldown",
    "cosine",
    "cosine_restarts",
    "decay_mask",
    "ema_decay",
    "frozen_mask",
    "layer_factors",
    "linear",
    "make_optimizer",
    "make_schedule",
    "optimizer_names",
    "parameter_settings",
    "parameter_table",
    "polynomial",
    "product",
    "rsqrt",
    "scale_by_adafactor",
    "scale_by_layer_trust_ratio",
    "step_decay",
    "update_ema",
    "warmup",
]
