"""Masked autoencoders on ImageNet, as published."""

from eqvision.recipes.config import (
    AugmentConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
)
from eqvision.recipes.masked_config import MaskedConfig, MaskedModelConfig

IMAGES = 1_281_167  # of the training split
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
            mean=MEAN,
            std=STD,
            num_threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-4 * 4096 / 256, weight_decay=0.05, momentum=0.9, beta2=0.95, clip_norm=None
        ),
        schedule=ScheduleConfig(warmup_steps=40 * IMAGES // 4096),
        loop=LoopConfig(
            epochs=800.0,
            batch_size=4096,
            eval_batch_size=1024,
            compute_dtype="bfloat16",
            log_every=50,
            eval_every=10 * (IMAGES // 4096),
        ),
    )


def imagenet_mae_b16_finetune() -> TrainConfig:
    """Fine-tuning a masked autoencoder's ViT-B/16 on ImageNet (He et al. 2022), PATH/{train,val}/CLASS/*.JPEG.

    Command: eqvision train imagenet_mae_b16_finetune --data.path PATH --init runs/imagenet_mae_b16
    Data: folders of classes. --init vit_b16:mae_pretrain_vit_base.pth takes the published encoder.
    Settings of FINETUNE.md of facebookresearch/mae: 100 epochs, batch 1024, AdamW with rate 5e-4 * 1024 / 256, layer
    decay 0.65, weight decay 0.05, drop path 0.1, RandAugment 9, mixup 0.8, CutMix 1, erasing 0.25, smoothing 0.1, mean
    of the patches.
    Cost: 100 epochs of ViT-B/16. Metric: test accuracy, 83.664 there (FINETUNE.md). Not run here.
    """
    return TrainConfig(
        model=ModelConfig(name="vit_b16_mae", image_size=224, drop_path=0.1),
        task=TaskConfig(label_smoothing=0.1),
        data=DataConfig(kind="folder", test_split="val", transform="imagenet", mean=MEAN, std=STD, num_threads=16),
        augment=AugmentConfig(
            policy="randaugment",
            num_ops=2,
            magnitude=9.0,
            magnitude_std=0.5,
            random_erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4 * 1024 / 256, weight_decay=0.05, layer_decay=0.65, clip_norm=None),
        schedule=ScheduleConfig(warmup_steps=5 * IMAGES // 1024),
        loop=LoopConfig(epochs=100.0, batch_size=1024, eval_batch_size=1024, compute_dtype="bfloat16", log_every=50),
    )


def imagenet_mae_b16_probe() -> TrainConfig:
    """A linear layer on a masked autoencoder's frozen ViT-B/16 on ImageNet, PATH/{train,val}/CLASS/*.JPEG.

    Command: eqvision train imagenet_mae_b16_probe --data.path PATH --init runs/imagenet_mae_b16
    Data: folders of classes. --init vit_b16:mae_pretrain_vit_base.pth takes the published encoder.
    Settings of the paper's table 10: class token, 90 epochs, batch 16384, LARS with rate 0.1 * 16384 / 256, no weight
    decay, crops and flips alone. The batch norm that the paper has before the layer is not here: `eqvision eval
    runs/imagenet_mae_b16 --evaluator linear_probe` needs none, and has no rate to choose.
    Cost: 90 epochs of ViT-B/16, forward. Metric: test accuracy, 67.8 with the batch norm (FINETUNE.md). Not run
    here.
    """
    return TrainConfig(
        model=ModelConfig(name="vit_b16", image_size=224),
        data=DataConfig(kind="folder", test_split="val", transform="imagenet", mean=MEAN, std=STD, num_threads=16),
        optimizer=OptimizerConfig(
            name="lars", learning_rate=0.1 * 16384 / 256, weight_decay=0.0, clip_norm=None, freeze=("^backbone",)
        ),
        schedule=ScheduleConfig(warmup_steps=10 * IMAGES // 16384),
        loop=LoopConfig(epochs=90.0, batch_size=16384, eval_batch_size=1024, compute_dtype="bfloat16", log_every=20),
    )
