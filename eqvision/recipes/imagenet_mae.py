"""Masked autoencoders on ImageNet, as published."""

from eqvision.recipes.config import DataConfig, LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.masked_config import MaskedConfig, MaskedModelConfig

STEPS = 1_281_167 // 4096  # of an epoch


def imagenet_mae_b16() -> MaskedConfig:
    """A masked autoencoder with ViT-B/16 on ImageNet (He et al. 2022), PATH/{train,val}/CLASS/*.JPEG.

    Command: eqvision train imagenet_mae_b16 --data.path PATH
    Data: folders of classes, whose names are not trained on.
    Settings of the paper's table 8 and of PRETRAIN.md of facebookresearch/mae: 800 epochs (their weights have 1600:
    --loop.epochs 1600), batch 4096, AdamW with rate 1.5e-4 * 4096 / 256 and beta2 0.95, weight decay 0.05, warm-up of
    40 epochs, crops of 20 % to 100 % and flips, normalised pixels. ViT-L/16: --model.name mae_vit_l16.
    Cost: PRETRAIN.md says about 42 hours on 64 V100 for ViT-L and 800 epochs. Metric: test loss; after fine-tuning
    (docs/pretraining.md) 83.6 % top-1 with the weights of 1600 epochs, README.md there. Not run here.
    """
    return MaskedConfig(
        model=MaskedModelConfig(name="mae_vit_b16"),
        data=DataConfig(
            kind="folder",
            test_split="val",
            transform="imagenet",
            crop_scale=(0.2, 1.0),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            num_threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-4 * 4096 / 256, weight_decay=0.05, momentum=0.9, beta2=0.95, clip_norm=None
        ),
        schedule=ScheduleConfig(warmup_steps=40 * STEPS),
        loop=LoopConfig(
            epochs=800.0,
            batch_size=4096,
            eval_batch_size=1024,
            compute_dtype="bfloat16",
            log_every=50,
            eval_every=10 * STEPS,
        ),
    )
