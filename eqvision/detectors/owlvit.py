"""OWL-ViT (Minderer et al. 2022) and OWLv2 (Minderer et al. 2023): CLIP's towers, and at each patch an object or none.

What is looked for is told by texts, or by an object in another image (``like_object``). The sizes are those of
scenic/projects/owl_vit; its heads have GELU by a hyperbolic tangent and a merging norm with eps 1e-6, where those of
transformers have exact GELU and 1e-5.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eqvision.backbones import VisionTransformer
from eqvision.backbones.clip_text import ClipText, TextSize
from eqvision.backbones.vit import PositionKind, ViTSize
from eqvision.heads.embedding import EndTokenProjection
from eqvision.heads.open_vocabulary import OpenVocabularyHead
from eqvision.layers import Activation, Implementation, LayerNorm, Remat, fold, mimetic_attention
from eqvision.names import nearest
from eqvision.ops.boxes import cxcywh_to_xyxy, pairwise_giou, pairwise_iou
from eqvision.types import Images, QueriedImages, QueriedPredictions, TextTokens

NEAR = 0.8  # of the best IoU: boxes that may stand for the object of an example


class OwlViT(eqx.Module):
    """All tokens of CLIP's image tower behind its final norm; each patch times the class token, normalised; the heads.

    Text embeddings are those of CLIP's text tower, projected. Images of any size that the patch divides are legal; the
    published models take squares, padded at the right and below (the first version in transformers: squeezed).
    """

    backbone: VisionTransformer
    text_tower: ClipText
    text_head: EndTokenProjection
    merge_norm: LayerNorm
    head: OpenVocabularyHead

    def __call__(
        self, inputs: QueriedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[QueriedPredictions, eqx.nn.State]:
        patches, state = self.encode_images(inputs.images, state, train=train, key=fold(key, 0))
        queries = self.encode_queries(inputs.queries, dtype=inputs.images.dtype, train=train, key=fold(key, 1))
        return self.predict(patches, queries, jnp.any(inputs.queries.mask, axis=-1)), state

    def encode_images(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b r s d"], eqx.nn.State]:
        """Patches with the class token merged into them, which is what the heads read."""
        features, state = self.backbone(images, state, train=train, key=key)
        return self.merge_norm(features.patches * features.prefix[:, :1, None]), state

    def encode_queries(
        self, text: TextTokens, *, dtype: jnp.dtype | None = None, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "... e"]:
        """One embedding for each text, for any number of axes before that of the tokens; of any length."""
        flat = TextTokens(*(x.reshape(-1, x.shape[-1]) for x in (text.ids, text.mask)))
        embeddings = self.text_head(self.text_tower(flat, dtype=dtype, train=train, key=key), flat)
        return embeddings.reshape(*text.ids.shape[:-1], embeddings.shape[-1])

    def predict(
        self, patches: Float[Array, "b h w d"], queries: Float[Array, "b q e"], asked: Bool[Array, "b q"]
    ) -> QueriedPredictions:
        """For embeddings of texts or of objects; those with ``asked`` False may hold anything."""
        b, h, w, d = patches.shape
        flat = patches.reshape(b, h * w, d)
        return QueriedPredictions(
            self.head.classes(flat, queries, asked),
            self.head.boxes_cxcywh(patches),
            self.head.classes.embed(flat.astype(jnp.float32)),
            self.head.object_logits(patches),
        )

    def intermediates(self, inputs: QueriedImages, state: eqx.nn.State, layers: tuple[int, ...]) -> tuple:
        """Features of the image tower's ``layers``."""
        return self.backbone.intermediates(inputs.images, state, layers)


class Example(NamedTuple):
    """An object of one image as a query for others, and the place of the grid that it was taken from."""

    embedding: Float[Array, "b e"]
    place: Int[Array, " b"]


def like_object(
    model: OwlViT, images: Images, state: eqx.nn.State, boxes: Float[Array, "b 4"] | None = None
) -> Example:
    """The embedding of the object in each of ``images``: that in the box (xyxy in [0, 1] of the image).

    Without boxes it is what fills the image, or in the second version the place of the highest objectness.

    Of the places whose boxes overlap the object nearly best (``NEAR``), the one that is least like the average of the
    image is taken: bipartite matching trains one place for each object, and the others to be background. Where nothing
    overlaps, the nearest boxes are taken by GIoU, as in Scenic; transformers then finds none. Give its ``embedding``,
    with an axis for the query, to ``model.predict``.
    """
    patches, _ = model.encode_images(images, state)
    embeddings = model.head.classes.embed(patches.reshape(len(images), -1, patches.shape[-1]).astype(jnp.float32))
    objects = model.head.object_logits(patches)
    if boxes is None and objects is not None:
        place = jnp.argmax(objects, axis=1)
    else:
        boxes = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), (len(images), 4)) if boxes is None else boxes
        near = _near(cxcywh_to_xyxy(model.head.boxes_cxcywh(patches)), boxes)
        likeness = jnp.einsum("bd,bnd->bn", embeddings.mean(axis=1), embeddings)
        place = jnp.argmin(jnp.where(near, likeness, jnp.inf), axis=1)
    return Example(jnp.take_along_axis(embeddings, place[:, None, None], axis=1)[:, 0], place)


def _near(found: Float[Array, "b n 4"], wanted: Float[Array, "b 4"]) -> Bool[Array, "b n"]:
    iou, giou = (measure(found, wanted[:, None])[..., 0] for measure in (pairwise_iou, pairwise_giou))
    best = jnp.max(iou, axis=1, keepdims=True)
    # GIoU is negative here: a fifth further off.
    fallback = giou >= jnp.max(jnp.minimum(giou, 0.0), axis=1, keepdims=True) * (2 - NEAR)
    return jnp.where(best > 0, iou >= best * NEAR, fallback)


class OwlViTSize(NamedTuple):
    """A published OWL-ViT: towers, pixels of a patch and of the image, and the dimension of embeddings."""

    vision: ViTSize
    patch_size: int
    image_size: int
    text: TextSize
    embed_dim: int


_B = ViTSize(768, 12, 12, 3072)
_TEXT_B = TextSize(512, 12, 8, 2048)
_L = ViTSize(1024, 24, 16, 4096)
_TEXT_L = TextSize(768, 12, 12, 3072)

OWLVIT_SIZES = {
    "b32": OwlViTSize(_B, 32, 768, _TEXT_B, 512),
    "b16": OwlViTSize(_B, 16, 768, _TEXT_B, 512),
    "l14": OwlViTSize(_L, 14, 840, _TEXT_L, 768),
    "v2_b16": OwlViTSize(_B, 16, 960, _TEXT_B, 512),
    "v2_l14": OwlViTSize(_L, 14, 1008, _TEXT_L, 768),
    "small": OwlViTSize(ViTSize(128, 4, 4, 512), 8, 96, TextSize(64, 2, 2, 256), 64),
}
"""``small`` is ours, for small images and few words; the others are published."""


def owlvit(
    size: str | OwlViTSize,
    *,
    objectness: bool = False,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    vocab_size: int = 49408,
    length: int = 16,
    end_id: int | None = None,
    activation: Activation = "quick_gelu",
    eps: float = 1e-5,
    head_activation: Activation = "gelu",
    merge_eps: float = 1e-5,
    position: PositionKind = "learned",
    mimetic: bool = False,
    class_std: float = 1e-6,
    class_factor: float = 1.0,
    drop_path: float = 0.0,
    text_drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> OwlViT:
    """OWL-ViT of a size of ``OWLVIT_SIZES`` or of your own; ``objectness`` for the second version.

    ``position`` is that of patches in the image tower, and ``mimetic`` lets them attend to what is like them to begin
    with (``mimetic_attention``). ``length`` is that of the longest text, ``end_id`` as in ``pool_end``, ``class_std``
    and ``class_factor`` as in ``QueryClassHead``. Scenic's models have ``head_activation="gelu_tanh"`` and
    ``merge_eps=1e-6``, and are trained with ``drop_path`` 0.2 and ``text_drop_path`` 0.1. Raises UnknownNameError for
    a size that is not there.
    """
    if isinstance(size, str) and size not in OWLVIT_SIZES:
        raise nearest(size, list(OWLVIT_SIZES), "OWL-ViT size")
    size = OWLVIT_SIZES[size] if isinstance(size, str) else size
    keys, width = jax.random.split(key, 4), size.vision.width
    options = {"activation": activation, "eps": eps, "implementation": attention}
    options |= {"remat": remat, "unroll": unroll}
    tower = VisionTransformer(
        size.vision,
        size.patch_size,
        image_size=size.image_size if image_size is None else image_size,
        in_channels=in_channels,
        patch_bias=False,
        pre_norm=True,
        position=position,
        drop_path=drop_path,
        **options,
        key=keys[0],
    )
    if mimetic:
        attend = mimetic_attention(tower.encoder.blocks.attention, key=jax.random.fold_in(keys[0], 1))
        tower = eqx.tree_at(lambda t: t.encoder.blocks.attention, tower, attend)
    text = ClipText(size.text, vocab_size=vocab_size, length=length, drop_path=text_drop_path, **options, key=keys[1])
    return OwlViT(
        tower,
        text,
        EndTokenProjection(size.text.width, size.embed_dim, end_id=end_id, key=keys[2]),
        LayerNorm(width, eps=merge_eps),
        OpenVocabularyHead(
            width,
            size.embed_dim,
            objectness=objectness,
            activation=head_activation,
            class_std=class_std,
            class_factor=class_factor,
            key=keys[3],
        ),
    )
