"""CLIP and SigLIP on images with captions, as they were published, or fine-tuned on your own."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.contrastive_config import (
    ClipModelConfig,
    ContrastiveConfig,
    ContrastiveLossConfig,
    PairsDataConfig,
    TokenizerConfig,
)


def pairs_clip_b32() -> ContrastiveConfig:
    """CLIP with a ViT-B/32 on images with captions, with the hyperparameters of Radford et al. 2021 (tables 18 to 20).

    Command: eqvision train pairs_clip_b32 --data.path PATH
    Data: PATH/{train,val}/ with captions.jsonl, captions.tsv or a text file beside each image; --data.kind coco for
    COCO's captions. docs/image_text.md has the layouts. --data.zero-shot-path IMAGENET measures zero-shot accuracy.
    Published: 63.2 % zero-shot on ImageNet (table 11), trained on 400 million private pairs. Not run here.
    Settings: batch 32,768 for 32 epochs, Adam with decoupled weight decay 0.2, beta2 0.98, epsilon 1e-6, rate 5e-4
    after 2,000 steps along a cosine, temperature from 0.07, scale at most 100. Random regions of 90 to 100 % of the
    area are open_clip's; published was a random square. The vocabulary is made of the captions; --tokenizer.path FILE
    takes OpenAI's bpe_simple_vocab_16e6.txt.gz.
    Fine-tuning: --init clip_vit_b32 --tokenizer.path FILE --loop.batch-size 512 --loop.epochs 5
    --optimizer.learning-rate 1e-5 --schedule.warmup-steps 100. Smaller batches have fewer texts to tell apart: the loss
    of a batch cannot be accumulated over parts.
    """
    return ContrastiveConfig(
        model=ClipModelConfig(name="clip_vit_b32", image_size=224, length=77),
        tokenizer=TokenizerConfig(kind="clip_bpe", size=49408),
        optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.2, beta2=0.98, eps=1e-6, clip_norm=None),
        schedule=ScheduleConfig(warmup_steps=2000),
        loop=LoopConfig(epochs=32.0, batch_size=32_768, eval_batch_size=1024, compute_dtype="bfloat16", log_every=50),
    )


def pairs_siglip_b16() -> ContrastiveConfig:
    """SigLIP with a ViT-B/16 on images with captions, after Zhai et al. 2023: each pair by itself, by a sigmoid.

    Command: eqvision train pairs_siglip_b16 --data.path PATH
    Data: as pairs_clip_b32.
    The published models were trained on WebLI, which is private. Not run here.
    Settings: batch 32,768, texts of 64 tokens in lower case of a vocabulary of 32,000 pieces, rate 1e-3, beta2 0.95,
    scale from 10 and bias from -10. Weight decay 0.1 here is 1e-4 in big_vision, where it is not multiplied by the
    rate. The vocabulary is made of the captions; --tokenizer.path FILE takes a published one, with --tokenizer.pad
    '</s>' for SigLIP's own.
    Fine-tuning: --init siglip_b16 with its vocabulary, a smaller batch and a rate of 1e-5.
    """
    return ContrastiveConfig(
        model=ClipModelConfig(name="siglip_b16", image_size=224, length=64),
        task=ContrastiveLossConfig(loss="sigmoid"),
        data=PairsDataConfig(mean=(0.5,), std=(0.5,)),
        tokenizer=TokenizerConfig(kind="unigram", size=32_000),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, beta2=0.95, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=10_000),
        loop=LoopConfig(epochs=32.0, batch_size=32_768, eval_batch_size=1024, compute_dtype="bfloat16", log_every=50),
    )
