"""Batches and shape aliases that rooms share. Everything here is a NamedTuple of arrays, so it is a pytree."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Num, UInt8

Images = Float[Array, "b h w c"]
Tokens = Float[Array, "b n d"]
Features = tuple[Float[Array, "b _ _ _"], ...]  # a pyramid: channels last, fine to coarse
Labels = Num[Array, "b ..."]  # what shape fits is for losses and metrics to say, in words

IGNORE_LABEL = 255  # of pixels that are void or padding: no loss is taken of them, and no figure counts them


class ClassificationBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of images with what is to be predicted from each.

    ``images`` stay uint8 until the device. ``labels`` are class indices (single label), 0/1 or soft
    rows (multi-label, mixup) or real values (regression). ``weights`` is 0 on rows that only pad the
    batch and 1 elsewhere. ``indices`` are positions in the data source, so that errors can name the
    example; -1 on padding.
    """

    images: UInt8[Array, "b h w c"]
    labels: Labels
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]


class WeightedValues(NamedTuple):
    """Per-example values and their weights; the task divides the sums globally."""

    values: Float[Array, " b"]
    weights: Float[Array, " b"]


class TokenFeatures(NamedTuple):
    """What a transformer backbone gives: ``prefix`` holds the class token, a distillation token and the
    registers (0 of each is legal), ``patches`` the grid of patch tokens, which is also a feature map of one level.
    """

    prefix: Float[Array, "b p d"]
    patches: Float[Array, "b h w d"]


class TextTokens(NamedTuple):
    """Texts as numbers of a vocabulary, filled up behind to one length: ``mask`` is True on what is text.

    ``segments`` say for BERT which of two texts a token is of (0, 1); None for other models and single texts.
    """

    ids: Int[Array, "b n"]
    mask: Bool[Array, "b n"]
    segments: Int[Array, "b n"] | None = None


class PaddedImages(NamedTuple):
    """Images of several sizes in one array: each lies at the top left, and behind it are zeros (after normalisation).

    ``size`` is height and width of the part that is image. Detectors take this in place of bare images.
    """

    images: Images
    size: Int[Array, "b 2"]


class DetectionTargets(NamedTuple):
    """Objects of each image, in ``g`` rows of which only those with ``valid`` count; what else is there is arbitrary.

    ``boxes`` are xyxy in pixels of the image in the batch, ``labels`` class indices without a background class.
    ``masks`` are 0 or 1 at the size of the batch's images, or None where the task has no use for them. With ``frames``
    (xyxy) they are small ones, of what lies in each object's frame; R-CNN takes both kinds, DETR those of whole images.
    """

    boxes: Float[Array, "b g 4"]
    labels: Int[Array, "b g"]
    valid: Bool[Array, "b g"]
    masks: UInt8[Array, "b g h w"] | None = None
    frames: Float[Array, "b g 4"] | None = None


class DetectionBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of images with the objects in them.

    ``images`` are uint8 and ``size`` as in ``PaddedImages``; ``original_size`` is that of the file, in whose pixels
    results are reported. ``weights`` and ``indices`` are those of ``ClassificationBatch``: 0 and -1 on rows that only
    pad the batch.
    """

    images: UInt8[Array, "b h w c"]
    size: Int[Array, "b 2"]
    original_size: Int[Array, "b 2"]
    targets: DetectionTargets
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]


class SegmentationBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of images with a class for each pixel.

    ``labels`` are class indices at the size of the images, ``IGNORE_LABEL`` where a pixel is void or padding. The other
    fields are those of ``DetectionBatch``: images lie at the top left, and ``size`` is what of them is no padding.
    """

    images: UInt8[Array, "b h w c"]
    labels: Int[Array, "b h w"]
    size: Int[Array, "b 2"]
    original_size: Int[Array, "b 2"]
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]


class Detections(NamedTuple):
    """Objects that a detector found, best first: ``n`` for every image, boxes xyxy in pixels of the size asked for.

    ``valid`` is False on rows that hold none. ``masks``, or None, are at the resolution that the head gives: DETR's
    are logits over the whole image, those of R-CNN probabilities over each box (``ops.paste_masks``).
    """

    boxes: Float[Array, "b n 4"]
    scores: Float[Array, "b n"]
    labels: Int[Array, "b n"]
    valid: Bool[Array, "b n"]
    masks: Float[Array, "b n h w"] | None = None


class CenterPredictions(NamedTuple):
    """What a CenterNet says at each cell of its map, from each of ``l`` stacks; the last counts.

    ``logits`` are of an object of each class having its centre in the cell, ``sizes`` width and height of its box, and
    ``offsets`` where in the cell its centre lies (x, y); both in cells, which have 4 pixels in the published models.
    """

    logits: Float[Array, "l b h w k"]
    sizes: Float[Array, "l b h w 2"]
    offsets: Float[Array, "l b h w 2"]


class SetProposals(NamedTuple):
    """Logits and boxes (cxcywh in [0, 1]) of a two-stage encoder at each place; ``valid`` False outside the image."""

    logits: Float[Array, "b s k"]
    boxes_cxcywh: Float[Array, "b s 4"]
    valid: Bool[Array, "b s"]


class SetPredictions(NamedTuple):
    """What a DETR-like head says for each of ``q`` queries, after every one of ``l`` decoder layers; the last counts.

    ``boxes_cxcywh`` are in [0, 1] of the part of the image that is no padding. ``proposals``: what a two-stage
    encoder says of every place (one layer), else None. ``masks``: logits of the last layer, else None.
    """

    logits: Float[Array, "l b q k"]
    boxes_cxcywh: Float[Array, "l b q 4"]
    proposals: SetProposals | None = None
    masks: Float[Array, "b q h w"] | None = None


class Proposals(NamedTuple):
    """Boxes (xyxy, pixels) that a region proposal network takes for objects, best first; logits are of that."""

    boxes: Float[Array, "b r 4"]
    logits: Float[Array, "b r"]
    valid: Bool[Array, "b r"]


class AnchorSample(NamedTuple):
    """What a region proposal network says of ``s`` anchors drawn from each image, and what it should have said.

    Rows that are not ``valid`` hold nothing; ``targets`` are differences as ``deltas``, of use where ``positive``.
    """

    logits: Float[Array, "b s"]
    deltas: Float[Array, "b s 4"]
    targets: Float[Array, "b s 4"]
    positive: Bool[Array, "b s"]
    valid: Bool[Array, "b s"]


class BoxSample(NamedTuple):
    """The same of ``r`` boxes drawn from each image and one stage of box heads.

    ``columns`` are those of ``logits`` that should be high, -1 where the target's label is no class of the model;
    ``deltas`` those of the right class.
    """

    logits: Float[Array, "b r k"]
    deltas: Float[Array, "b r 4"]
    columns: Int[Array, "b r"]
    targets: Float[Array, "b r 4"]
    positive: Bool[Array, "b r"]
    valid: Bool[Array, "b r"]


class MaskSample(NamedTuple):
    """Mask logits of the right class in ``m`` boxes of each image, those of objects, and targets in [0, 1]."""

    logits: Float[Array, "b m h w"]
    targets: Float[Array, "b m h w"]
    valid: Bool[Array, "b m"]


class CenterSample(NamedTuple):
    """What CenterNet2's first stage says of all ``n`` cells of its levels, and what it should say.

    ``heatmap`` is 1 in cells of centres. ``distances`` are from the middle of the cell to left, top, right and bottom
    of the object, in cells; their ``targets`` are of use where ``positive``. Cells that are not ``valid`` are padding.
    """

    logits: Float[Array, "b n"]
    heatmap: Float[Array, "b n"]
    distances: Float[Array, "b n 4"]
    targets: Float[Array, "b n 4"]
    positive: Bool[Array, "b n"]
    valid: Bool[Array, "b n"]


class RCNNSamples(NamedTuple):
    """What an R-CNN is trained on: predictions beside their targets. ``boxes`` has one sample for each stage.

    ``anchors`` are what its proposals are learned from, which CenterNet2 does in cells.
    """

    anchors: AnchorSample | CenterSample
    boxes: tuple[BoxSample, ...]
    masks: MaskSample | None = None


class MaskPrompts(NamedTuple):
    """What the mask of an object is asked for with: ``p`` prompts for each image, ``n`` points and perhaps a mask each.

    ``points`` are x, y of pixels in the model's images (whole numbers at their centres), and ``labels`` say what each
    is: 1 inside the object, 0 outside, 2 and 3 the corners of its box (top left, bottom right), -1 no point but a word
    that there is none, -2 nothing at all. ``masks`` are logits, four times finer than the model's features; those of
    prompts without ``has_mask`` (None: all have one) are arbitrary. ``layers.mask_prompts`` puts this together.
    """

    points: Float[Array, "b p n 2"]
    labels: Int[Array, "b p n"]
    masks: Float[Array, "b p h w"] | None = None
    has_mask: Bool[Array, "b p"] | None = None


class PromptedImages(NamedTuple):
    """Images, and for each the prompts that ask for masks in it."""

    images: Images
    prompts: MaskPrompts


class MaskPredictions(NamedTuple):
    """``m`` masks for each of ``p`` prompts: logits, and how much IoU with the object the model expects of each."""

    logits: Float[Array, "b p m h w"]
    iou: Float[Array, "b p m"]


class ClipOutputs(NamedTuple):
    """What CLIP and SigLIP say of images and texts: vectors of length one in a common space.

    Logits are ``scale * image @ text.T + bias``; a ``bias`` has SigLIP only. Row i of both are a pair in training.
    """

    image: Float[Array, "b d"]
    text: Float[Array, "t d"]
    scale: Float[Array, ""]
    bias: Float[Array, ""] | None = None


class MaskedImages(NamedTuple):
    """Images, and a number for each of their patches, row by row: a masked autoencoder sees those with the least."""

    images: Images
    noise: Float[Array, "b n"]


class PairsBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of images with a text about each.

    ``images`` stay uint8 until the device. ``weights`` and ``indices`` are those of ``ClassificationBatch``: 0 and -1
    on rows that only pad the batch.
    """

    images: UInt8[Array, "b h w c"]
    text: TextTokens
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]


class BertOutputs(NamedTuple):
    """What BERT says in pre-training: logits of the words, and of whether the second text of a pair is another's.

    Class 0 of ``next_sentence`` is that it follows the first, class 1 that it was drawn at random; None for models that
    are trained on hidden words alone. ``mlm_logits`` are of all ``n`` tokens, or of the places that were asked for.
    """

    mlm_logits: Float[Array, "b n v"]
    next_sentence: Float[Array, "b 2"] | None


class LanguageBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of texts, and the words that are to be told of each.

    BERT is asked for ``targets`` at ``positions`` of the text, and whether its second part follows the first
    (``next_sentence`` 0) or was drawn (1). T5's and other models' ``targets`` are a text of their own, or follow each
    token (``positions`` None). What stands in ``targets`` where ``target_mask`` is False is arbitrary. ``weights`` and
    ``indices`` are those of ``ClassificationBatch``: 0 and -1 on rows that only pad the batch.
    """

    text: TextTokens
    targets: Int[Array, "b m"]
    target_mask: Bool[Array, "b m"]
    positions: Int[Array, "b m"] | None
    next_sentence: Int[Array, " b"] | None
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]


class QueriedImages(NamedTuple):
    """Images, and for each of them ``q`` texts that name what is looked for: ``queries`` has the axes (b, q, n).

    A query without a real token asks for nothing. ``images`` and ``size`` are those of ``PaddedImages``.
    """

    images: Images
    size: Int[Array, "b 2"]
    queries: TextTokens


class QueriedPredictions(NamedTuple):
    """What an open-vocabulary detector says at each of ``n`` places of its grid.

    ``logits`` are of an object of each query being there, far below 0 for queries that ask for nothing.
    ``boxes_cxcywh`` are in [0, 1] of the whole image of the batch, its padding included. ``embeddings`` are what
    queries are compared with: made of another image, they can be queries themselves. ``objectness``: logits of any
    object at all, or None.
    """

    logits: Float[Array, "b n q"]
    boxes_cxcywh: Float[Array, "b n 4"]
    embeddings: Float[Array, "b n e"]
    objectness: Float[Array, "b n"] | None = None


class QueriedTargets(NamedTuple):
    """Objects of each image in ``g`` rows, as in ``DetectionTargets``, and which queries each of them answers."""

    boxes: Float[Array, "b g 4"]
    answers: Bool[Array, "b g q"]
    valid: Bool[Array, "b g"]


class QueriedBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of images, texts that name what is looked for in each, and what
    of it is there. ``queries`` has the axes (b, q, n); the other fields are those of ``DetectionBatch``.
    """

    images: UInt8[Array, "b h w c"]
    size: Int[Array, "b 2"]
    queries: TextTokens
    targets: QueriedTargets
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]


class LabelledTextBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of texts, or pairs of texts, with a class or a value of each.

    ``labels`` are class indices, or real values. ``weights`` and ``indices`` are those of ``ClassificationBatch``: 0
    and -1 on rows that only pad the batch.
    """

    text: TextTokens
    labels: Num[Array, " b"]
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]
