"""Published weights: formats, layouts (renaming rules), the strict loader, and the way back out."""

from eqvision.pretrained.cards import Card, Preprocessing, default_card, find_card
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import LAYOUTS
from eqvision.pretrained.load import load
from eqvision.pretrained.rules import Rule
from eqvision.pretrained.save import to_layout

__all__ = [
    "LAYOUTS",
    "Card",
    "Layout",
    "Preprocessing",
    "Rule",
    "WeightsError",
    "default_card",
    "find_card",
    "load",
    "to_layout",
]
