"""The shapes and types of images that are read, and the type they are kept in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse the shape of an array that is not images one after the other, channels first."""
    if len(shape) not in (3, 4):
        raise ValueError(f"images must have the shape [N, H, W] or [N, C, H, W], got {shape}")
    if len(shape) == 4 and shape[3] <= 4 < min(shape[1:3]):
        raise ValueError(
            f"images must have the shape [N, C, H, W], channels first, got {shape}: save "
            "np.moveaxis(images, -1, 1)"
        )


def pixel_type(dtype: np.dtype[Any], what: str = "images") -> np.dtype[Any]:
    """Return the type that images of a type are kept in: uint8, or else float32.

    Raises:
        TypeError: The type is neither floating nor uint8 or uint16, in either byte order.
    """
    if dtype.kind == "f" or (dtype.kind == "u" and dtype.itemsize <= 2):
        return np.dtype(np.uint8 if dtype == np.uint8 else np.float32)
    raise TypeError(
        f"{what} must be uint8, uint16 or floating, got {dtype}: save it as "
        f"float{64 if dtype.itemsize > 2 else 32} instead"
    )


def pixels(images: npt.NDArray[Any], what: str = "images") -> npt.NDArray[Any]:
    """Return images, one after the other, in the type of ``pixel_type``.

    An image of wider numbers whose differences float32 cannot hold, as those of a pedestal of 1e9
    or of units of 1e-50, is scaled from its own minimum to its maximum (see ``to_unit``) before.
    """
    kind = pixel_type(images.dtype, what)
    if images.dtype.itemsize <= 4:
        return images.astype(kind, copy=False)
    each, finite = tuple(range(1, images.ndim)), np.isfinite(images)
    low = images.min(axis=each, where=finite, initial=np.inf, keepdims=True)
    high = images.max(axis=each, where=finite, initial=-np.inf, keepdims=True)
    # What is larger overflows, what is smaller is rounded more than the others are, and float32
    # has 24 bits, of which an image's own range is left 13.
    size, span = np.maximum(-low, high), high / 2 - low / 2
    lost = (size > np.finfo(kind).max) | (size < 1e-30) | (span < size * 2.0**-12)
    if lost.any():
        with np.errstate(invalid="ignore"):  # of pixels that are not finite
            unit = (images / 2 - low / 2) / np.where(span > 0, span, 1)
        images = np.where(lost, unit, images)
    return images.astype(kind)
