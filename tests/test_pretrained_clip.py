"""CLIP and SigLIP of transformers, and OpenAI's CLIP: built small with random numbers, saved, loaded, and compared."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import TextSize, ViTSize
from eqvision.multimodal import ClipResNetSize, ClipViTSize, SiglipSize, clip_logits, clip_resnet, clip_vit, siglip
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.layouts.clip_hf import clip_from_config
from eqvision.pretrained.load import read_model
from eqvision.types import TextTokens
from eqvision.zoo_language import LANGUAGE

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
VOCAB, LENGTH, SIDE, EMBED = 40, 9, 16, 12
VISION, TEXT = ViTSize(32, 2, 4, 64), TextSize(24, 3, 2, 48)
TEXT_4 = TEXT._replace(mlp_dim=96)  # OpenAI's MLPs are four times as wide
TOYS = {
    "toy_clip": partial(clip_vit, ClipViTSize(VISION, 8, SIDE, TEXT, EMBED)),
    "toy_siglip": partial(siglip, SiglipSize(VISION, 8, SIDE, TEXT)),
    "toy_resnet": partial(clip_resnet, ClipResNetSize((1, 2, 1, 1), 8, 4, 64, TEXT_4, EMBED)),
    "toy_openai": partial(clip_vit, ClipViTSize(VISION._replace(mlp_dim=128), 8, SIDE, TEXT_4, EMBED)),
}
IDS = np.array([[38, 5, 39, 0, 0, 0, 0, 0, 0], [38, 7, 3, 9, 4, 2, 1, 6, 39], [38, 39, 39, 39, 39, 39, 39, 39, 39]])
MASK = np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 9, [1, 1] + [0] * 7], bool)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, build in TOYS.items():
        monkeypatch.setitem(LANGUAGE, name, build)


def images(rng, side=SIDE):
    return rng.normal(size=(3, side, side, 3)).astype(np.float32)


def ours(name, path, given, *, mask, **options):
    model, state = load(name, path, **options)
    text = TextTokens(jnp.asarray(IDS), jnp.asarray(mask))
    outputs = jax.jit(lambda model, images, text: model(images, text, state)[0])(model, jnp.asarray(given), text)
    return model, state, outputs


def published(kind, rng, **text_options):
    """transformers' model with random parameters, biases and scales too."""
    import torch
    import transformers

    towers = {"vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}}
    towers["vision_config"] |= {"intermediate_size": 64, "image_size": SIDE, "patch_size": 8}
    towers["text_config"] = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    towers["text_config"] |= {"intermediate_size": 48, "max_position_embeddings": LENGTH, **text_options}
    more = {"projection_dim": EMBED} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(**towers, **more)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.tensor(rng.normal(size=leaf.shape), dtype=torch.float32)
            wide = leaf.ndim > 1 and "embedding" not in name
            leaf.copy_(noise / leaf[0].numel() ** 0.5 if wide else ("norm" in name) + 0.3 * noise)
    return model


def compare(outputs, theirs, assert_close):
    assert_close(outputs.image, theirs.image_embeds.detach().numpy(), TOLERANCE)
    assert_close(outputs.text, theirs.text_embeds.detach().numpy(), TOLERANCE)
    assert_close(clip_logits(outputs), theirs.logits_per_image.detach().numpy(), TOLERANCE)


@pytest.mark.parametrize("end", [39, 2])
def test_clip_of_transformers(tmp_path, rng, assert_close, end):
    """Padded texts; the end is found by its number, and by the highest one where config.json says 2."""
    import torch

    model = published("CLIP", rng, eos_token_id=end)
    model.save_pretrained(tmp_path)
    given = images(rng)
    pixels, ids = torch.tensor(given.transpose(0, 3, 1, 2)), torch.tensor(IDS)
    clip, state, outputs = ours("toy_clip", tmp_path, given, mask=MASK)
    assert clip.text_head.end_id == (None if end == 2 else 39)
    compare(outputs, model(ids, pixels, attention_mask=torch.tensor(MASK).long()), assert_close)
    larger = rng.normal(size=(1, 24, 32, 3)).astype(np.float32)
    at_size, state = load("toy_clip", tmp_path, image_size=(24, 32))
    found, _ = jax.jit(lambda model, images: model.encode_images(images, state))(at_size, jnp.asarray(larger))
    pixels = torch.tensor(larger.transpose(0, 3, 1, 2))
    theirs = model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    assert_close(found, torch.nn.functional.normalize(theirs, dim=1).detach().numpy(), TOLERANCE)
    tensors = to_layout(clip, state, LAYOUTS["hf_clip"])
    names = {name: leaf for name, leaf in model.state_dict().items() if "position_ids" not in name}
    assert_close(tensors, {name: names[name].numpy() for name in tensors}, 0)
    assert len(tensors) == len(names)


@pytest.mark.parametrize("masked", [False, True])
def test_siglip_of_transformers(tmp_path, rng, assert_close, masked, monkeypatch):
    """Without a mask, as it was trained, and with one."""
    import torch

    monkeypatch.setitem(LANGUAGE, "toy_siglip", partial(TOYS["toy_siglip"], attend_padding=not masked))
    model = published("Siglip", rng, projection_size=32)
    model.save_pretrained(tmp_path)
    given = images(rng)
    pixels, ids = torch.tensor(given.transpose(0, 3, 1, 2)), torch.tensor(IDS)
    _, _, outputs = ours("toy_siglip", tmp_path, given, mask=MASK)
    assert_close(outputs.bias, model.logit_bias.detach().numpy()[0], 0)
    compare(outputs, model(ids, pixels, attention_mask=torch.tensor(MASK).long() if masked else None), assert_close)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_openai(tmp_path, rng, assert_close, kind):
    """A state dict, and a TorchScript program of halves, which is what OpenAI published."""
    import clip_references as references
    import torch

    side, name = (SIDE, "toy_openai") if kind == "vit" else (64, "toy_resnet")
    if kind == "vit":
        visual = references.VisionTransformer(SIDE, 8, 32, 2, 4, EMBED)
    else:
        visual = references.ModifiedResNet((1, 2, 1, 1), 8, 4, side, EMBED)
    model = references.CLIP(visual, vocab=VOCAB, length=LENGTH, width=24, depth=3, heads=2, out=EMBED)
    model = references.randomised(model)
    for leaf in model.parameters():
        leaf.data = leaf.data.half().float()
    given = images(rng, side)
    pixels, ids = torch.tensor(given.transpose(0, 3, 1, 2)), torch.tensor(IDS)
    names = [name for name in model.state_dict() if name not in ("context_length", "vocab_size")]
    torch.save({name: model.state_dict()[name] for name in names}, tmp_path / "dict.pt")
    expected = [x.detach().numpy() for x in model(pixels, ids)]
    clip, state, outputs = ours(name, tmp_path / "dict.pt", given, mask=MASK, layout=f"openai_clip_{kind}")
    assert_close([outputs.image, outputs.text], expected, TOLERANCE)
    tensors = to_layout(clip, state, LAYOUTS[f"openai_clip_{kind}"])
    assert_close(tensors, {name: model.state_dict()[name].numpy() for name in tensors}, 0)

    with pytest.raises(
        WeightsError, match=rf"fits several layouts \(openai_clip_{kind}, open_clip_{kind}\); choose one"
    ):
        load(name, tmp_path / "dict.pt")
    exact, _ = load(name, tmp_path / "dict.pt", layout=f"open_clip_{kind}")
    assert exact.text_tower.encoder.blocks.mlp.activation == "gelu"

    model.register_buffer("input_resolution", torch.tensor(side))
    program = torch.jit.trace(model, (pixels, ids), check_trace=False)
    for leaf in program.parameters():
        leaf.data = leaf.data.half()
    program.save(tmp_path / "program.pt")
    again, _ = load(name, tmp_path / "program.pt")
    assert_close(again, clip, 0)


def test_what_is_refused(tmp_path, rng):
    model = published("CLIP", rng)
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="vocab_size is 40 in the file, and 41 is asked for"):
        read_model("toy_clip", tmp_path, Sizes(), options={"vocab_size": 41})
    with pytest.raises(WeightsError, match="hidden_act is gelu of texts and quick_gelu of images"):
        clip_from_config({"text_config": {"hidden_act": "gelu"}})
    with pytest.raises(WeightsError, match=r"eos_token_id of text_config is \[1, 2\]; expected one number"):
        clip_from_config({"text_config": {"eos_token_id": [1, 2]}})
    model.config.text_config.num_attention_heads = 4
    model.config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"the model \(text_config\) here is not.*\n?.*num_attention_heads = 4"):
        load("toy_clip", tmp_path)
