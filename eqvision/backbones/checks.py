"""Checks of the image batch that a backbone is given; shapes are static, so they cost nothing at run time."""

from jaxtyping import Array, Shaped


def check_images(images: Shaped[Array, "..."], in_channels: int, multiple: tuple[int, int] = (1, 1)) -> None:
    """Raise a ValueError that says what was given and what to do unless images are (batch, height, width, channels)."""
    shape = images.shape
    if len(shape) == 3:
        raise ValueError(
            f"expected a batch of images (batch, height, width, {in_channels}), got one array of shape {shape}; "
            "add the batch axis with images[None]"
        )
    if len(shape) != 4:
        raise ValueError(f"expected images of shape (batch, height, width, {in_channels}), got {shape}")
    if shape[3] != in_channels:
        raise ValueError(_channel_message(shape, in_channels))
    if shape[1] % multiple[0] or shape[2] % multiple[1] or 0 in shape[1:3]:
        raise ValueError(_size_message(shape, multiple))


def _channel_message(shape: tuple[int, ...], in_channels: int) -> str:
    if shape[1] == in_channels:
        return (
            f"images of shape {shape} look channels-first; eqvision is channels-last (batch, height, width, "
            f"{in_channels}): use jnp.moveaxis(images, 1, -1)"
        )
    return (
        f"images of shape {shape} have {shape[3]} channels and the model was built with in_channels={in_channels}; "
        f"build it with in_channels={shape[3]}, or convert the images"
    )


def _size_message(shape: tuple[int, ...], multiple: tuple[int, int]) -> str:
    nearest = [max(m, round(s / m) * m) for s, m in zip(shape[1:3], multiple, strict=True)]
    return (
        f"images of {shape[1]}x{shape[2]} cannot be cut into steps of {multiple[0]}x{multiple[1]} pixels; "
        f"resize or pad them, for instance to {nearest[0]}x{nearest[1]}"
    )


def legal_size(image_size: int | tuple[int, int], step: int) -> tuple[int, int]:
    """Height and width that a model is built for; ValueError with the nearest legal size unless ``step`` fits."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % step or width % step or min(height, width) <= 0:
        near = [max(step, round(length / step) * step) for length in (height, width)]
        raise ValueError(
            f"image_size {height}x{width} is not divisible by {step}, the stride of the network (a patch size, in "
            f"transformers); the nearest legal size is {near[0]}x{near[1]}"
        )
    return height, width


def check_layer(layer: int, depth: int) -> int:
    """The layer's index counted from the front; ValueError where there is no such layer."""
    if not -depth <= layer < depth:
        raise ValueError(f"intermediates: layer {layer} does not exist, the backbone has layers 0..{depth - 1}")
    return layer % depth
