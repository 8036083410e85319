"""BERT and T5 pre-trained on large texts with the published hyperparameters."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.text_config import (
    LanguageConfig,
    LanguageModelConfig,
    LanguageTaskConfig,
    TextDataConfig,
    TextTokenizerConfig,
)


def wikibooks_bert_b() -> LanguageConfig:
    """BERT base on a folder of text, with the hyperparameters of Devlin et al. 2019, appendix A.2.

    Command: eqvision train wikibooks_bert_b --data.path WIKIBOOKS
    Data: WIKIBOOKS/**/*.txt with a sentence in each line and a blank line behind each document, such as Wikipedia and
    books (3.3 billion words in the paper). A vocabulary of 30,522 pieces is made of a sample of it;
    --tokenizer.path vocab.txt takes the published one.
    Published: one million steps of 256 texts, about 40 epochs, on 16 TPU chips in four days; no loss is given. What it
    is worth is measured by fine-tuning (GLUE, table 1: 79.6 on average). Not run here.
    Settings: Adam 1e-4 with 10,000 steps of warm-up and a linear fall to 0, betas 0.9 and 0.999, decay 0.01, dropout
    0.1, gradients clipped to norm 1. The paper takes texts of 128 tokens for 90 % of the steps and of 512 for the rest;
    this recipe takes 128: repeat it with --model.length 512 for the rest. Set loop.epochs so that steps are a million.
    """
    return LanguageConfig(
        model=LanguageModelConfig(name="bert_b", length=128),
        task=LanguageTaskConfig(objective="hidden_words", next_sentence=True),
        tokenizer=TextTokenizerConfig(size=30522),
        data=TextDataConfig(validation_share=0.001, num_threads=16),
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.01, beta2=0.999, eps=1e-6, clip_norm=1.0),
        schedule=ScheduleConfig(kind="linear", warmup_steps=10_000),
        loop=LoopConfig(
            epochs=40.0, batch_size=256, eval_batch_size=256, compute_dtype="bfloat16", log_every=100, eval_every=10_000
        ),
    )


def c4_t5_base() -> LanguageConfig:
    """T5 base (version 1.0) on a folder of text, with the hyperparameters of Raffel et al. 2020, section 3.1.

    Command: eqvision train c4_t5_base --data.path C4
    Data: C4/**/*.txt, UTF-8. A vocabulary of 32,100 pieces, 100 of them sentinels, is made of a sample of it;
    --tokenizer.path spiece.model takes the published one.
    Published: 524,288 steps of 128 texts of 512 tokens, 3.4e10 tokens and less than one epoch of C4; GLUE 83.28 on
    average after fine-tuning (table 1, baseline). Not run here.
    Settings: AdaFactor without momentum, the learning rate 1 / sqrt(max(step, 10,000)), no decay of weights, dropout
    0.1, spans of 3 tokens that take 15 %, z-loss 1e-4; documents follow each other without an end between them, as in
    the published code. Other than there the rate rises over the first 10,000 steps, and where T5's AdaFactor multiplies
    each update by the parameter's size, here the rate of all but embeddings and norms is multiplied by the size that
    matrices begin with, 768 ** -0.5. Set loop.epochs so that steps are 524,288.
    """
    return LanguageConfig(
        model=LanguageModelConfig(name="t5_base", length=512, vocab_size=32128),
        task=LanguageTaskConfig(objective="spans", share=0.15, mean_span=3.0, z_loss=1e-4),
        tokenizer=TextTokenizerConfig(size=32100),
        data=TextDataConfig(validation_share=0.001, num_threads=16),
        optimizer=OptimizerConfig(
            name="adafactor",
            learning_rate=1e-2,
            weight_decay=0.0,
            momentum=0.0,
            clip_norm=None,
            learning_rate_multipliers={r"attention|mlp|relative": 768**-0.5},
        ),
        schedule=ScheduleConfig(kind="rsqrt", warmup_steps=10_000, timescale=10_000),
        loop=LoopConfig(
            epochs=1.0, batch_size=128, eval_batch_size=128, compute_dtype="bfloat16", log_every=100, eval_every=10_000
        ),
    )
