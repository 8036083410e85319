"""The pixels of images patch by patch, and back."""

from jaxtyping import Array, Float


def patch_pixels(images: Float[Array, "b h w c"], patch_size: int) -> Float[Array, "b n p"]:
    """The pixels of each patch as one row, patches row by row; inside a row first y, then x, then the channel.

    Raises ValueError for images that patches do not fill.
    """
    b, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} cannot be cut into patches of {patch_size}x{patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(b, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(b, rows * columns, patch_size * patch_size * channels)


def image_of_patches(pixels: Float[Array, "b n p"], patch_size: int, grid: tuple[int, int]) -> Float[Array, "b h w c"]:
    """What ``patch_pixels`` has cut: ``grid`` is the number of rows and columns of patches.

    Raises ValueError for another number of patches, and for pixels without whole channels.
    """
    (rows, columns), (b, count, values) = grid, pixels.shape
    if count != rows * columns or values % patch_size**2:
        raise ValueError(
            f"pixels of shape {pixels.shape} are not {rows}x{columns} patches of {patch_size}x{patch_size} pixels"
        )
    whole = pixels.reshape(b, rows, columns, patch_size, patch_size, -1).transpose(0, 1, 3, 2, 4, 5)
    return whole.reshape(b, rows * patch_size, columns * patch_size, -1)
