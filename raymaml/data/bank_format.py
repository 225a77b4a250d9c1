"""How a bank lies on disk: the Arrow file of pixels, its digest, its moments and the header."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from raymaml.config.base import Count, Number, PositiveInt, PositiveRate, Section
from raymaml.config.schema import Split
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


MOST_EXAMPLES = 5
"""Of copies that are named."""


class Overlap(Section):
    """The images of ``split`` that have a copy in another class, of the split ``other``."""

    split: Split
    other: Split
    images: Count
    """Of ``split`` in all."""
    equal: Count
    """Those with an equal copy."""
    near: Count
    """The others, whose copy is nearly equal."""
    examples: Annotated[tuple[str, ...], Field(max_length=MOST_EXAMPLES)]
    """``image = copy``."""

    @property
    def is_leak(self) -> bool:
        """Whether two splits share pictures."""
        return self.split != self.other

    def __str__(self) -> str:
        """Return ``3 of 40 test images are in train as well (2 equal, 1 nearly equal), ...``."""
        there = f"in {self.other} as well" if self.is_leak else "in two classes"
        return (
            f"{self.equal + self.near:,} of {self.images:,} {self.split} images are {there}"
            f" ({self.equal:,} equal, {self.near:,} nearly equal), such as {self.examples[0]}"
        )


class Duplicates(Section):
    """The copies that a bank holds, as its import found them."""

    overlaps: tuple[Overlap, ...] = ()
    in_class: Count = 0
    """Images that are equal to an earlier one of their class."""

    @property
    def leaks(self) -> tuple[Overlap, ...]:
        """The overlaps of two splits."""
        return tuple(each for each in self.overlaps if each.is_leak)


class BankHeader(Section):
    """The content of ``bank.json``."""

    schema_version: Literal[1]
    source: str
    licence: str
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of all content, as ``content_digest`` says."""
    image_shape: ImageShape
    mean: tuple[Number, ...]
    """Of each channel, over the train split, pixels in 0..1."""
    std: tuple[PositiveRate, ...]
    """As ``mean``."""
    images_bytes: PositiveInt
    """Length of the file of pixels."""
    duplicates: Duplicates | None = None
    """None: nobody looked for them, as before raymaml did."""
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


ClassImages = tuple[BankClass, Iterable[NDArray[np.uint8]]]
"""A class on its way into a bank, and its images in batches [n, H, W, C], ``count`` together."""


def in_memory(name: str, split: str, images: NDArray[np.uint8]) -> ClassImages:
    """Return a class whose images [n, H, W, C] are in memory."""
    return BankClass(name=name, split=split, count=len(images)), [images]


def write_images(
    path: Path,
    classes: Iterable[ClassImages],
    image_shape: tuple[int, int, int],
    observe: Callable[[NDArray[np.uint8]], object] = id,
) -> dict[str, Any]:
    """Stream the classes into ``path``; return the entries of the header that describe them.

    Arrow writes record batches whole. So each class is first a batch of zeros, which take no memory
    as long as nobody writes to them, and then its images replace these in the file. ``observe``
    sees all images in their order, [n, C, H, W].

    Raises:
        ValueError: a class is empty, named twice, or its images have another shape or number.
    """
    schema = images_schema(image_shape)
    digest = content_digest(image_shape)
    histogram = np.zeros((image_shape[0], 256), dtype=np.int64)
    entries: dict[str, BankClass] = {}
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
        path.open("r+b") as pixels,
    ):
        for entry, batches in classes:
            if entry.count == 0 or entry.name in entries:
                raise ValueError(f"class {entry.name}: is empty or given twice")
            entries[entry.name] = entry
            digest.update(class_bytes(entry))
            size = entry.count * math.prod(image_shape)
            zeros = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
            empty = np.frombuffer(zeros, np.uint8).reshape(entry.count, *image_shape)
            writer.write_batch(pa.record_batch([tensor_column(empty)], schema=schema))
            pixels.seek(file.tell() - size - -size % _ALIGNED)
            for planes in _planes(entry, batches, image_shape):
                pixels.write(planes.data)
                digest.update(planes.data)
                observe(planes)
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
    entry: BankClass, batches: Iterable[NDArray[np.uint8]], image_shape: tuple[int, int, int]
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images of a class as they lie in the file, [n, C, H, W]."""
    channels, height, width = image_shape
    found = 0
    for images in batches:
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
            raise ValueError(
                f"class {entry.name}: images are {images.dtype} {images.shape}, must be uint8"
                f" (n, {height}, {width}, {channels})"
            )
        found += len(images)
        if found > entry.count:
            break
        yield np.ascontiguousarray(np.moveaxis(images, -1, 1))
    if found != entry.count:
        raise ValueError(f"class {entry.name}: has other than {entry.count} images")


def content_digest(image_shape: Sequence[int]) -> Any:
    """Return a SHA-256 that has seen the image shape.

    Then come ``class_bytes`` and the pixels, [n, C, H, W], of each class.
    """
    return hashlib.sha256(json.dumps(list(image_shape)).encode())


def class_bytes(entry: BankClass) -> bytes:
    """Return name, split and count of a class, as the hash of a bank covers them."""
    return json.dumps([entry.name, entry.split, entry.count]).encode()


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
