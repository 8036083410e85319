"""Two small backbones for smoke runs and small images: a plain convolutional network and a perceptron."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.backbones.resnet import ConvNorm
from eqvision.layers import Linear, lecun_normal
from eqvision.types import Features, Images


class SmallCNN(eqx.Module):
    """Stages of 3x3 convolutions with batch norm and ReLU.

    Stage ``i`` has ``blocks[i]`` of them, ``width * 2**i`` channels and stride ``2**i``. Returns the map of
    every stage. Images of any height and width are legal, from about 8x8.
    """

    stages: tuple[tuple[ConvNorm, ...], ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self, blocks: tuple[int, ...] = (2, 2, 2), width: int = 32, *, in_channels: int = 3, key: PRNGKeyArray
    ):
        keys = iter(jax.random.split(key, sum(blocks)))
        stages, channels = [], in_channels
        for i, count in enumerate(blocks):
            stage = []
            for j in range(count):
                stride = 2 if i and not j else 1
                stage.append(ConvNorm(channels, width * 2**i, 3, stride=stride, key=next(keys)))
                channels = width * 2**i
            stages.append(tuple(stage))
        self.stages = tuple(stages)
        self.in_channels = in_channels
        self.channels = tuple(width * 2**i for i in range(len(blocks)))
        self.strides = tuple(2**i for i in range(len(blocks)))

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del key
        check_images(images, self.in_channels)
        x, features = images, []
        for stage in self.stages:
            for conv in stage:
                x, state = conv(x, state, train=train)
                x = jax.nn.relu(x)
            features.append(x)
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


class MLPBackbone(eqx.Module):
    """All pixels as one vector through linear layers with ReLU; the result is a map of one cell.

    Only images of the size it was built for are legal. The stride is the longer side of the image.
    """

    hidden: tuple[Linear, ...]
    image_size: tuple[int, int] = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        widths: tuple[int, ...] = (256, 256),
        *,
        image_size: int | tuple[int, int],
        in_channels: int = 3,
        key: PRNGKeyArray,
    ):
        if not widths:
            raise ValueError("MLPBackbone: widths is empty; give the width of at least one hidden layer")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        keys = jax.random.split(key, len(widths))
        inputs = (self.image_size[0] * self.image_size[1] * in_channels, *widths[:-1])
        self.hidden = tuple(Linear(inputs[i], widths[i], init=lecun_normal, key=keys[i]) for i in range(len(widths)))
        self.in_channels = in_channels
        self.channels = (widths[-1],)
        self.strides = (max(self.image_size),)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del train, key
        return (self._run(images)[-1],), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Outputs of the hidden layers ``layers``; negative counts from the end."""
        del state
        outputs = self._run(images)
        return tuple(outputs[check_layer(layer, len(outputs))] for layer in layers)

    def _run(self, images: Images) -> list[Float[Array, "b 1 1 _"]]:
        check_images(images, self.in_channels)
        if images.shape[1:3] != self.image_size:
            raise ValueError(_size_message(images.shape, self.image_size))
        x, outputs = images.reshape(images.shape[0], -1), []
        for linear in self.hidden:
            x = jax.nn.relu(linear(x))
            outputs.append(x[:, None, None])
        return outputs


def _size_message(shape: tuple[int, ...], image_size: tuple[int, int]) -> str:
    return (
        f"this MLP was built for images of {image_size[0]}x{image_size[1]} and got {shape[1]}x{shape[2]}; "
        f"it has a weight for every pixel, so resize the images or build it with image_size={shape[1:3]}"
    )


def small_cnn(*, in_channels: int = 3, width: int = 32, key: PRNGKeyArray) -> SmallCNN:
    """Three stages of two convolutions, strides 1, 2 and 4: for images of 8x8 to 64x64."""
    return SmallCNN((2, 2, 2), width, in_channels=in_channels, key=key)


def mlp(*, image_size: int | tuple[int, int], in_channels: int = 3, width: int = 256, key: PRNGKeyArray) -> MLPBackbone:
    """Two hidden layers of ``width``."""
    return MLPBackbone((width, width), image_size=image_size, in_channels=in_channels, key=key)
