"""Published models of images and text, used as a run is: image files are told by names (``predict_pairs.py``)."""

import re
import string
import sys
from pathlib import Path

from eqvision.data import eval_transform
from eqvision.data.text import Tokenizer, clip_bpe, unigram
from eqvision.multimodal import Clip
from eqvision.names import nearest
from eqvision.predict_pairs import ContrastiveRun
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.load import read_model
from eqvision.pretrained.locate import locate
from eqvision.pretrained.preprocess import known_preprocessing, usual_preprocessing
from eqvision.recipes import ClipModelConfig, ContrastiveConfig, ContrastiveLossConfig, PairsDataConfig, TokenizerConfig
from eqvision.zoo_language import clip_names

PUNCTUATION = str.maketrans("", "", string.punctuation)


def load_published_clip(name: str, source: str | Path | None = None, *, layout: str | None = None) -> ContrastiveRun:
    """The zoo's CLIP or SigLIP ``name`` with published weights and the vocabulary that lies in the same folder.

    Images are prepared by the card of the weights, else by ``preprocessor_config.json`` beside the file, else as is
    usual for the layout; standard error says which. SigLIP's texts are made lower case and lose their punctuation, as
    in training. Raises UnknownNameError, what ``eqvision.load`` raises, and FileNotFoundError without a vocabulary.
    """
    if name not in clip_names():
        raise nearest(name, clip_names(), "model of images and text")
    location = locate(name, source)
    loaded = read_model(name, location.path, Sizes(), layout=layout or location.layout)
    model = loaded.model
    found = known_preprocessing(name, source, location.path) or usual_preprocessing(name, loaded.layout.name)
    print(f"images are prepared by {found.origin}", file=sys.stderr)
    prepared, sigmoid = found.preprocessing, model.logit_bias is not None
    folder = location.path if location.path.is_dir() else location.path.parent
    tokenizer = _vocabulary(folder, sigmoid=sigmoid)
    tokenizer.require_fits(len(model.text_tower.token_embedding.weight), name)
    config = ContrastiveConfig(
        model=ClipModelConfig(name, prepared.size, model.image_tower.in_channels, _length(model)),
        task=ContrastiveLossConfig(loss="sigmoid" if sigmoid else "softmax"),
        data=PairsDataConfig(mean=prepared.mean, std=prepared.std),
        tokenizer=TokenizerConfig(kind="unigram" if sigmoid else "clip_bpe"),
    )
    evaluate = eval_transform("none", prepared.size, prepared.interpolation, prepared.crop_fraction)
    return ContrastiveRun(config, (), tokenizer, model, loaded.state, 0, evaluate, bare_words if sigmoid else str)


def _vocabulary(folder: Path, *, sigmoid: bool) -> Tokenizer:
    """SigLIP sees what texts are filled up with: their end."""
    return unigram(folder, num_sentinels=0, pad="</s>") if sigmoid else clip_bpe(folder)


def _length(model: Clip) -> int:
    return len(model.text_tower.position.weight)


def bare_words(text: str) -> str:
    """Lower case, without punctuation, single spaces."""
    return re.sub(r"\s+", " ", text.lower().translate(PUNCTUATION)).strip()
