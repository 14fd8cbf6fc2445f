"""The shapes and types of images that are read, and the type they are kept in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unmasked(images: npt.ArrayLike, what: str = "images") -> npt.NDArray[Any]:
    """Return an array, or refuse one that hides numbers: no model would know which."""
    if isinstance(images, np.ma.MaskedArray) and (hidden := int(np.sum(images.mask))):
        raise ValueError(
            f"{what} must be plain arrays, got one that masks {hidden} of its {images.size} "
            "numbers: give these a value, as in images.filled(0)"
        )
    return np.asarray(images)


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
    What is too large for float32 becomes infinite.
    """
    kind = pixel_type(images.dtype, what)
    if images.dtype.itemsize <= 4:
        return images.astype(kind, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        kept = images.astype(kind)
        for image, into in zip(images, kept, strict=True):
            finite = np.isfinite(into)
            low = image.min(where=finite, initial=np.inf)
            span = image.max(where=finite, initial=-np.inf) - low
            size = np.abs(image).max(where=finite, initial=0)
            # float32 rounds what is smaller more, and has 24 bits, of which seven are left.
            if span > 0 and (size < 1e-30 or span < size * 2.0**-17):
                into[...] = (image - low) / span
    return kept
