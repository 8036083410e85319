"""torchvision beside a CPU build of PyTorch.

torchvision's wheel holds operators that are compiled against CUDA. Beside a CPU build of PyTorch they cannot be loaded,
and then ``import torchvision`` fails, and with it timm and transformers, which import it where it is installed. Its
Python code needs two of them to be declared, and models need none of them to run.
"""

import importlib.util

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def usable_torchvision() -> None:
    """Declare what ``import torchvision`` misses. Call it before the first import of timm or transformers."""
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("torch") is None:
        return
    import torch

    try:
        import torchvision
    except RuntimeError as error:  # operator torchvision::nms does not exist
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + NMS)
        _kept.append(library)  # the declarations go with the object
        import torchvision  # noqa: F401


_kept: list = []
