"""Cards of published weights: where each file lies, how images are prepared for it, and what is published of it."""

import fnmatch

from eqvision.names import UnknownNameError, nearest
from eqvision.pretrained.cards import (
    bit_mixer,
    centernet,
    clip,
    convnext_swin,
    detr,
    hugging_face,
    owlvit,
    rcnn,
    resnet,
    sam,
    vit,
    vit_facebook,
)
from eqvision.pretrained.cards.card import Card, Preprocessing

CARDS: tuple[Card, ...] = (
    *resnet.CARDS,
    *vit.CARDS,
    *vit_facebook.CARDS,
    *bit_mixer.CARDS,
    *convnext_swin.CARDS,
    *hugging_face.CARDS,
    *detr.CARDS,
    *rcnn.CARDS,
    *centernet.CARDS,
    *sam.CARDS,
    *clip.CARDS,
    *owlvit.CARDS,
)


def cards(pattern: str = "*") -> tuple[Card, ...]:
    """Cards of the models whose names match a shell pattern such as ``vit*``; a model's default comes first."""
    found = [card for card in CARDS if fnmatch.fnmatchcase(card.name, pattern)]
    order = {name: place for place, name in enumerate(dict.fromkeys(card.name for card in found))}
    return tuple(sorted(found, key=lambda card: order[card.name]))


def default_card(name: str) -> Card:
    """What ``eqvision.load(name)`` loads. Raises UnknownNameError, naming models that have weights."""
    return find_card(name, None)


def find_card(name: str, tag: str | None) -> Card:
    """The card of a model with this tag, or its first. Raises UnknownNameError, naming what there is."""
    found = [card for card in CARDS if card.name == name]
    if not found:
        known = list(dict.fromkeys(card.name for card in CARDS))
        near = str(nearest(name, known, "model")).partition("nearest: ")[2]
        raise UnknownNameError(
            f"no published weights of {name!r} are known; nearest models that have some: {near} "
            "(all: eqvision list --pretrained)"
        )
    if tag is None:
        return found[0]
    chosen = [card for card in found if card.tag == tag]
    if not chosen:
        raise nearest(tag, [card.tag for card in found], f"weights of {name} with the tag")
    return chosen[0]


__all__ = ["CARDS", "Card", "Preprocessing", "cards", "default_card", "find_card"]
