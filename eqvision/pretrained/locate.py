"""Where weights lie: a file, a folder, or a place to download from."""

from pathlib import Path
from typing import NamedTuple

from eqvision.names import UnknownNameError
from eqvision.pretrained.download import fetch
from eqvision.pretrained.hub import fetch_hub, parse_hub


class Location(NamedTuple):
    """``path`` is a file or a folder that exists; ``layout`` is that of the published weights, where it is known."""

    path: Path
    layout: str | None = None


def locate(name: str, source: str | Path | None) -> Location:
    """The file or folder of ``source``: a path, ``hf:organisation/repository[@revision][:file]``, an https URL, the
    tag of a card of model ``name``, or None for its first card. Digests that the cards know are checked.

    Downloads are kept; the network is asked only for what is not here. Raises FileNotFoundError saying what to
    download and where to put it, UnknownNameError for a model without published weights, WeightsError for another
    digest, ValueError for a source of no known form.
    """
    if source is None:
        return _published(name, None)
    if isinstance(source, str) and source.startswith(("hf:", "https://", "http://")):
        return Location(_fetched(source, _known_digest(source)))
    path = Path(source).expanduser()
    if path.exists():
        return Location(path)
    tags = _tags(name) if isinstance(source, str) else []
    if source in tags:
        return _published(name, str(source))
    raise FileNotFoundError(f"no weights at {path.absolute()}{_hint(name, path, tags)}")


def _published(name: str, tag: str | None) -> Location:
    from eqvision.pretrained.cards import find_card  # the table is long, and only this needs it

    try:
        card = find_card(name, tag)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; or give a file, a folder, hf:organisation/repository or a URL") from error
    return Location(_fetched(card.location, card.sha256), card.layout)


def _tags(name: str) -> list[str]:
    from eqvision.pretrained.cards import CARDS

    return [card.tag for card in CARDS if card.name == name]


def _hint(name: str, path: Path, tags: list[str]) -> str:
    """What else a path that does not exist may have been meant for."""
    if not path.is_absolute() and len(path.parts) == 2 and not path.suffix:
        return "; a repository of huggingface.co is written hf:organisation/repository"
    if tags and len(path.parts) == 1 and not path.suffix:
        return f", and published weights of {name} are: {', '.join(tags)}"
    return ""


def _known_digest(source: str) -> str | None:
    """What the cards say of a file that is named by its published location."""
    from eqvision.pretrained.cards import CARDS

    return next((card.sha256 for card in CARDS if card.location == source), None)


def _fetched(source: str, sha256: str | None) -> Path:
    return fetch_hub(parse_hub(source), sha256) if source.startswith("hf:") else fetch(source, sha256)
