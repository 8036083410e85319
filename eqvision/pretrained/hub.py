"""Repositories of huggingface.co: ``hf:organisation/repository[@revision][:file]``."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from eqvision.pretrained.download import absent, check_digest, place_of
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.files import FOLDER_FILES, shard_names

log = logging.getLogger("eqvision.pretrained")

_FORM = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")


class HubSource(NamedTuple):
    """A file of a repository; ``file`` None: the first of FOLDER_FILES that it has. ``revision`` None: main."""

    repository: str
    revision: str | None = None
    file: str | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        return FOLDER_FILES if self.file is None else (self.file,)

    def url(self, file: str) -> str:
        """Where the file can be downloaded by hand."""
        return f"https://huggingface.co/{self.repository}/resolve/{self.revision or 'main'}/{file}"


def parse_hub(text: str) -> HubSource:
    """Raises ValueError where ``text`` is not of the form."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no source of weights; expected hf:organisation/repository[@revision][:file]")
    return HubSource(match["repository"], match["revision"], match["file"])


def fetch_hub(source: HubSource, sha256: str | None = None) -> Path:
    """The repository's weight file: from huggingface_hub's cache, else put by hand where ``place_of`` says, else from
    the network. ``config.json`` comes with it.

    A copy that is here is taken without asking the network, also where the repository has a newer one. Raises
    FileNotFoundError with what to download and where to put it, ImportError where a download needs huggingface_hub,
    WeightsError for another digest, and for a repository without weights.
    """
    path = _cached(source) or _by_hand(source) or _downloaded(source)
    check_digest(path, sha256, rename=False)
    return path


def _cached(source: HubSource) -> Path | None:
    """The file in huggingface_hub's cache, if it is whole: an index with all its shards."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for name in source.candidates:
        file = try_to_load_from_cache(source.repository, name, revision=source.revision)
        if isinstance(file, str) and _whole(Path(file)):
            return Path(file)
    return None


def _by_hand(source: HubSource) -> Path | None:
    places = (place_of(source.url(name)) for name in source.candidates)
    return next((place for place in places if place.is_file() and _whole(place)), None)


def _whole(file: Path) -> bool:
    if not file.name.endswith(".index.json"):
        return True
    return all((file.parent / shard).is_file() for shard in shard_names(file))


def _downloaded(source: HubSource) -> Path:
    try:
        from huggingface_hub import hf_hub_download  # noqa: F401  asked for here, to say what to install
    except ImportError as error:
        install = "huggingface_hub is not installed: pip install 'eqvision[hub]'"
        raise ImportError(_instead(source, install)) from error
    _optional(source, "config.json")
    _optional(source, "preprocessor_config.json")
    for name in source.candidates:
        file = _optional(source, name)
        if file is not None:
            for shard in shard_names(file) if name.endswith(".index.json") else ():
                _required(source, shard)
            return file
    raise WeightsError(
        f"hf:{source.repository} has no file {' or '.join(source.candidates)}; name one: hf:ORG/REPO:FILE"
    )


def _required(source: HubSource, name: str) -> None:
    if _optional(source, name) is None:
        raise WeightsError(f"hf:{source.repository} has no file {name}, which its index names")


def _optional(source: HubSource, name: str) -> Path | None:
    """The file, downloaded; None where the repository has none of that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source.repository, name, revision=source.revision))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _unreachable(source, error) from error
    except Exception as error:  # what fails on the network depends on the HTTP library beneath huggingface_hub
        raise _unreachable(source, error) from error


def _unreachable(source: HubSource, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(_instead(source, f"{type(error).__name__}: {error}".splitlines()[0][:300]))


def _instead(source: HubSource, cause: str) -> str:
    """What to do where the repository cannot be reached."""
    url = source.url(source.candidates[0])
    others = f" (or what it has of {', '.join(source.candidates[1:])})" if source.file is None else ""
    return f"hf:{source.repository}: {absent(url, place_of(url), cause)}\nwith its config.json beside it{others}"
