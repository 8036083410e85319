"""Finding the text of an image and the image of a text, by the vectors of a model of both."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from eqvision.data.pairs import TextGallery
from eqvision.evaluators.embeddings import ImageVectors
from eqvision.metrics import retrieval_recall

KS = (1, 5)


def retrieval(
    images: ImageVectors, texts: Float[np.ndarray, "m d"], gallery: TextGallery, *, ks: Sequence[int] = KS
) -> dict[str, float]:
    """``image_to_text/recall_at_1`` and so on, in [0, 1]: see ``metrics.retrieval_recall``.

    ``gallery`` is ``text_gallery`` of the source that the images are of, and ``texts`` the vectors of its texts. Texts
    about images that could not be decoded stay in the gallery. Raises ValueError as ``retrieval_recall`` does.
    """
    image, text = gallery.pairs.T
    place = np.full(int(max(image.max(initial=-1), images.indices.max(initial=-1))) + 1, -1)
    place[images.indices] = np.arange(len(images.indices))
    rows = place[image]
    pairs = np.stack([rows, text], axis=1)[rows >= 0]
    return retrieval_recall(images.values, texts, pairs, ks=ks).metrics()
