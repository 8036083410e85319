"""What a source is, and the sources in memory: arrays, and the embedded digits."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Num, Shaped, UInt8

Labels = Int[np.ndarray, " n"] | Float[np.ndarray, "n k"]


class Example(NamedTuple):
    """One image with its label; ``index`` is its place in the source, ``weight`` 0 where the pixels are a stand-in."""

    image: UInt8[np.ndarray, "h w c"]
    label: np.integer | Float[np.ndarray, " k"]
    index: int
    weight: float = 1.0


@runtime_checkable
class Source(Protocol):
    """What streams read: random access, and all labels without touching an image."""

    class_names: tuple[str, ...]
    labels: np.ndarray

    @property
    def num_skipped(self) -> int:
        """Corrupt images that have been left out so far."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def describe(self, index: int) -> str:
        """Names one example in an error message."""
        ...


class Arrays:
    """Images and labels in memory (or memory-mapped): ``[n h w c]`` or ``[n h w]``, 0..255.

    Labels are class indices ``[n]`` or multi-label rows ``[n k]``. Raises ValueError for images of another range
    or layout, for lengths that differ and for class names that do not match the labels.
    """

    def __init__(
        self,
        images: Num[np.ndarray, "n ..."],
        labels: Shaped[np.ndarray, "m ..."],
        class_names: tuple[str, ...] | None = None,
        *,
        name: str = "arrays",
    ):
        self.images = _check_images(images, name)
        self.labels = _check_label_array(labels, name)
        if len(self.images) != len(self.labels):
            raise ValueError(f"{name}: {len(self.images)} images but {len(self.labels)} labels")
        num_classes = self.labels.shape[1] if self.labels.ndim == 2 else max(int(self.labels.max()) + 1, 1)
        self.class_names = tuple(class_names) if class_names is not None else tuple(map(str, range(num_classes)))
        if len(self.class_names) < num_classes:
            raise ValueError(f"{name}: labels need {num_classes} classes but class_names has {len(self.class_names)}")
        self.name = name

    @property
    def num_skipped(self) -> int:
        return 0  # arrays have no files that can be corrupt

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        return Example(np.asarray(self.images[index]), self.labels[index], index)

    def describe(self, index: int) -> str:
        """Row of the arrays and where they came from."""
        return f"row {index} of {self.name}"


def _check_images(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name}: images have shape {images.shape}; expected [n h w c] or [n h w], none of them 0")
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise ValueError(
            f"{name}: images of shape {images.shape} look channels-first; expected [n h w c]: "
            "np.moveaxis(images, 1, -1)"
        )
    return images if images.dtype == np.uint8 else _to_uint8(images, name)


def _to_uint8(images: np.ndarray, name: str) -> np.ndarray:
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 255):  # written so that NaN fails too
        raise ValueError(f"{name}: images are {images.dtype} in {low}..{high}; expected pixels 0..255 (uint8)")
    pixels = images.astype(np.uint8)
    if images.dtype.kind == "f" and (high <= 1 or not np.array_equal(pixels, images)):
        raise ValueError(
            f"{name}: images are {images.dtype} in {low:g}..{high:g} and not whole numbers 0..255; scale them "
            "yourself, for 0..1: (images * 255).round().astype(np.uint8)"
        )
    return pixels


def _check_label_array(labels: np.ndarray, name: str) -> Labels:
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype.kind in "iu":
        labels = labels[:, 0]  # CIFAR archives of some libraries carry [n 1]
    if labels.ndim == 1 and labels.dtype.kind in "iu":
        return labels.astype(np.int32)
    if labels.ndim == 2 and labels.dtype.kind in "iufb":
        return labels.astype(np.float32)
    if labels.ndim == 1 and labels.dtype.kind == "f":
        return labels.astype(np.float32)[:, None]  # one real value per image, for regression
    raise ValueError(
        f"{name}: labels have shape {labels.shape} and type {labels.dtype}; expected class indices (integers [n]) "
        "or multi-label rows (numbers [n k])"
    )


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's copy of the UCI optical digits: 1797 real 8x8 grey images, here scaled from 0..16 to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits demo set needs scikit-learn: pip install eqvision[demo]") from error
    pixels, labels = load_digits(return_X_y=True)
    return np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), np.asarray(labels, np.int32)


def digits(split: str) -> Arrays:
    """The embedded demo set: handwritten digits, 8x8x1 uint8; 1437 training and 360 test images.

    The split is fixed and stratified: in a fixed random order sorted by class, every fifth image is for testing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits has the splits 'train' and 'test', got {split!r}")
    images, labels = _read_digits()
    # RandomState, whose stream numpy has frozen: the split must not move with a numpy version.
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    is_test = np.arange(len(order)) % 5 == 0
    chosen = np.sort(order[is_test == (split == "test")])
    return Arrays(images[chosen], labels[chosen], name=f"digits/{split}")


def check_labels(source: Source, num_classes: int) -> None:
    """Raise ValueError, naming the example, for a label that a head of ``num_classes`` cannot have.

    On the host before the first step, because JAX answers such labels with NaN or with another class's loss.
    """
    labels = source.labels
    if labels.ndim == 2:
        _check_label_rows(source, labels, num_classes)
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        advice = "remove unlabelled examples" if labels.min() < 0 else f"pass num_classes={int(labels.max()) + 1}"
        raise ValueError(
            f"label {labels[wrong[0]]} in {source.describe(int(wrong[0]))} but the head has {num_classes} classes "
            f"(0..{num_classes - 1}); {wrong.size} such labels in all. Correct the labels or {advice}"
        )


def _check_label_rows(source: Source, labels: np.ndarray, num_classes: int) -> None:
    if labels.shape[1] != num_classes:
        raise ValueError(
            f"multi-label rows of {source.describe(0)} have width {labels.shape[1]} but the head has "
            f"{num_classes} classes"
        )
    wrong = np.flatnonzero(~((labels >= 0) & (labels <= 1)).all(axis=1))
    if wrong.size:
        row = labels[wrong[0]]
        value = row[~((row >= 0) & (row <= 1))][0]
        raise ValueError(f"multi-label value {value:g} in {source.describe(int(wrong[0]))}; expected 0..1")
