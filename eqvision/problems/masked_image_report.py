"""What people look at in the run folder of a masked autoencoder."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from eqvision.data import normalize
from eqvision.losses import patch_moments
from eqvision.ops import image_of_patches, patch_pixels
from eqvision.problems.masked_image_evaluator import MaskedEvaluation, MaskedSample
from eqvision.recipes import MaskedConfig
from eqvision.report import plot_curves
from eqvision.run_folder import Row, RunFolder, without_nan

LEAST_SIDE = 128  # pixels; smaller images are enlarged
SAMPLES_IN_LINE = 2
GREY = 128  # of masked patches


def write_masked_report(folder: RunFolder, rows: list[Row], evaluation: MaskedEvaluation, config: MaskedConfig) -> None:
    """``result.json`` (with what evaluators said last) and ``reconstructions.png``; the learning curve where matplotlib
    is installed, else a line that says how."""
    last = {name: value for name, value in rows[-1].items() if name.startswith("test/")} if rows else {}
    metrics = last | {f"test/{name}": value for name, value in evaluation.metrics.items()}
    (folder.path / "result.json").write_text(json.dumps(without_nan(metrics), indent=2))
    draw_reconstructions(evaluation.samples, config, folder.path / "reconstructions.png")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, "loss")


def draw_reconstructions(samples: Sequence[MaskedSample], config: MaskedConfig, path: Path) -> Path:
    """A PNG with three pictures for each sample: what the encoder saw, the prediction in its gaps, and the image.

    Predictions of normalised pixels get the mean and the variance of their true patches back: the model is not asked
    for these. Raises ValueError for no sample.
    """
    if not samples:
        raise ValueError("there are no samples to draw; expected at least one")
    from PIL import Image

    from eqvision.detection_pictures import captioned, sheet_of
    from eqvision.segmentation_pictures import enlarged

    titles = ("seen", "predicted", "image")
    cells = [
        captioned(enlarged(_colored(picture), LEAST_SIDE), title)
        for sample in samples
        for picture, title in zip(reconstruction(sample, config), titles, strict=True)
    ]
    Image.fromarray(sheet_of(cells, columns=3 * SAMPLES_IN_LINE)).save(path)
    return path


def reconstruction(
    sample: MaskedSample, config: MaskedConfig
) -> tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h w c"]]:
    """The image with grey in place of masked patches, with predictions in their place, and as it is."""
    height, width, channels = sample.image.shape
    patch = round((sample.pixels.shape[1] / channels) ** 0.5)
    mean, std = config.data.mean, config.data.std
    whole = patch_pixels(jnp.asarray(normalize(sample.image[None], mean, std)), patch)
    predicted = jnp.asarray(sample.pixels[None])
    if config.task.normalise_pixels:
        middle, spread = patch_moments(whole)
        predicted = predicted * spread + middle
    filled = jnp.where(sample.mask[None, :, None], predicted, whole)
    drawn = np.asarray(image_of_patches(filled, patch, (height // patch, width // patch)))[0]
    pixels = 255 * (drawn * np.asarray(std, np.float32) + np.asarray(mean, np.float32))
    gaps = sample.mask.reshape(height // patch, width // patch).repeat(patch, axis=0).repeat(patch, axis=1)
    predictions = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    grey, hidden = np.uint8(GREY), gaps[..., None]
    return np.where(hidden, grey, sample.image), np.where(hidden, predictions, sample.image), sample.image


def _colored(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    return image if image.shape[-1] == 3 else image.repeat(3, axis=-1)
