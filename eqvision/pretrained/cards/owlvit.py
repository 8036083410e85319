"""OWL-ViT and OWLv2: the conversions on huggingface.co of Scenic's files."""

from eqvision.pretrained.cards.card import OPENAI_MEAN, OPENAI_STD, Card, Preprocessing

README = "https://github.com/google-research/scenic/blob/main/scenic/projects/owl_vit/README.md"
NOTE = "measured on images padded to a square, as in Scenic; the first version's repositories squeeze images"

# Model, repository, size of images, LVIS val AP and that of rare classes
ROWS = (
    ("owlvit_b32", "google/owlvit-base-patch32", 768, 19.3, 16.9),
    ("owlvit_b16", "google/owlvit-base-patch16", 768, 20.8, 17.1),
    ("owlvit_l14", "google/owlvit-large-patch14", 840, 34.6, 31.2),
    ("owlv2_b16", "google/owlv2-base-patch16-ensemble", 960, 43.9, 40.5),
    ("owlv2_l14", "google/owlv2-large-patch14-ensemble", 1008, 44.6, 42.6),
)


def owlvit_card(name: str, repository: str, size: int, ap: float, rare: float) -> Card:
    layout = "hf_owlv2" if name.startswith("owlv2") else "hf_owlvit"
    images = Preprocessing(size, OPENAI_MEAN, OPENAI_STD, crop_fraction=0.0)
    metric = f"LVIS val AP {ap}, of rare classes {rare}"
    return Card(name, "hf", layout, f"hf:{repository}", None, "Apache-2.0", images, metric, README, NOTE)


CARDS: tuple[Card, ...] = tuple(owlvit_card(*row) for row in ROWS)
