"""Your own images: a folder of classes, or arrays in a file."""

from eqvision.recipes.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def folder() -> TrainConfig:
    """A CIFAR ResNet on a folder of images, PATH/{train,test}/CLASS/*.jpg.

    Command: eqvision train folder --data.path PATH
    A ViT instead: --model.name vit_ti4 --optimizer.name adamw --optimizer.learning-rate 1e-3
    Hyperparameters follow He et al. 2016 section 4.2 (SGD, momentum 0.9, weight decay 1e-4, batch 128, pad 4, crop
    and flip) with a cosine in place of the steps, since runs on small folders are short.
    Cost and result: docs/results.md.
    """
    return TrainConfig(
        model=ModelConfig(name="resnet20_cifar", image_size=32),
        data=DataConfig(kind="folder", transform="cifar"),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=1e-4, clip_norm=None),
        schedule=ScheduleConfig(warmup_steps=40),
        loop=LoopConfig(epochs=10.0, batch_size=128),
    )


def arrays() -> TrainConfig:
    """The same on images held in arrays: a .npz file, or a folder of .npy files.

    Command: eqvision train arrays --data.path FILE.npz
    """
    recipe = folder()
    return TrainConfig(
        model=recipe.model,
        data=DataConfig(kind="arrays", transform="cifar"),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        loop=recipe.loop,
    )
