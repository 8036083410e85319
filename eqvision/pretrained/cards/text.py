"""Cards as text, for the command line."""

from collections.abc import Sequence

from eqvision.pretrained.cards.card import Card, Preprocessing

COLUMNS = ("model", "tag", "layout", "size", "metric", "licence", "location")


def table(cards: Sequence[Card]) -> str:
    """One line for each card under a heading, in columns."""
    rows = [COLUMNS, *(_row(card) for card in cards)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(card: Card) -> tuple[str, ...]:
    size = str(card.preprocessing.size)
    return card.name, card.tag, card.layout, size, card.metric, card.licence, card.location


def describe_card(card: Card) -> str:
    """All that a card says, over several lines."""
    lines = [
        f"  weights {card.tag}",
        f"    metric        {card.metric}",
        f"    source        {card.source}",
        f"    location      {card.location}",
        f"    sha256        {_digest(card.sha256)}",
        f"    licence       {card.licence}",
        f"    layout        {card.layout}",
        f"    preprocessing {describe_preprocessing(card.preprocessing)}",
        *([f"    note          {card.note}"] if card.note else []),
    ]
    return "\n".join(lines)


def _digest(sha256: str | None) -> str:
    if sha256 is None:
        return "not published"
    return sha256 if len(sha256) == 64 else f"{sha256}... (the published digits)"


def describe_preprocessing(preprocessing: Preprocessing) -> str:
    """How images become the model's input, in words."""
    size, fraction = preprocessing.size, preprocessing.crop_fraction
    shorter = int(size / fraction) if fraction else 0
    resized = f"shorter side to {shorter}, middle {size}x{size}" if fraction else f"both sides to {size}"
    if preprocessing.longest:
        resized = f"shorter side to {size}, longer side at most {preprocessing.longest}"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return f"{resized} ({preprocessing.interpolation}), mean {mean}, std {std}"
