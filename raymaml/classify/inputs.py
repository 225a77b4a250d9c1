"""Images and labels of any kind, as pixels and as numbers of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raymaml.common.errors import UserError, gathered, reason_of
from raymaml.common.untrusted import shortened
from raymaml.data.preprocessing import Preprocessing


class InputError(UserError, ValueError):
    """Images, labels or parameters do not fit; a ``ValueError`` too, as scikit-learn expects."""


def pixels_of(images: Any, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the pixels, uint8 [n, H, W, C], that the model's importer makes of images.

    Args:
        images: a sequence of paths, URIs, bytes, PIL images, arrays or tensors, or one array
            [n, H, W] or [n, H, W, C], or one tensor [n, C, H, W].
        preprocessing: of the model.

    Raises:
        InputError: naming each image that cannot be read.
    """
    channels, height, width = preprocessing.image_shape
    if isinstance(images, str | bytes) or not hasattr(images, "__len__"):
        raise InputError(
            f"images: is of type {type(images).__name__}", remedy="give a sequence of images"
        )
    if isinstance(images, np.ndarray | Tensor) and images.ndim not in (1, 3, 4):
        raise InputError(
            f"images: is of shape {list(images.shape)}",
            remedy="give an array [n, H, W, C] or a tensor [n, C, H, W]",
        )
    found = np.empty((len(images), height, width, channels), dtype=np.uint8)
    try:
        with gathered() as mistakes:
            for number, image in enumerate(images):
                with mistakes.kept(f"images[{number}]"):
                    found[number] = preprocessing.pixels(image)
    except UserError as error:
        raise InputError(*error.mistakes) from error
    return found


def labels_of(labels: Any, count: int) -> NDArray[Any]:
    """Return the labels of ``count`` images, [n].

    Raises:
        InputError: there are other than ``count`` labels.
    """
    values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if values.ndim != 1 or len(values) != count:
        raise InputError(
            f"labels: are of shape {list(values.shape)}, for {count} images",
            remedy="give a label for each image",
        )
    return values


def classes_of(labels: Any, count: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the sorted classes [N], and the class of each of ``count`` images, [n] in 0..N-1.

    Raises:
        InputError: there are other than ``count`` labels, or less than two classes; or labels are
            of a type that names no class.
    """
    values = labels_of(labels, count)
    if values.dtype.kind in "fc" and not (np.isfinite(values) & (values == np.round(values))).all():
        raise InputError(
            f"labels: Unknown label type: {values.dtype}, with values that are no whole numbers",
            remedy="give texts or whole numbers",
        )
    try:
        classes, numbers = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise InputError(f"labels: {reason_of(error)}", remedy="give labels of one type") from None
    if len(classes) < 2:
        raise InputError(
            f"labels: hold {_listed(classes)}", remedy="give images of at least two classes"
        )
    return classes, numbers.astype(np.int64)


def _listed(classes: NDArray[Any]) -> str:
    return f"one class, {shortened(classes.tolist()[0])}" if len(classes) else "no class"
