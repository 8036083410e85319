"""Small language models on a plain text, in minutes on a CPU: BERT and T5 with a vocabulary of the text's own."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.text_config import (
    LanguageConfig,
    LanguageModelConfig,
    LanguageTaskConfig,
    TextTokenizerConfig,
)


def text_bert() -> LanguageConfig:
    """A small BERT (two layers of 128 channels, norms in front) learns the words of a text that are hidden from it.

    Command: eqvision train text_bert --data.path FILE.txt
    Data: a text file of about a megabyte or more, or a folder with *.txt; needs the extra [text]. Its last tenth is
    evaluated on, and the vocabulary is made of the rest.
    Cost and result: 10 processor minutes; on Shakespeare's plays `test/word_loss` is 3.86, that of the words behind
    `[MASK]` in nats, where `test/unigram_loss`, of knowing how often words come and nothing else, is 5.56.
    """
    return LanguageConfig(
        model=LanguageModelConfig(name="bert_ti", length=64, norm_order="pre", mimetic=True, dropout=0.0),
        # twice the words that BERT was asked for: twice the gradients from the same work (Wettig et al. 2023)
        task=LanguageTaskConfig(objective="hidden_words", next_sentence=False, share=0.3),
        tokenizer=TextTokenizerConfig(size=512),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            weight_decay=0.01,
            beta2=0.98,
            clip_norm=1.0,
            learning_rate_multipliers={"position": 0.1},  # sines stay sines until they are of use
        ),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=100),
        loop=LoopConfig(epochs=20.0, batch_size=32, eval_batch_size=64, log_every=20, eval_every=500),
    )


def text_t5() -> LanguageConfig:
    """A small T5 (two and two layers of 128 channels) learns to write the spans that were taken out of a text.

    Command: eqvision train text_t5 --data.path FILE.txt
    Data: a text file of about a megabyte or more, or a folder with *.txt; needs the extra [text]. Its last tenth is
    evaluated on, and the vocabulary is made of the rest.
    Cost and result: 14 processor minutes; on Shakespeare's plays `test/word_loss` is 4.11, that of words alone and not
    of the sentinels between spans, where `test/unigram_loss` is 5.36.
    """
    return LanguageConfig(
        model=LanguageModelConfig(name="t5_xs", length=64, mimetic=True, dropout=0.0),
        task=LanguageTaskConfig(objective="spans", share=0.3, z_loss=1e-4),
        tokenizer=TextTokenizerConfig(size=512, num_sentinels=32),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            weight_decay=0.01,
            beta2=0.98,
            clip_norm=1.0,
            learning_rate_multipliers={"token_embedding": 5.0},  # T5's words begin with the size 1, and move slowly
        ),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=100),
        loop=LoopConfig(epochs=18.0, batch_size=32, eval_batch_size=64, log_every=20, eval_every=500),
    )
