"""Digits found by name on scenes of real handwritten digits, embedded, no network."""

from eqvision.losses.open_vocabulary import OpenVocabularyLossConfig
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.contrastive_config import TokenizerConfig
from eqvision.recipes.open_vocabulary_config import (
    OpenVocabularyConfig,
    OpenVocabularyDataConfig,
    OpenVocabularyModelConfig,
)


def digits_owlvit() -> OpenVocabularyConfig:
    """A small OWL-ViT, from scratch, on scenes composed of scikit-learn's handwritten digits (96x96 pixels).

    Command: eqvision train digits_owlvit
    Data: none to fetch; needs the extras [demo], [coco] and [text]. Digits are asked for by their names, such as "a
    photo of a seven"; a vocabulary of whole words is made of them.
    Use: eqvision predict runs/digits_owlvit IMAGE --queries "a photo of a seven" "the digit two"
    Cost and result: 45 processor minutes; AP 52.7 and AP50 87.0 on the 256 test scenes. Of 4,096 scenes seen 24 times
    it learns the training scenes by heart: each of the 98,304 here is seen once.
    """
    return OpenVocabularyConfig(
        model=OpenVocabularyModelConfig(name="owlvit_small", in_channels=1, length=10),
        task=OpenVocabularyLossConfig(class_weight=3.0),
        data=OpenVocabularyDataConfig(
            kind="digits",
            test_split="test",
            size=96,
            mosaics=(1,),
            mosaic_probabilities=(1.0,),
            flip=0.0,
            crop=(1.0, 1.0),
            max_objects=6,
            max_queries=10,
            num_negatives=9,
            length=98_304,
            count=100,
            mean=(0.3,),
            std=(0.2,),
        ),
        tokenizer=TokenizerConfig(kind="wordpiece", size=256),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-4, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=200),
        loop=LoopConfig(epochs=1.0, batch_size=16, eval_batch_size=32, log_every=32, eval_every=512),
    )
