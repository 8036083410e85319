"""Models that learn from images without labels: an encoder, and what it is trained with."""

from eqvision.pretraining.mae import (
    MAE,
    MAES,
    MAEDecoder,
    MAEOutputs,
    Masking,
    draw_noise,
    masked_autoencoder,
    masking_of,
)

__all__ = [
    "MAE",
    "MAES",
    "MAEDecoder",
    "MAEOutputs",
    "Masking",
    "draw_noise",
    "masked_autoencoder",
    "masking_of",
]
