"""All layouts, one file per family and origin. Rows are tried by the names in a file; their order does not matter."""

from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import resnet_torchvision

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (resnet_torchvision.LAYOUT,)}
