"""From a picture to the tensor that a model was trained on, without the bank of its training.

An importer decides how a picture becomes pixels, and a bank holds the moments of its images. A
``Preprocessing`` keeps both in a few numbers and words; ``run.json`` and the cards of checkpoints
hold it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field, model_validator

from raymaml.common.errors import UserError
from raymaml.config.base import Number, PositiveRate, Section
from raymaml.config.data_sources import AnySource
from raymaml.config.schema import DataConfig, Moments
from raymaml.data.bank_format import ImageShape
from raymaml.data.importers.depth import in_eight_bits, to_eight_bits
from raymaml.data.importers.images import Images, decode, read_whole, readable, upright
from raymaml.storage.files import read_bytes
from raymaml.storage.place import Place, is_remote, to_place

if TYPE_CHECKING:  # a process that only decodes needs no PyTorch
    from torch import Tensor

    from raymaml.data.bank import ImageBank

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for images of so many channels."""
INK = 64
"""Least brightness of ink, where the brightest has 255."""
MOST_OF_SIDE = 0.8
"""Share of the side that centred ink takes at most."""
Fit = Literal["crop", "squash", "ink"]


class Preprocessing(Section):
    """The way from a picture to the tensor that the weights of a run were trained on."""

    image_shape: ImageShape
    mean: tuple[Number, ...]
    """Of each channel, subtracted from pixels in 0..1."""
    std: tuple[PositiveRate, ...]
    """The result is divided by it."""
    fit: Fit
    """crop: scaled by the shorter side, the middle taken; squash: scaled to the square whatever its
    shape; ink: the drawn character bright on black, in the middle."""
    inverted: bool = False
    """Black becomes white."""
    max_pixels: Annotated[int, Field(ge=1, le=2_000_000_000, strict=True)] | None = None
    """Larger pictures are refused before they are decoded; null: Pillow's limit."""

    @model_validator(mode="after")
    def _has_moments_of_each_channel(self) -> Preprocessing:
        channels = self.image_shape[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mean and std have not {channels} entries, one a channel")
        return self

    def pixels(self, picture: Place | str | bytes | Image.Image | NDArray[Any] | Tensor) -> Images:
        """Return the pixels, uint8 [H, W, C], that the importer makes of a picture.

        Args:
            picture: a file or its bytes, of any kind that Pillow reads; an image of Pillow; an
                array [H, W] or [H, W, 1, 3 or 4 channels]; or a tensor [H, W] or [C, H, W]. Numbers
                are bytes, floats in 0..1, or deeper, see ``raymaml.data.importers.depth``.

        Raises:
            UserError: it cannot be read; or the model takes images of other than 1 or 3 channels.
        """
        if self.image_shape[0] not in MODES:
            raise UserError(
                f"the model takes images of {self.image_shape[0]} channels, a picture has 1 or 3",
                remedy="give its pixels to `tensor`",
            )
        if isinstance(picture, Image.Image):
            with readable("an image of Pillow"):  # of which a copy is turned
                return self._fitted(in_eight_bits(ImageOps.exif_transpose(picture), b""))
        if not isinstance(picture, str | bytes | Place):
            with readable("an array"):
                return self._fitted(_picture_of(picture))
        name = "bytes" if isinstance(picture, bytes) else str(picture)
        file = name, partial(_content, picture), self._fitted
        found: Images = decode([file], self.max_pixels)[0]
        return found

    def tensor(self, pixels: Images | Tensor) -> Tensor:
        """Turn pixels, uint8 [B, H, W, C], into float32 [B, C, H, W] on their device."""
        import torch

        from raymaml.data.loader import Normalize

        if isinstance(pixels, np.ndarray):
            pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        return Normalize(self.mean, self.std)(pixels)

    def _fitted(self, image: Image.Image) -> Images:
        channels, height, width = self.image_shape
        size, image = (width, height), upright(image, MODES[channels])
        if self.fit == "ink":
            image = _ink_in_the_middle(image, max(size))
        if self.fit == "crop":
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
        return np.atleast_3d(255 - pixels if self.inverted else pixels)


def preprocessing_of(
    data: DataConfig, image_shape: ImageShape, bank: ImageBank | None
) -> Preprocessing | None:
    """Return how pictures become tensors in a run; None where only its bank, which is away, knows.

    Raises:
        UserError: ``data.normalize`` has moments for another number of channels.
    """
    channels = image_shape[0]
    match data.normalize:
        case Moments(mean=mean, std=std):
            pass
        case "none":
            mean, std = (0.0,) * channels, (1.0,) * channels
        case _ if bank is None:
            return None
        case _:
            mean, std = bank.mean, bank.std
    if (len(mean), len(std)) != (channels, channels):
        raise UserError(
            f"data.normalize has {len(mean)} means and {len(std)} stds, the bank {data.bank}"
            f" {channels} channels",
            remedy=f"give {channels} of each",
        )
    megapixels = getattr(data.source, "max_megapixels", None)
    return Preprocessing(
        image_shape=image_shape,
        mean=mean,
        std=std,
        fit=_fit(data.source),
        inverted=data.source.kind == "omniglot",
        max_pixels=None if megapixels is None else round(megapixels * 1e6),
    )


def _fit(source: AnySource) -> Fit:
    """Return how the importer of a source makes squares; see there."""
    if source.kind == "glyphs":
        return "ink"
    if source.kind in {"image-folder", "inaturalist-2017"}:
        return "crop"
    return "crop" if source.kind == "cub" and not source.crop_to_box else "squash"


def _content(picture: Place | str | bytes) -> bytes:
    if isinstance(picture, bytes):
        return picture
    place = to_place(picture)
    return read_bytes(place) if is_remote(place) else read_whole(place)


def _picture_of(values: Any) -> Image.Image:
    """Return an array, or a tensor with its channels first, as an image.

    Raises:
        ValueError: its shape is that of no picture, or it holds NaN or infinity.
    """
    if not isinstance(values, np.ndarray):
        values = np.asarray(values.detach().cpu())
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    if not 2 <= values.ndim <= 3 or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise ValueError(f"its shape is {values.shape}")
    if values.dtype.kind not in "buif" or not values.size or not np.isfinite(values).all():
        raise ValueError("it holds other than finite numbers")
    values = values[..., 0] if values.shape[2:] == (1,) else values
    if values.dtype == bool:
        values = values * np.uint8(255)
    if values.dtype != np.uint8:
        values = to_eight_bits(values, values.min().item(), values.max().item())
    return Image.fromarray(np.ascontiguousarray(values))


def _ink_in_the_middle(image: Image.Image, size: int) -> Image.Image:
    """Return a drawn character bright on black, its ink in the middle of a square.

    The importer of glyphs centres the ink and keeps it below a share of the side, so the place of a
    character means nothing. Its size counts: the square is as large as the picture's shorter side,
    or larger where the ink would not fit. The border decides which of black and white is paper.
    """
    image.thumbnail((4 * size, 4 * size))  # before a square is made of a picture of any shape
    values = np.asarray(image)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    bright = ImageOps.invert(image) if np.median(border) > 127 else image
    ink = bright.point(lambda value: 255 * (value >= INK))
    left, top, right, bottom = ink.getbbox() or (0, 0, *image.size)
    side = round(max(min(image.size), max(right - left, bottom - top) / MOST_OF_SIDE))
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return bright.crop((x, y, x + side, y + side))
