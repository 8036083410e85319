"""What a classifier of texts begins with: published weights, a BERT that was pre-trained here, or nothing; and the
vocabulary that belongs to it."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from eqvision.data.text import GlueTexts, Tokenizer, load_tokenizer, train_wordpiece, wordpiece
from eqvision.language import BertPretraining, TextClassifier
from eqvision.names import nearest
from eqvision.predict import newest_state
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.load import read_model
from eqvision.problems.language import build_language_model
from eqvision.recipes.glue_config import GlueConfig
from eqvision.recipes.text_config import LanguageConfig
from eqvision.run_folder import RunFolder
from eqvision.zoo_language import LANGUAGE, language_builder

KEPT = "tokenizer.json"
SUFFIX = "_classifier"


def check_model(config: GlueConfig) -> None:
    """Raise UnknownNameError for what is no classifier of texts, ValueError for ``--init``."""
    require_text_classifier(config.model.name)
    if config.init:
        raise ValueError(f"--init {config.init}: give it as --model.weights; a classifier of texts begins with that")


def begin(config: GlueConfig, num_outputs: int, tokenizer: Tokenizer) -> TextClassifier:
    """The model as it is before step 0. Raises ValueError for weights that fit neither the configuration nor the
    vocabulary, and what ``eqvision.load`` raises."""
    model = _model(config, num_outputs, tokenizer)
    tokenizer.require_fits(model.backbone.vocab_size, f"{config.model.name} has")
    longest = model.backbone.position.weight.shape[0]
    if config.model.length > longest:
        raise ValueError(f"--model.length {config.model.length} is more than the {longest} positions of the model")
    return model


def require_text_classifier(name: str) -> None:
    """Raise UnknownNameError for what is no classifier of texts."""
    known = [other for other in LANGUAGE if other.endswith(SUFFIX)]
    if name not in known:
        raise nearest(name, known, "--model.name: classifier of texts")


def _is_run(weights: str) -> bool:
    return bool(weights) and RunFolder(weights).config_file.exists()


def _model(config: GlueConfig, num_outputs: int, tokenizer: Tokenizer) -> TextClassifier:
    model, key = config.model, jax.random.fold_in(jax.random.key(config.seed), 0)
    chosen = {name: getattr(model, name) for name in ("norm_order", "dropout", "remat", "unroll", "attention")}
    options = {name: value for name, value in chosen.items() if value is not None}
    if _is_run(model.weights):
        return _from_run(config, num_outputs, options, key)
    if model.weights:
        return read_model(model.name, model.weights, Sizes(num_outputs), options=options, key=key).model
    options |= {"vocab_size": tokenizer.vocab_size, "max_positions": max(512, model.length)}
    return language_builder(model.name, options)(num_classes=num_outputs, key=key)


def _from_run(config: GlueConfig, num_outputs: int, options: dict[str, Any], key: jax.Array) -> TextClassifier:
    """Encoder and pooler of the newest checkpoint of a run; the head is fresh."""
    folder, name = RunFolder(config.model.weights), config.model.name
    run = folder.config()
    if not isinstance(run, LanguageConfig) or f"{run.model.name}{SUFFIX}" != name:
        raise ValueError(
            f"--model.weights {folder.path} is a run that trains {run.model.name}, and --model.name {name} begins with "
            f"a run of {name.removesuffix(SUFFIX)}"
        )
    tokenizer = load_tokenizer(folder.path / KEPT)
    old = newest_state(folder, run, lambda: build_language_model(run, tokenizer)).state.evaluated
    assert isinstance(old, BertPretraining)
    options = {"norm_order": "pre" if old.backbone.norm is not None else "post", **options}
    sizes = {"vocab_size": old.backbone.vocab_size, "max_positions": old.backbone.position.weight.shape[0]}
    new = language_builder(name, {**options, **sizes})(num_classes=num_outputs, key=key)
    new = eqx.tree_at(lambda m: m.backbone, new, _with_leaves_of(old.backbone, new.backbone, config))
    return new if old.pooler is None else eqx.tree_at(lambda m: m.pooler, new, old.pooler)


def _with_leaves_of(old: Any, new: Any, config: GlueConfig) -> Any:
    """``new`` with the numbers of ``old``: what is static, such as dropout, stays."""
    if [leaf.shape for leaf in jax.tree.leaves(old)] != [leaf.shape for leaf in jax.tree.leaves(new)]:
        raise ValueError(f"--model.weights {config.model.weights} has other norms than --model.norm-order asks for")
    return jax.tree.unflatten(jax.tree.structure(new), jax.tree.leaves(old))


def run_tokenizer(config: GlueConfig, texts: GlueTexts) -> Tokenizer:
    """What the run folder keeps; else the vocabulary that is named; else that of the weights; else one of the texts.

    Raises ValueError where none lies beside the weights, and what tokenizers raise.
    """
    kept, options, weights = Path(config.out, KEPT), config.tokenizer, config.model.weights
    if config.out and kept.exists():
        return load_tokenizer(kept)
    if options.path:
        return wordpiece(options.path, lowercase=options.lowercase)
    if not weights:
        return train_wordpiece([*texts.first, *(texts.second or ())], options.size, lowercase=options.lowercase)
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    if not any((folder / name).is_file() for name in ("vocab.txt", KEPT)):
        raise ValueError(
            f"no vocab.txt and no tokenizer.json lies beside --model.weights {weights}; give the vocabulary that "
            "belongs to the weights: --tokenizer.path"
        )
    return wordpiece(folder, lowercase=options.lowercase)
