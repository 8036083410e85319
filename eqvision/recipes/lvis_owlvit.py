"""OWL-ViT on LVIS, as it was published."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.contrastive_config import TokenizerConfig
from eqvision.recipes.open_vocabulary_config import (
    OpenVocabularyConfig,
    OpenVocabularyDataConfig,
    OpenVocabularyModelConfig,
)

TEXT_RATE = 2e-6 / 5e-5  # of the text tower


def lvis_owlvit_b16() -> OpenVocabularyConfig:
    """OWL-ViT with a ViT-B/16 on LVIS, with the hyperparameters of Minderer et al. 2022 (appendix A1, table A2).

    Command: eqvision train lvis_owlvit_b16 --data.path PATH --tokenizer.path FILE --init clip_vit_b16
    Data: PATH/annotations/{train,val}.json of LVIS v1 and COCO's images in PATH/{train,val}/; FILE is OpenAI's
    bpe_simple_vocab_16e6.txt.gz. --data.hide-rare makes the AP of rare classes zero-shot.
    Metric: AP by the rules of LVIS, and APr of its rare classes. Published are 20.8 and 17.1 (scenic's README), trained
    on Objects365 and Visual Genome together; this recipe takes the one data set of Scenic's clip_b16.py. Not run here.
    Settings: 140,000 steps of 256 mosaics of 768 pixels (1, 4 or 9 images), of which an epoch here counts the first
    image alone; Adam at 5e-5, the text tower at 2e-6, 1,000 steps of warm-up and a cosine; stochastic depth 0.2 and
    0.1; at least 50 names that are not in the image. Scenic clips the gradient of every image at 1; here that of the
    batch is clipped.
    Your own data: any COCO file, --init owlvit_b16:hf:google/owlvit-base-patch16 with its vocabulary, a batch of 16
    and a rate of 2e-5.
    """
    return OpenVocabularyConfig(
        model=OpenVocabularyModelConfig(name="owlvit_b16", drop_path=0.2, text_drop_path=0.1, remat="dots"),
        data=OpenVocabularyDataConfig(kind="coco", size=768),
        tokenizer=TokenizerConfig(kind="clip_bpe", size=49408),
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            weight_decay=0.0,
            clip_norm=1.0,
            learning_rate_multipliers={r"text_tower\.|text_head\.": TEXT_RATE},
        ),
        schedule=ScheduleConfig(warmup_steps=1000),
        loop=LoopConfig(
            epochs=357.7, batch_size=256, eval_batch_size=16, compute_dtype="bfloat16", log_every=50, eval_every=4000
        ),
    )
