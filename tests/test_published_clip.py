"""Published models of images and text tell image files by names, with the numbers of transformers."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

from eqvision import UnknownNameError
from eqvision.backbones import TextSize, ViTSize
from eqvision.cli import main
from eqvision.data import normalize
from eqvision.data.text import train_bpe, train_unigram
from eqvision.multimodal import ClipViTSize, SiglipSize, clip_vit, siglip
from eqvision.predict_pairs import tell_by_name
from eqvision.published_clip import bare_words, load_published_clip
from eqvision.zoo_language import LANGUAGE

SIDE, LENGTH, NAMES = 16, 40, ("cat", "Hat", "red fox!")
TEXTS = ["a photo of a cat", "a hat", "a red fox"] * 3
VISION, TEXT = ViTSize(32, 2, 4, 64), TextSize(24, 3, 2, 48)
TOYS = {
    "toy_clip": partial(clip_vit, ClipViTSize(VISION, 8, SIDE, TEXT, 12), length=LENGTH),
    "toy_siglip": partial(siglip, SiglipSize(VISION, 8, SIDE, TEXT), length=LENGTH),
}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, build in TOYS.items():
        monkeypatch.setitem(LANGUAGE, name, build)


@pytest.fixture
def images(tmp_path, rng):
    paths = [tmp_path / "wide.png", tmp_path / "high.png"]
    for path, shape in zip(paths, ((24, 40, 3), (33, 20, 3)), strict=True):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return paths


def saved(kind, folder, vocab_size):
    """transformers' model with random parameters, its image processor beside it."""
    import torch
    import transformers

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    vision |= {"image_size": SIDE, "patch_size": 8}
    text |= {"vocab_size": vocab_size, "max_position_embeddings": LENGTH, "eos_token_id": vocab_size - 1}
    more = {"projection_dim": 12} if kind == "CLIP" else {}
    text |= {} if kind == "CLIP" else {"projection_size": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **more)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(0.2 * torch.randn(leaf.shape))
    processor = {"size": {"height": SIDE, "width": SIDE}} if kind == "Siglip" else {}
    processor = processor or {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = getattr(transformers, f"{kind}ImageProcessor")(**processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_probabilities_are_those_of_transformers(kind, images, tmp_path):
    """Of pixels, a few differ by some grey levels: transformers resizes by torchvision, which rounds between rows and
    columns elsewhere than Pillow. Beyond that all is equal to 1e-5."""
    import torch

    clip, folder = kind == "CLIP", tmp_path / "weights"
    tokenizer = train_bpe(TEXTS, 514) if clip else train_unigram(map(bare_words, TEXTS), 60, num_sentinels=0)
    model, processor = saved(kind, folder, tokenizer.vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    run = load_published_clip("toy_clip" if clip else "toy_siglip", folder)
    told = tell_by_name(run, images, names=NAMES, templates=("a photo of a {}",), top=3, batch_size=4)
    sentences = [f"a photo of a {name}" for name in NAMES]
    sentences = sentences if clip else [bare_words(sentence) for sentence in sentences]
    text = run.tokenizer.encode_batch(sentences, LENGTH)
    mask = {"attention_mask": torch.tensor(text.mask).long()} if clip else {}
    pixels = np.stack([run.evaluate(np.asarray(Image.open(path))) for path in images])
    pixels = torch.tensor(normalize(pixels, run.config.data.mean, run.config.data.std).transpose(0, 3, 1, 2))
    theirs = processor([Image.open(path) for path in images], return_tensors="pt")["pixel_values"]
    assert float((pixels - theirs).abs().mean()) * min(run.config.data.std) * 255 < 0.3
    logits = model(torch.tensor(text.ids).long(), pixels, **mask).logits_per_image.detach()
    expected = torch.softmax(logits, -1) if clip else torch.sigmoid(logits)
    for row, prediction in zip(expected.numpy(), told, strict=True):
        found = dict(zip(prediction.labels, prediction.scores, strict=True))
        np.testing.assert_allclose([found[name] for name in NAMES], row, rtol=1e-5)
        assert len({f"{score:.4f}" for score in row}) == len(NAMES)


def test_words_of_siglip_are_bare():
    assert bare_words("  A photo,\nof  black-and-white Cats! ") == "a photo of blackandwhite cats"


@pytest.mark.parametrize("name", ["resnet50", "clip_vit_b23"])
def test_what_is_no_clip_is_refused(name):
    with pytest.raises(UnknownNameError, match="model of images and text"):
        load_published_clip(name)


def test_names_are_asked_for_before_weights_are_read(images, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "clip_vit_b32", str(images[0])])
    assert "clip_vit_b32 knows no classes: say what may be in the images, --queries cat dog" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", "clip_vit_b32", str(images[0]), "--queries", "cat", "--image-size", "64"])
    assert "--image-size 64 is not for clip_vit_b32: its images have a size of their own" in capsys.readouterr().err
