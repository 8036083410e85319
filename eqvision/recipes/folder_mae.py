"""Pre-training on small images without labels."""

from eqvision.recipes.config import DataConfig, LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.masked_config import MaskedConfig, MaskedEvalConfig, MaskedModelConfig


def folder_mae() -> MaskedConfig:
    """A masked autoencoder for images of 32 pixels on a folder of images, PATH/{train,test}/CLASS/*.jpg.

    Command: eqvision train folder_mae --data.path PATH
    Data: labels are not trained on. They serve the linear probe and k nearest neighbours of the frozen encoder at the
    end; `eqvision eval runs/folder_mae --evaluator linear_probe --untrained` gives those of the random encoder.
    He et al. 2022 with a ViT of 6 blocks and 128 features, patches of 4 pixels, and a decoder of 2 blocks and 64.
    Fine-tuning: eqvision train folder --init runs/folder_mae --model.name vit_xs4_mae, see docs/pretraining.md.
    Cost and result: docs/results.md.
    """
    return MaskedConfig(
        model=MaskedModelConfig(name="mae_vit_xs4", image_size=32),
        data=DataConfig(
            kind="folder",
            transform="imagenet",
            crop_scale=(0.2, 1.0),
            crop_fraction=1.0,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, weight_decay=0.05, beta2=0.95, clip_norm=None),
        schedule=ScheduleConfig(warmup_steps=200),
        loop=LoopConfig(epochs=60.0, batch_size=128, eval_batch_size=250, log_every=39, eval_every=390),
        eval=MaskedEvalConfig(evaluators=("linear_probe", "knn")),
    )
