"""Position tables on another grid, each as its original library computes it. numpy; SciPy where the original has it.

All take float32 tables (h, w, d) without prefix tokens and give float32 tables on the new grid; the three kinds differ
by up to a tenth of the values, which costs accuracy where the wrong one is taken.
"""

import numpy as np
from jaxtyping import Float, Float32

Table = Float[np.ndarray, "h w d"]
Weights = Float32[np.ndarray, "new old"]

TORCH_CUBIC = -0.75  # Keys' a in torch's bicubic
ANTIALIAS_CUBIC = -0.5  # and in its bicubic with antialias, which is Pillow's


def torch_bicubic(table: Table, grid: tuple[int, int]) -> Float32[np.ndarray, "rows columns d"]:
    """``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``: HF ViT and DINOv2, DeiT, MAE.

    Four taps per axis also where the grid shrinks; taps beyond the border read the border.
    """
    rows, columns = (_cubic(old, new, _scale(old, new)) for old, new in zip(table.shape[:2], grid, strict=True))
    return _apply(rows, columns, table)


def torch_bicubic_antialias(table: Table, grid: tuple[int, int]) -> Float32[np.ndarray, "rows columns d"]:
    """The same with ``antialias=True``: timm's ``resample_abs_pos_embed``, and DINOv2's models with registers.

    The window widens with the step where the grid shrinks; at the border its weights are cut and scaled to one.
    """
    sizes = zip(table.shape[:2], grid, strict=True)
    rows, columns = (_antialiased_cubic(old, new, _scale(old, new)) for old, new in sizes)
    return _apply(rows, columns, table)


def dinov2_bicubic(table: Table, grid: tuple[int, int]) -> Float32[np.ndarray, "rows columns d"]:
    """``interpolate_pos_encoding`` of facebookresearch/dinov2 (dinov2/models/vision_transformer.py), offset 0.1.

    As ``torch_bicubic``, but with the step old / (new + 0.1); a table that is on the grid already stays as it is.
    The models with registers have ``interpolate_offset=0.0, interpolate_antialias=True`` (dinov2/hub/backbones.py):
    theirs is ``torch_bicubic_antialias``. transformers' DINOv2 has no offset either: ``torch_bicubic``.
    """
    if table.shape[:2] == grid:
        return np.asarray(table, np.float32)
    sizes = zip(table.shape[:2], grid, strict=True)
    rows, columns = (_cubic(old, new, np.float32(1 / ((new + 0.1) / old))) for old, new in sizes)
    return _apply(rows, columns, table)


def scipy_zoom(table: Table, grid: tuple[int, int]) -> Float32[np.ndarray, "rows columns d"]:
    """``scipy.ndimage.zoom(order=1)``: google-research/vision_transformer, big_vision and Scenic.

    Linear between the centres of the corner cells, which keep their values.
    """
    from scipy.ndimage import zoom

    steps = (grid[0] / table.shape[0], grid[1] / table.shape[1], 1)
    return np.asarray(zoom(np.asarray(table, np.float32), steps, order=1))


def relative_bias(table: Table, window: tuple[int, int]) -> Float32[np.ndarray, "rows columns d"]:
    """Swin's biases (2 h - 1, 2 w - 1, heads) for another window: timm's ``resize_rel_pos_bias_table``.

    Old offsets are placed at geometrically growing distances, so that the largest old one lies at the largest new one
    and small ones stay nearly where they are; then linear in between (Bao et al. 2022 have a cubic there).
    """
    sizes = [(old, 2 * side - 1) for old, side in zip(table.shape[:2], window, strict=True)]
    if all(old == new for old, new in sizes):
        return np.asarray(table, np.float32)
    rows, columns = (_geometric(old, new) for old, new in sizes)
    return _apply(rows, columns, table)


def relative_bias_bicubic(table: Table, window: tuple[int, int]) -> Float32[np.ndarray, "rows columns d"]:
    """The same by plain ``torch_bicubic``: timm's ``..._simple``, and microsoft/Swin-Transformer's."""
    return torch_bicubic(table, (2 * window[0] - 1, 2 * window[1] - 1))


def _apply(
    rows: Float32[np.ndarray, "rows h"], columns: Float32[np.ndarray, "columns w"], table: Table
) -> Float32[np.ndarray, "rows columns d"]:
    """Both axes in turn, in float64: the sums are then exact to float32."""
    wide = np.asarray(table, np.float64)
    return np.einsum("rh,cw,hwd->rcd", rows, columns, wide, optimize=True).astype(np.float32)


def _scale(old: int, new: int) -> np.float32:
    return np.float32(old) / np.float32(new)


def _cubic(old: int, new: int, scale: np.float32) -> Weights:
    """Four taps around each new centre; float32 as in torch, whose rounding of positions is visible at 1e-6."""
    # one rounding, as the processor's fused multiply-add has it
    position = (float(scale) * (np.arange(new) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(position)
    weights = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        place = np.clip(first.astype(int) + tap, 0, old - 1)
        weights[np.arange(new), place] += _keys(np.abs(position - first - np.float32(tap)), TORCH_CUBIC)
    return weights


def _antialiased_cubic(old: int, new: int, scale: np.float32) -> Weights:
    stretch = max(scale, np.float32(1))
    centre = scale * (np.arange(new, dtype=np.float32) + np.float32(0.5))
    # the window is cut to whole cells by truncation, as in torch; the kernel is zero beyond it but for rounding
    first = np.maximum((centre - 2 * stretch + np.float32(0.5)).astype(int), 0)
    last = np.minimum((centre + 2 * stretch + np.float32(0.5)).astype(int), old)
    cells = np.arange(old)
    inside = (cells >= first[:, None]) & (cells < last[:, None])
    distance = np.abs((cells - centre[:, None] + 0.5) / stretch)
    weights = np.where(inside, _keys(distance, ANTIALIAS_CUBIC), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _keys(distance: Float[np.ndarray, "*n"], a: float) -> Float32[np.ndarray, "*n"]:
    """Cubic convolution kernel (Keys 1981), zero from distance 2 on."""
    near = _polynomial(distance, (a + 2, -(a + 3), 0.0, 1.0))
    far = _polynomial(distance, (a, -5 * a, 8 * a, -4 * a))
    return np.where(distance <= 1, near, np.where(distance < 2, far, np.float32(0)))


def _polynomial(x: Float[np.ndarray, "*n"], coefficients: tuple[float, ...]) -> Float32[np.ndarray, "*n"]:
    """Horner's rule with one rounding to float32 per step, as fused multiply-adds have it.

    The terms cancel near distance 2: computed otherwise, the weights are up to 1e-6 from torch's.
    """
    value = np.full(x.shape, coefficients[0], np.float32)
    for coefficient in coefficients[1:]:
        value = (value.astype(np.float64) * x + coefficient).astype(np.float32)
    return value


def _geometric(old: int, new: int) -> Weights:
    """Linear interpolation at the whole offsets of the new window between the stretched offsets of the old one."""
    steps = _growth(old // 2, new // 2) ** np.arange(old // 2)
    distances = np.cumsum(steps)
    points = np.concatenate([-distances[::-1], [0], distances]).astype(np.float32)
    targets = np.arange(-(new // 2), new // 2 + 1, dtype=np.float32)
    upper = np.clip(np.searchsorted(points, targets), 1, old - 1)
    lower = upper - 1
    # beyond the outermost point (by the error of the growth factor) its own value holds
    share = np.clip((targets - points[lower]) / (points[upper] - points[lower]), 0, 1)
    weights = np.zeros((new, old), np.float32)
    weights[np.arange(new), lower] = 1 - share
    weights[np.arange(new), upper] += share
    return weights


def _growth(terms: int, total: int) -> float:
    """Factor q of 1 + q + q^2 + ... = total, by bisection of [1.01, 1.5] to 1e-6: timm's bounds and its last middle."""
    low, high, middle = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        middle = (low + high) / 2
        too_far = (middle**terms - 1) / (middle - 1) > total
        low, high = (low, middle) if too_far else (middle, high)
    return middle
