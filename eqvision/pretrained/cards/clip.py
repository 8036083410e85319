"""CLIP and SigLIP: OpenAI's files, and the repositories of both on huggingface.co.

Digests are in the addresses of OpenAI's files.
"""

from eqvision.pretrained.cards.card import HALF, OPENAI_MEAN, OPENAI_STD, Card, Preprocessing

CLIP_PAPER = "https://arxiv.org/abs/2103.00020"
SIGLIP_PAPER = "https://arxiv.org/abs/2303.15343"
FILES = "https://openaipublic.azureedge.net/clip/models"

# Model, OpenAI's file, its digest, repository of the conversion where there is one, size of images
ROWS = (
    (
        "clip_vit_b32",
        "ViT-B-32",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "openai/clip-vit-base-patch32",
        224,
    ),
    (
        "clip_vit_b16",
        "ViT-B-16",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        "openai/clip-vit-base-patch16",
        224,
    ),
    (
        "clip_vit_l14",
        "ViT-L-14",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "openai/clip-vit-large-patch14",
        224,
    ),
    (
        "clip_vit_l14_336",
        "ViT-L-14-336px",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "openai/clip-vit-large-patch14-336",
        336,
    ),
    ("clip_resnet50", "RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "", 224),
    ("clip_resnet101", "RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "", 224),
    ("clip_resnet50x4", "RN50x4", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "", 288),
    ("clip_resnet50x16", "RN50x16", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "", 384),
    ("clip_resnet50x64", "RN50x64", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "", 448),
)
SIGLIP_ROWS = (
    ("siglip_b16", "google/siglip-base-patch16-224", 224),
    ("siglip_l16", "google/siglip-large-patch16-256", 256),
    ("siglip_so400m14", "google/siglip-so400m-patch14-384", 384),
)


def clip_preprocessing(size: int) -> Preprocessing:
    """The shorter side to the size, and the middle."""
    return Preprocessing(size, OPENAI_MEAN, OPENAI_STD, crop_fraction=1.0)


def siglip_preprocessing(size: int) -> Preprocessing:
    """Both sides to the size."""
    return Preprocessing(size, HALF, HALF, crop_fraction=0.0)


def clip_cards(name: str, file: str, sha256: str, repository: str, size: int) -> tuple[Card, ...]:
    layout = "openai_clip_resnet" if name.startswith("clip_resnet") else "openai_clip_vit"
    metric, prepared = "zero-shot classification: table 11 of the paper", clip_preprocessing(size)
    own = Card(name, "openai", layout, f"{FILES}/{sha256}/{file}.pt", sha256, "MIT", prepared, metric, CLIP_PAPER)
    if not repository:
        return (own,)
    return own, Card(name, "openai_hf", "hf_clip", f"hf:{repository}", None, "MIT", prepared, metric, CLIP_PAPER)


def siglip_card(name: str, repository: str, size: int) -> Card:
    metric = "for zero-shot classification and retrieval; figures are in the paper"
    prepared = siglip_preprocessing(size)
    return Card(name, "webli", "hf_siglip", f"hf:{repository}", None, "Apache-2.0", prepared, metric, SIGLIP_PAPER)


CARDS = (*(card for row in ROWS for card in clip_cards(*row)), *(siglip_card(*row) for row in SIGLIP_ROWS))
