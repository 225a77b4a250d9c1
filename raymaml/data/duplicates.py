"""Copies among images: equal pixels, or nearly so, in two splits, two classes or one class.

Each image has two fingerprints of 64 bits. A cryptographic one is equal for equal pixels. A
perceptual one, like pHash (Zauner 2010), has a bit for each of the 8x8 lowest frequencies of the
image's cosine transform: whether it is above half their root mean square. Few are near that bound,
so noise turns few bits. Two images are nearly equal when at most ``BITS`` bits differ and, then,
their squared difference is below ``SAME`` of the variance of either.

Found are pictures compressed or scaled again. Not found are mirrored, turned, cropped or
recoloured ones. Nearly equal images of one class are not looked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from raymaml.config.schema import SPLITS
from raymaml.data.bank import ImageBank
from raymaml.data.bank_format import MOST_EXAMPLES, Duplicates, Overlap

BITS = 3
"""Of the 64. Of the 4 segments of 16 bits, one is then equal in both: the search goes by these."""
SAME = 0.015
WINDOW = 64
"""Images that each is compared with where more than these share a segment: those that follow in
the order of all 64 bits. So the search takes time in proportion to the images."""
_PART = 640 << 10  # bytes of pixels, as float32, that are compared at a time; or one pair
Hashes = NDArray[np.uint64]
Name = Callable[[int], str]
"""Names the image of a row."""


@dataclass
class Fingerprints:
    """Fingerprints of images, in the order in which ``add`` sees them."""

    _exact: list[bytes] = field(default_factory=list)
    _perceptual: list[Hashes] = field(default_factory=list)

    def add(self, planes: NDArray[np.uint8]) -> None:
        """Take images [n, C, H, W]."""
        planes = np.ascontiguousarray(planes)
        self._exact += [hashlib.blake2b(each, digest_size=8).digest() for each in planes]
        self._perceptual.append(perceptual_hash(planes))

    @property
    def exact(self) -> Hashes:
        """One a row: [R]."""
        return np.frombuffer(b"".join(self._exact), np.uint64)

    @property
    def perceptual(self) -> Hashes:
        """One a row: [R]."""
        return np.concatenate(self._perceptual)


@cache
def _waves(size: int) -> NDArray[np.float32]:
    """Return the 8 slowest cosines of a side: [8, size]."""
    angles = np.pi * (np.arange(size) + 0.5) / size
    waves: NDArray[np.float32] = np.cos(np.arange(8)[:, None] * angles).astype(np.float32)
    return waves


def perceptual_hash(planes: NDArray[np.uint8]) -> Hashes:
    """Return the hash of images [n, C, H, W]: [n]."""
    grey = planes.mean(axis=1, dtype=np.float32)
    found = _waves(grey.shape[1]) @ grey @ _waves(grey.shape[2]).T  # [n, 8, 8]
    found = found.reshape(len(grey), 64)
    strength = np.sqrt((found[:, 1:] ** 2).mean(axis=1, keepdims=True))  # all but the mean's
    return np.packbits(found > strength / 2, axis=1).view(np.uint64)[:, 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """The copies of a bank. Rows that ``kept`` leaves out count as if they were not there."""

    exact: Hashes  # [R]
    class_of: NDArray[np.int64]  # [R]
    split_of: NDArray[np.int64]  # [R]: place in SPLITS
    pairs: NDArray[np.int64]  # [P, 2]: rows of two classes that are nearly equal
    kept: NDArray[np.bool_]  # [R]

    def repeated(self) -> NDArray[np.bool_]:
        """Return where an earlier image of the class is equal: [R]."""
        rows = np.flatnonzero(self.kept)
        both = np.stack([self.class_of[rows].astype(np.uint64), self.exact[rows]])
        _, first = np.unique(both, axis=1, return_index=True)
        return self._mask(np.delete(rows, first))

    def equal_in(self, split: int) -> NDArray[np.bool_]:
        """Return where an equal image is in another class, of ``split``: [R]."""
        rows = np.flatnonzero(self.kept)
        _, group = np.unique(self.exact[rows], return_inverse=True)
        pairs = np.unique(np.stack([group, self.class_of[rows], self.split_of[rows]]), axis=1)
        classes = np.bincount(pairs[0][pairs[2] == split], minlength=len(rows))  # of each group
        others = classes[group] - (self.split_of[rows] == split)
        return self._mask(rows[others > 0])

    def near_in(self, split: int) -> NDArray[np.bool_]:
        """Return where a nearly equal image is in another class, of ``split``: [R]."""
        pairs = self.pairs[self.kept[self.pairs].all(axis=1)]
        both = np.concatenate([pairs, pairs[:, ::-1]])
        return self._mask(both[self.split_of[both[:, 1]] == split, 0])

    def leaking(self) -> NDArray[np.bool_]:
        """Return the images of train that are in val or test, and those of val in test: [R]."""
        found = np.zeros_like(self.kept)
        for split in (1, 2):
            inside = self.equal_in(split) | self.near_in(split)
            found |= inside & (self.split_of < split)
        return found

    def without(self, rows: NDArray[np.bool_]) -> Survey:
        """Return the survey without the images where ``rows`` is true."""
        return replace(self, kept=self.kept & ~rows)

    def overlaps(self, name: Name) -> Iterator[Overlap]:
        """Yield the overlaps of two splits, and of the classes of one, with examples."""
        for first, one in enumerate(SPLITS):
            equal, near = self.equal_in(first), self.near_in(first)
            for second in range(first, len(SPLITS)):
                inside = self.split_of == second
                rows = np.flatnonzero((equal | near) & inside)
                if len(rows):
                    count = int((equal & inside).sum())
                    yield Overlap(
                        split=SPLITS[second],
                        other=one,
                        images=int((inside & self.kept).sum()),
                        equal=count,
                        near=len(rows) - count,
                        examples=tuple(
                            f"{name(row)} = {name(self._partner(row, first))}"
                            for row in rows[:MOST_EXAMPLES].tolist()
                        ),
                    )

    def _partner(self, row: int, split: int) -> int:
        """Return the first copy of an image in another class, of ``split``."""
        near = self.pairs[(self.pairs == row).any(axis=1)].ravel()
        alike = self.exact == self.exact[row]
        elsewhere = self.kept & (self.split_of == split) & (self.class_of != self.class_of[row])
        rows = np.flatnonzero((alike | self._mask(near)) & elsewhere)
        return int(rows[np.argmax(alike[rows])])

    def _mask(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        mask = np.zeros(len(self.exact), np.bool_)
        mask[rows] = True
        return mask


def survey(bank: ImageBank, prints: Fingerprints | None = None) -> Survey:
    """Look for copies in a bank; without the fingerprints of its rows it is read whole."""
    if prints is None:
        prints = Fingerprints()
        for class_id in range(len(bank.classes)):
            prints.add(np.moveaxis(bank.class_images(class_id), -1, 1))
    class_of = np.repeat(np.arange(len(bank.classes)), np.diff(bank.first_row))
    splits = np.array([SPLITS.index(each.split) for each in bank.classes])
    return Survey(
        exact=prints.exact,
        class_of=class_of,
        split_of=splits[class_of],
        pairs=_near_pairs(bank, prints, class_of),
        kept=np.ones(bank.num_images, np.bool_),
    )


def name_in(bank: ImageBank, row: int) -> str:
    """Name an image by split, class and place in it."""
    class_id = int(np.searchsorted(bank.first_row, row, side="right")) - 1
    entry = bank.classes[class_id]
    return f"{entry.split}/{entry.name} #{row - bank.first_row[class_id]}"


def found_in(bank: ImageBank) -> Duplicates:
    """Return the copies of a bank: those that its import found, or else those found now."""
    if bank.duplicates is not None:
        return bank.duplicates
    now = survey(bank)
    overlaps = tuple(now.overlaps(lambda row: name_in(bank, row)))
    return Duplicates(overlaps=overlaps, in_class=int(now.repeated().sum()))


def _near_pairs(
    bank: ImageBank, prints: Fingerprints, class_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the pairs of rows of two classes that are nearly equal, and not equal: [P, 2]."""
    hashes, exact = prints.perceptual, prints.exact
    found = [np.empty((0, 2), np.int64)]
    for pairs in candidates(hashes):
        left, right = pairs.T
        others = (class_of[left] != class_of[right]) & (exact[left] != exact[right])
        found.append(_alike(bank, np.sort(pairs[others], axis=1)))
    return np.unique(np.concatenate(found), axis=0)


def candidates(hashes: Hashes) -> Iterator[NDArray[np.int64]]:
    """Yield pairs of rows whose hashes differ in at most ``BITS`` bits; some come again."""
    for segment in range(BITS + 1):
        turn = np.uint64(16 * segment)
        turned = (hashes << turn) | (hashes >> np.uint64(-16 * segment % 64))
        order = np.argsort(turned, kind="stable")
        values, start = (turned[order] >> np.uint64(48)).astype(np.uint16), np.arange(len(order))
        for step in range(1, WINDOW + 1):
            start = start[start + step < len(order)]
            start = start[values[start] == values[start + step]]
            pairs = np.stack([order[start], order[start + step]], axis=1)
            differ = hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]
            for _ in range(BITS):
                differ &= differ - np.uint64(1)  # one bit less
            yield pairs[differ == 0]


def _alike(bank: ImageBank, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pairs of rows whose pixels are nearly equal."""
    step = max(1, _PART // (8 * int(np.prod(bank.image_shape))))
    alike = np.zeros(len(pairs), np.bool_)
    for first in range(0, len(pairs), step):
        part = slice(first, first + step)
        one, other = (bank.images(side).astype(np.float32) for side in pairs[part].T)
        varying = np.minimum(one.var(axis=(1, 2)), other.var(axis=(1, 2))).mean(axis=-1)  # [n]
        alike[part] = ((one - other) ** 2).mean(axis=(1, 2, 3)) < SAME * varying
    return pairs[alike]
