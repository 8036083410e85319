"""``eqvision data check``: every image of a data set decoded once, before a training run finds out."""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eqvision.data.bad_files import BadFile, write_bad_files
from eqvision.data.cache import write_whole
from eqvision.data.decode import CorruptImageError, decode_bytes
from eqvision.data.encoded import EncodedSource
from eqvision.data.kinds import open_source, splits_of

_CHUNK = 32  # images in one piece of work: small enough for the bar, large enough to hide its cost
_MODES = {"CMYK": "CMYK", "YCCK": "CMYK", "P": "palette", "PA": "palette", "LA": "transparency", "RGBA": "transparency"}
_EXTENSIONS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",), "GIF": (".gif",)}
_ORIENTATION = 0x0112


class Finding(NamedTuple):
    """What is known of one image. ``problem`` is empty for a good one; ``notes`` are oddities that do no harm."""

    height: int
    width: int
    digest: bytes
    kind: str
    problem: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """What a check has found, by split ("" where there are none), in the order of the data set."""

    root: Path
    kind: str
    seconds: float
    sources: dict[str, EncodedSource]
    findings: dict[str, list[Finding]]

    @property
    def num_bad(self) -> int:
        """Images that cannot be used."""
        return sum(bool(finding.problem) for findings in self.findings.values() for finding in findings)


def check_data(
    path: str | Path, *, kind: str, split: str | None = None, num_threads: int = 1, min_size: int = 2
) -> CheckReport:
    """Decode every image, in threads, with a progress bar.

    Bad are images that training could not decode or read, and those with a side of less than ``min_size`` pixels.
    Oddities that are decoded well (CMYK, 16 bit, palette, EXIF rotation, animation, another format than the name
    says) and images that come twice are notes. Without ``split`` all splits are checked. Raises what sources raise.
    """
    import time

    if num_threads < 1 or min_size < 1:
        raise ValueError(f"num_threads={num_threads}, min_size={min_size}; expected 1 or more of each")
    splits = [split] if split is not None else splits_of(kind, path)
    sources = {each or "": open_source(kind, path, each) for each in splits}
    start = time.perf_counter()
    findings = _with_duplicates(sources, _examine_all(sources, num_threads, min_size))
    return CheckReport(Path(path).expanduser().absolute(), kind, time.perf_counter() - start, sources, findings)


def _examine_all(sources: dict[str, EncodedSource], num_threads: int, min_size: int) -> dict[str, list[Finding]]:
    from tqdm import tqdm

    findings: dict[str, list[Finding]] = {}
    # Where there is no terminal, a line now and then will do.
    with tqdm(total=sum(map(len, sources.values())), desc="checking", unit="image", dynamic_ncols=True) as bar:
        bar.mininterval = 0.1 if bar.fp.isatty() else 10.0
        for split, source in sources.items():
            findings[split] = []
            for chunk in _chunks(source, num_threads, min_size):
                findings[split] += chunk
                bar.update(len(chunk))
    return findings


def _chunks(source: EncodedSource, num_threads: int, min_size: int) -> Iterator[list[Finding]]:
    def examine_chunk(start: int) -> list[Finding]:
        stop = min(start + _CHUNK, len(source))
        return [examine(source, index, min_size) for index in range(start, stop)]

    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(examine_chunk, range(0, len(source), _CHUNK))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest


def examine(source: EncodedSource, index: int, min_size: int) -> Finding:
    """Read and decode one image."""
    name = source.describe(index)
    try:
        data = source.encoded(index)
    except OSError as error:
        return Finding(0, 0, b"", "unreadable", f"cannot be read: {error.strerror or error}", ())
    except CorruptImageError as error:
        return Finding(0, 0, b"", "damaged record", str(error), ())
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        pixels = decode_bytes(data, name=name)
    except CorruptImageError as error:
        reason = str(error).removeprefix(f"corrupt image {name}: ")
        return Finding(0, 0, digest, _kind_of(data, reason), reason, ())
    height, width = pixels.shape[:2]
    if min(height, width) < min_size:
        return Finding(height, width, digest, "tiny", f"{width} x {height} pixels, less than {min_size}", ())
    return Finding(height, width, digest, "", "", tuple(_oddities(data, name)))


def _kind_of(data: bytes, reason: str) -> str:
    if not data:
        return "empty"
    if "cannot identify" in reason:
        return "no image"
    return "truncated" if "truncated" in reason.lower() or "not processed" in reason else "damaged"


def _oddities(data: bytes, name: str) -> Iterator[str]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if image.mode in _MODES:
            yield _MODES[image.mode]
        elif image.mode.startswith("I"):
            yield "16 bit"
        if image.getexif().get(_ORIENTATION, 1) != 1:
            yield "EXIF rotation"
        if getattr(image, "n_frames", 1) > 1:
            yield "animation: first frame only"
        known = {extension: each for each, extensions in _EXTENSIONS.items() for extension in extensions}
        named = known.get(Path(name).suffix.lower())
        if named is not None and named != image.format:
            yield f"{image.format}, named {Path(name).suffix}"


def _with_duplicates(sources: dict[str, EncodedSource], findings: dict[str, list[Finding]]) -> dict[str, list[Finding]]:
    first: dict[bytes, tuple[str, int]] = {}
    noted: dict[str, list[Finding]] = defaultdict(list)
    for split, each in findings.items():
        for index, finding in enumerate(each):
            if not finding.problem:
                before = first.setdefault(finding.digest, (split, index))
                if before != (split, index):
                    note = _duplicate(sources, before, (split, index))
                    finding = finding._replace(notes=(*finding.notes, note))
            noted[split].append(finding)
    return dict(noted)


def _duplicate(sources: dict[str, EncodedSource], first: tuple[str, int], second: tuple[str, int]) -> str:
    (split, index), (other_split, other) = first, second
    same = np.array_equal(sources[split].labels[index], sources[other_split].labels[other])
    where = "" if split == other_split else " in another split"
    return f"duplicate{where}{'' if same else ' with another label'}: {sources[split].describe(index)}"


# What is written and printed


def write_report(report: CheckReport, out: Path) -> list[Path]:
    """``bad_files.txt`` (for ``data.exclude``), ``notes.txt`` in the same form, and ``index.npz``; their paths.

    ``index.npz`` holds, for the good images of each split, ``SPLIT/names``, ``/labels``, ``/indices`` (places in the
    whole data set), ``/heights`` and ``/widths`` (upright, in pixels), and ``class_names``.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "bad_files.txt", out / "notes.txt", out / "index.npz"]
    write_bad_files(files[0], report.root, {split: _problems(report, split) for split in report.sources})
    write_bad_files(files[1], report.root, {split: _notes(report, split) for split in report.sources})
    arrays: dict[str, Any] = {
        name: column for split in report.sources for name, column in _columns(report, split).items()
    }
    arrays["class_names"] = np.array(next(iter(report.sources.values())).class_names)
    write_whole(files[2], lambda f: np.savez_compressed(f, **arrays))
    return files


def _problems(report: CheckReport, split: str) -> list[BadFile]:
    pairs = enumerate(report.findings[split])
    return [BadFile(report.sources[split].describe(i), found.problem) for i, found in pairs if found.problem]


def _notes(report: CheckReport, split: str) -> list[BadFile]:
    pairs = enumerate(report.findings[split])
    return [BadFile(report.sources[split].describe(i), "; ".join(found.notes)) for i, found in pairs if found.notes]


def _columns(report: CheckReport, split: str) -> dict[str, np.ndarray]:
    source, findings = report.sources[split], report.findings[split]
    good = np.array([i for i, finding in enumerate(findings) if not finding.problem], np.int64)
    begin = f"{split}/" if split else ""
    return {
        f"{begin}names": np.array([source.describe(i) for i in good.tolist()], np.str_),
        f"{begin}labels": source.labels[good],
        f"{begin}indices": good,
        f"{begin}heights": np.array([findings[i].height for i in good], np.int32),
        f"{begin}widths": np.array([findings[i].width for i in good], np.int32),
    }


def table(report: CheckReport) -> str:
    """A line for each split, kind of problem and kind of note."""
    total = sum(map(len, report.findings.values()))
    lines = [
        f"{total} images in {report.root} ({report.kind}), {report.seconds:.1f} s, "
        f"{total / max(report.seconds, 1e-9):.0f} images/s"
    ]
    for split, findings in report.findings.items():
        bad = Counter(finding.kind for finding in findings if finding.problem)
        notes = Counter(note.split(":")[0] for finding in findings for note in finding.notes)
        lines.append(f"  {split or 'all'}: {len(findings)} images, {sum(bad.values())} bad")
        lines += [f"    bad   {count:>7}  {kind}" for kind, count in bad.most_common()]
        lines += [f"    note  {count:>7}  {kind}" for kind, count in notes.most_common()]
    return "\n".join(lines)
