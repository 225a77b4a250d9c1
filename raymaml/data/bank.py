"""The image bank: every image of a data set as uint8 in one memory-mapped Arrow file.

A bank is a folder of two files. ``bank.json`` holds all but the pixels and is meant to be read by
people; ``images.arrow`` is an Arrow IPC file with one record batch a class, column ``image`` of
fixed-shape tensors uint8. Rows are numbered 0..R-1 through all classes in their order: class ``c``
owns the rows ``first_row[c] .. first_row[c + 1] - 1``.

Arrays of images have the axes [n, H, W, C]. The file and the memory of the arrays hold the channels
as planes, [n, C, H, W]. Learning uses this order, so no conversion moves bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymaml.common.errors import Mistake, UserError
from raymaml.data.arrow_file import ArrowFile, read_header, require_size
from raymaml.data.bank_format import (
    HEADER_FILE,
    IMAGES_FILE,
    SCHEMA_VERSION,
    BankHeader,
    ClassImages,
    class_bytes,
    content_digest,
    header_text,
    images_schema,
    write_images,
)
from raymaml.storage.cache import CACHE, local_copy
from raymaml.storage.files import new_folder
from raymaml.storage.place import Place, is_remote

_REMEDY = "remove the folder, import it again with `raymaml data import CONFIG`"
_MISSING = Mistake("there is no image bank here", "import one with `raymaml data import CONFIG`")


class ImageBank:
    """A bank opened by memory map: no image is read before it is asked for.

    Processes of one machine that open the same bank share its pages.
    """

    def __init__(self, folder: Path, header: BankHeader) -> None:
        self.folder = folder
        self.source = header.source
        self.licence = header.licence
        self.hash = header.hash
        self.image_shape: tuple[int, int, int] = header.image_shape
        self.mean = header.mean
        self.std = header.std
        self.duplicates = header.duplicates
        self.classes = header.classes
        counts = [bank_class.count for bank_class in self.classes]
        self.first_row: NDArray[np.int64] = np.cumsum([0, *counts], dtype=np.int64)  # [classes + 1]
        self._planes: dict[int, NDArray[np.uint8]] = {}
        splits = np.array([bank_class.split for bank_class in self.classes])
        self._ids_of_split = {split: np.flatnonzero(splits == split) for split in set(splits)}
        require_size(self.images_file, header.images_bytes, _REMEDY)
        self._file = ArrowFile(self.images_file, images_schema(self.image_shape), _REMEDY)
        if self._file.num_batches != len(self.classes):
            raise UserError(f"{self.images_file}: is not of this {HEADER_FILE}", remedy=_REMEDY)

    @classmethod
    def open(cls, place: Place, cache: Path = CACHE) -> ImageBank:
        """Open the bank at ``place``; takes milliseconds whatever its size.

        One at a URI is copied into ``cache``, and its pixels are verified, when this machine opens
        it for the first time.

        Raises:
            UserError: the folder or one of its files is missing, incomplete, or of another
                version; the message names the file and the remedy.
        """
        folder = local_copy(
            place,
            cache,
            marker=HEADER_FILE,
            others=lambda _partial: [IMAGES_FILE],
            verify=lambda partial: cls.open(partial).verify(),
        )
        path = folder / HEADER_FILE
        header, _ = read_header(path, BankHeader, SCHEMA_VERSION, missing=_MISSING, remedy=_REMEDY)
        return cls(folder, header)

    @property
    def images_file(self) -> Path:
        """The file of the pixels, which is mapped into memory."""
        return self.folder / IMAGES_FILE

    @property
    def num_images(self) -> int:
        """Number of images (R) over all classes."""
        return int(self.first_row[-1])

    def class_ids(self, split: str) -> NDArray[np.int64]:
        """Return the ids (positions in ``classes``) of the classes of ``split``, ascending."""
        return self._ids_of_split.get(split, np.empty(0, dtype=np.int64))

    def class_names(self, split: str) -> tuple[str, ...]:
        """Return the names of the classes of ``split``, in the order of their ids."""
        return tuple(self.classes[class_id].name for class_id in self.class_ids(split).tolist())

    def class_images(self, class_id: int) -> NDArray[np.uint8]:
        """Return all images [n, H, W, C] of a class: a read-only view of the mapped file."""
        return np.moveaxis(self._class_planes(class_id), 1, -1)

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Gather the images [len(rows), H, W, C] of row numbers, in the order of ``rows``.

        Raises:
            IndexError: a row number is outside 0..R-1.
        """
        out = np.empty((len(rows), *self.image_shape), dtype=np.uint8)  # [n, C, H, W]
        class_ids = np.searchsorted(self.first_row, rows, side="right") - 1
        offsets = rows - self.first_row[class_ids]
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_images:
            raise IndexError(f"row numbers must be in 0..{self.num_images - 1}")
        places = zip(class_ids.tolist(), offsets.tolist(), strict=True)
        for at, (class_id, offset) in enumerate(places):
            out[at] = self._class_planes(class_id)[offset]
        return np.moveaxis(out, 1, -1)

    def _class_planes(self, class_id: int) -> NDArray[np.uint8]:
        """Return the images of a class as they lie in the file: [n, C, H, W]."""
        if class_id not in self._planes:
            batch = self._file.batch(class_id, self.classes[class_id].count)
            self._planes[class_id] = batch.column("image").to_numpy_ndarray()
        return self._planes[class_id]

    def class_digest(self, class_id: int) -> str:
        """Return a digest of a class: 16 hexadecimal digits that cover its number of images and its
        first, middle and last image."""
        planes = self._class_planes(class_id)
        some = planes[[0, len(planes) // 2, -1]]
        return hashlib.sha256(f"{planes.shape}".encode() + some.tobytes()).hexdigest()[:16]

    def verify(self) -> None:
        """Read every pixel and compare the content hash.

        Raises:
            UserError: the content does not match the header.
        """
        digest = content_digest(self.image_shape)
        for class_id, entry in enumerate(self.classes):
            digest.update(class_bytes(entry))
            digest.update(self._class_planes(class_id).data)
        if digest.hexdigest() != self.hash:
            raise UserError(
                f"{self.images_file}: is altered (content hash {digest.hexdigest()}, {HEADER_FILE}"
                f" says {self.hash})",
                remedy=_REMEDY,
            )


def write_bank(
    folder: Place,
    classes: Iterable[ClassImages],
    *,
    source: str,
    licence: str,
    image_shape: tuple[int, int, int],
    cache: Path = CACHE,
    observe: Callable[[NDArray[np.uint8]], object] = id,
    finish: Callable[[ImageBank], dict[str, Any]] = lambda _bank: {},
) -> ImageBank:
    """Write a bank class by class and open it; memory holds one class, or one batch, at a time.

    ``image_shape`` is (C, H, W). ``observe`` sees all images, [n, C, H, W]. ``finish`` takes the
    bank before its folder appears, and returns the entries of the header that it changes. The
    folder appears complete or not at all. A bank of the same content that is there already is kept
    and opened.

    Raises:
        UserError: ``folder`` exists and is anything but a bank of this very content.
        ValueError: a class is empty, named twice, or its images have another shape.
    """
    other = "remove it or set data.bank to another path"
    if not is_remote(folder) and folder.exists() and not (folder / HEADER_FILE).exists():
        raise UserError(f"{folder}: exists and is not an image bank", remedy=other)
    header: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "licence": licence,
    }
    try:
        with new_folder(folder, HEADER_FILE) as partial:
            header |= write_images(partial / IMAGES_FILE, classes, image_shape, observe)
            (partial / HEADER_FILE).write_text(header_text(header), encoding="utf-8")
            header |= finish(ImageBank.open(partial))
            (partial / HEADER_FILE).write_text(header_text(header), encoding="utf-8")
    except FileExistsError:
        bank = ImageBank.open(folder, cache)
        if bank.hash == header["hash"]:
            return bank
        raise UserError(
            f"{folder}: holds another image bank (hash {bank.hash[:12]}, the import gives"
            f" {header['hash'][:12]})",
            remedy=other,
        ) from None
    return ImageBank.open(folder, cache)
