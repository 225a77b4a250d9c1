"""How a bank lies on disk: the Arrow file of pixels, its digest, its moments and the header."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from raymaml.config.base import Number, PositiveInt, PositiveRate, Section
from raymaml.data.arrow_file import tensor_column, tensor_type

SCHEMA_VERSION = 1
HEADER_FILE = "bank.json"
IMAGES_FILE = "images.arrow"
_ALIGNED = 8  # bytes: Arrow fills the body of a record batch up to a multiple

_Side = Annotated[int, Field(ge=1, le=4096, strict=True)]
ImageShape = tuple[Annotated[int, Field(ge=1, le=16, strict=True)], _Side, _Side]
"""(C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class BankClass:
    """One class of a bank: its unique name, its split and its number of images."""

    name: str
    split: str
    count: PositiveInt


class BankHeader(Section):
    """The content of ``bank.json``."""

    schema_version: Literal[1]
    source: str
    licence: str
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of all content, as ``ContentDigest``."""
    image_shape: ImageShape
    mean: tuple[Number, ...]
    """Of each channel, over the train split, pixels in 0..1."""
    std: tuple[PositiveRate, ...]
    """As ``mean``."""
    images_bytes: PositiveInt
    """Length of the file of pixels."""
    classes: Annotated[tuple[BankClass, ...], Field(min_length=1)]
    """In the order of the file."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> BankHeader:
        channels, height, width = self.image_shape
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mean and std have not {channels} entries, one a channel")
        if len({entry.name for entry in self.classes}) != len(self.classes):
            raise ValueError("a class is named twice")
        # Pixels are never compressed, so that the file bounds the memory of a reader.
        pixels = sum(entry.count for entry in self.classes) * channels * height * width
        if pixels > self.images_bytes:
            raise ValueError(f"{self.images_bytes} bytes cannot hold {pixels} of pixels")
        return self


@dataclass(frozen=True, kw_only=True)
class ClassStream:
    """One class on its way into a bank; it need not fit into memory."""

    name: str
    split: str
    count: int
    batches: Iterable[NDArray[np.uint8]]
    """[n, H, W, C] each, ``count`` images together."""


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """As ``ClassStream``, for a class that is in memory."""

    name: str
    split: str
    images: NDArray[np.uint8]  # [n, H, W, C]

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def batches(self) -> list[NDArray[np.uint8]]:
        """All images in one."""
        return [self.images]


def write_images(
    path: Path, classes: Iterable[ClassImages | ClassStream], image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Stream the classes into ``path``; return the entries of the header that describe them.

    Arrow writes record batches whole. So each class is first a batch of zeros, which take no memory
    as long as nobody writes to them, and then its images replace these in the file.

    Raises:
        ValueError: a class is empty, named twice, or its images have another shape or number.
    """
    schema = images_schema(image_shape)
    digest = ContentDigest(image_shape)
    histogram = np.zeros((image_shape[0], 256), dtype=np.int64)
    entries: dict[str, BankClass] = {}
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
        path.open("r+b") as pixels,
    ):
        for item in classes:
            if item.count == 0 or item.name in entries:
                raise ValueError(f"class {item.name}: is empty or given twice")
            entry = BankClass(name=item.name, split=item.split, count=item.count)
            entries[entry.name] = entry
            digest.begin(entry)
            size = item.count * math.prod(image_shape)
            zeros = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
            empty = np.frombuffer(zeros, np.uint8).reshape(item.count, *image_shape)
            writer.write_batch(pa.record_batch([tensor_column(empty)], schema=schema))
            pixels.seek(file.tell() - size - -size % _ALIGNED)
            for planes in _planes(item, image_shape):
                pixels.write(planes.data)
                digest.update(planes)
                if entry.split == "train":
                    histogram += _histogram(planes)
    mean, std = _moments(histogram)
    return {
        "hash": digest.hexdigest(),
        "image_shape": list(image_shape),
        "mean": mean,
        "std": std,
        "images_bytes": path.stat().st_size,
        "classes": [asdict(entry) for entry in entries.values()],
    }


def images_schema(image_shape: Sequence[int]) -> pa.Schema:
    """Return the one column of the pixel file, for images of ``image_shape`` (C, H, W)."""
    return pa.schema([pa.field("image", tensor_type(image_shape), nullable=False)])


def _planes(
    item: ClassImages | ClassStream, image_shape: tuple[int, int, int]
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images of a class as they lie in the file, [n, C, H, W]."""
    channels, height, width = image_shape
    found = 0
    for images in item.batches:
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
            raise ValueError(
                f"class {item.name}: images are {images.dtype} {images.shape}, must be uint8"
                f" (n, {height}, {width}, {channels})"
            )
        found += len(images)
        if found > item.count:
            break
        yield np.ascontiguousarray(np.moveaxis(images, -1, 1))
    if found != item.count:
        raise ValueError(f"class {item.name}: has other than {item.count} images")


class ContentDigest:
    """SHA-256 over the image shape, then name, split, count and pixels of each class."""

    def __init__(self, image_shape: Sequence[int]) -> None:
        self._digest = hashlib.sha256(json.dumps(list(image_shape)).encode())

    def begin(self, entry: BankClass) -> None:
        """Add a class whose images come with ``update``, in their order."""
        self._digest.update(json.dumps([entry.name, entry.split, entry.count]).encode())

    def update(self, planes: NDArray[np.uint8]) -> None:
        """Add images [n, C, H, W] of the class."""
        self._digest.update(planes.data)

    def hexdigest(self) -> str:
        """Return the digest of the content added so far."""
        return self._digest.hexdigest()


def _histogram(planes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the values of each channel: [C, 256]."""
    channels = (planes[:, channel].ravel() for channel in range(planes.shape[1]))
    return np.stack([np.bincount(channel, minlength=256) for channel in channels])


def _moments(histogram: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, pixels in 0..1.

    Counts are exact, so the moments do not depend on the order of the images. No pixel at all
    gives mean 0; a channel that never varies gets standard deviation 1 (nothing to scale).
    """
    values = np.arange(256) / 255.0
    total = np.maximum(histogram.sum(axis=1), 1)
    mean = histogram @ values / total  # [C]
    variance = (histogram * (values - mean[:, None]) ** 2).sum(axis=1) / total
    varies = (histogram > 0).sum(axis=1) > 1
    return mean.tolist(), np.where(varies, np.sqrt(variance), 1.0).tolist()


def header_text(header: dict[str, Any]) -> str:
    """Write the header as JSON, a line an entry and a line a class."""
    lines = [
        f"  {json.dumps(key)}: {json.dumps(header[key])}" for key in header if key != "classes"
    ]
    classes = ",\n".join(f"    {json.dumps(entry)}" for entry in header["classes"])
    return "{\n" + ",\n".join(lines) + ',\n  "classes": [\n' + classes + "\n  ]\n}\n"
