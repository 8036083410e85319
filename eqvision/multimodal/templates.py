"""Sentences that name a class, for zero-shot classification: ``{}`` stands for the name.

The vectors of several sentences are averaged, which says more of a class than one does (Radford et al. 2021, section
3.1.4). These are of our own making. What OpenAI published for its figures is a longer list: ``read_templates`` reads it
and any other from a file.
"""

from collections.abc import Sequence
from pathlib import Path

# The first asks in the words that captions of photos are most likely to have.
PLAIN = ("a photo of a {}.",)
PHOTOS = (
    "a photo of a {}.",
    "a picture of one {}.",
    "a close view of the {}.",
    "a {} seen from far away.",
    "a dark picture of a {}.",
    "a sharp, bright photo of the {}.",
    "a blurred snapshot of a {}.",
    "many of them: a photo of the {}.",
    "part of a {} in a cropped photo.",
    "a drawing of a {}.",
    "a toy that looks like a {}.",
    "a {} indoors.",
    "a {} outside.",
)
TEMPLATES = {"plain": PLAIN, "photos": PHOTOS}


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError for no templates, and for one that has no place for the name."""
    if not templates:
        raise ValueError("there are no templates; give at least one sentence, such as 'a photo of a {}.'")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} where the class's name stands")


def read_templates(path: str | Path) -> tuple[str, ...]:
    """One sentence a line; empty lines and those that begin with ``#`` are left out.

    Raises FileNotFoundError, and ValueError naming the file and the line where a sentence has no ``{}``.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if "{}" not in line:
            raise ValueError(f"{path}, line {number}: {line!r} has no {{}} where the class's name stands")
        found.append(line)
    if not found:
        raise ValueError(f"{path} holds no template; write one sentence a line, such as 'a photo of a {{}}.'")
    return tuple(found)
