"""Pure functions without parameters."""

from eqvision.ops.collectives import DATA_AXES, global_sum, vary_like, varying_axes
from eqvision.ops.resize import resize_images

__all__ = ["DATA_AXES", "global_sum", "resize_images", "vary_like", "varying_axes"]
