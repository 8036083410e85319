"""The first command: real handwritten digits, embedded, no network."""

from eqvision.recipes.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def digits() -> TrainConfig:
    """A small CNN on scikit-learn's handwritten digits (1,437 training and 360 test images of 8x8 pixels).

    Command: eqvision train digits
    Data: none to fetch; needs the extra [demo].
    Cost and result: docs/results.md, printed by this command.
    """
    return TrainConfig(
        model=ModelConfig(name="small_cnn", image_size=8, in_channels=1),
        data=DataConfig(kind="digits", transform="digits"),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-2),
        schedule=ScheduleConfig(warmup_steps=50),
        loop=LoopConfig(epochs=40.0, batch_size=64, eval_batch_size=360, log_every=20, eval_every=110),
    )
