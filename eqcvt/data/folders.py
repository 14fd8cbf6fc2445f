"""Images in folders as ML4SCI lays them out: one folder per class, perhaps below train and val."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eqcvt.data.files import LensingImages, class_order, join, read_array
from eqcvt.data.pixels import pixels

SPLITS = ("train", "val")
# What others call a set that no training is to see.
HELD_OUT = ("test", "valid", "validation")
_FITS = (".fits", ".fit", ".fits.gz")
ENDINGS = (".png", ".jpg", ".jpeg", ".npy", *_FITS)
SYSTEM = ("thumbs.db", "desktop.ini")


def read_folder(folder: Path) -> LensingImages:
    """Read one folder of images per class, or both splits of them (``train`` first).

    Classes are numbered by name with those that begin with "no" first (no_sub, no). Images are in
    the natural order of their names, class after class.

    Args:
        folder: A folder of ``{class}/*.png|jpg|npy|fits`` or ``{train,val}/{class}/...``.

    Returns:
        The images, grey [N, H, W] or [N, 3, H, W], uint8 or else float32.

    Raises:
        ValueError, TypeError: No images, or one that cannot be read or differs in size or type; it
            is named.
    """
    parts = [folder / name for name in SPLITS if (folder / name).is_dir()]
    if parts:
        return join([_read_classes(part) for part in parts], [str(part) for part in parts])
    return _read_classes(folder)


def read_image(path: str | Path, *, finite: bool = True) -> npt.NDArray[Any]:
    """Read one image file.

    Args:
        path: ``.png``, ``.jpg``, ``.npy`` (never unpickled) or FITS (``.fits``, ``.fit``,
            ``.fits.gz``: of the HDUs that are images the one named SCI, or else the first), with 1
            or 3 channels.
        finite: Refuse NaN and infinity.

    Returns:
        uint8 or float32, [H, W] or [3, H, W].

    Raises:
        ValueError, TypeError: A file that is no such image; it is named.
        ImportError: A FITS file without astropy.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        image = read_array(path)
    else:
        image = (_read_fits if path.name.lower().endswith(_FITS) else _read_picture)(path)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"cannot read {path}: a .npz archive under the name of a .npy file")
    image = pixels(image[None], f"{path}: an image")[0]
    if image.ndim == 3 and image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
        image = np.moveaxis(image, 2, 0)
    if image.ndim == 3 and image.shape[0] == 1:
        image = image[0]
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[0] == 3)) or 0 in image.shape:
        raise ValueError(
            f"{path}: an image must have the shape [H, W], [1, H, W] or [3, H, W], "
            f"got {list(image.shape)}"
        )
    if finite and image.dtype == np.float32 and not np.isfinite(image).all():
        raise ValueError(f"{path} holds NaN or infinity")
    return np.ascontiguousarray(image)


def _read_picture(path: Path) -> npt.NDArray[Any]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            mode = picture.mode
            if mode != "I;16" and picture.format == "PNG" and _png_depth(path) == 16:
                raise ValueError(
                    "it has 16 bits a channel, of which only 8 would be read; save it as 16-bit "
                    "grey, .npy or FITS, or all images as one .npz"
                )
            if mode in ("LA", "RGBA") and picture.getchannel("A").getextrema()[0] == 255:
                return np.asarray(picture.convert(mode[:-1]))
            if mode not in ("L", "RGB", "I;16"):
                raise ValueError(
                    f"its mode is {mode}{' and not opaque' * mode.endswith('A')}; save it as 8-bit "
                    "grey (L) or colour (RGB)"
                )
            return np.asarray(picture)
    except Exception as error:  # Pillow fails in ways of its own on damaged files
        raise ValueError(f"cannot read {path}: {error}") from error


def _png_depth(path: Path) -> int:
    """Bits of a channel, which Pillow does not tell; its modes have 8 but for grey."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _read_fits(path: Path) -> npt.NDArray[Any]:
    try:
        from astropy.io import fits
    except ImportError as error:
        raise ImportError(
            f'reading {path} needs the package astropy: pip install "eqcvt[fits]"'
        ) from error
    try:
        with fits.open(path, memmap=False) as units:
            unit, shapes = None, []
            try:
                for other in units:
                    shapes.append(list(other.shape) if other.is_image else [])
                    if len(shapes[-1]) == 2 or (len(shapes[-1]) == 3 and shapes[-1][0] in (1, 3)):
                        # Errors and weights may come before what was observed.
                        unit = other if unit is None or other.name == "SCI" else unit
                        if other.name == "SCI":
                            break
            except Exception:  # of a damaged one behind an image
                if unit is None:
                    raise
            if unit is None:
                raise ValueError(
                    "no HDU is an image [H, W], [1, H, W] or [3, H, W]; their shapes are "
                    f"{', '.join(map(str, shapes))}"
                )
            blank, zero = (unit.header.get(name) for name in ("BLANK", "BZERO"))
            data: npt.NDArray[Any] = unit.data
            # Counts are often signed.
            if data.dtype.kind not in "iu" or data.dtype == np.uint8:
                return data
            image = data.astype(np.float32 if data.dtype.itemsize <= 2 else np.float64)
            if blank is not None:  # astropy heeds it in all but unsigned counts
                image[data == int(blank) + int(zero or 0)] = np.nan
            return image
    except Exception as error:  # astropy fails in ways of its own on damaged files
        raise ValueError(f"cannot read {path}: {error}") from error


def _natural(path: Path) -> list[Any]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _class_files(folder: Path) -> list[Path]:
    """Return the images of a class, and say what else there is: it may have been meant as one."""
    there = [
        path
        for path in sorted(folder.iterdir(), key=_natural)
        if not path.name.startswith(".") and path.name.lower() not in SYSTEM
    ]
    found = [path for path in there if path.name.lower().endswith(ENDINGS) and not path.is_dir()]
    known = set(found)
    other = [path.name + "/" * path.is_dir() for path in there if path not in known]
    if found and other:
        warnings.warn(
            f"{folder}: {len(other)} of its {len(there)} entries are not read, such as "
            f"{other[0]}; images are {', '.join(ENDINGS)} files right in the folder of their class",
            stacklevel=2,
        )
    return found


def _read_classes(folder: Path) -> LensingImages:
    files = {
        place.name: _class_files(place)
        for place in folder.iterdir()
        if place.is_dir() and not place.name.startswith((".", "__MACOSX"))
    }
    classes = class_order(files)
    if not classes:
        raise ValueError(
            f"{folder} holds no images: expected .npz files, or one folder per class "
            f"(such as no_sub and sub) of {', '.join(ENDINGS)} files"
        )
    empty = [name for name in classes if not files[name]]
    if empty:
        raise ValueError(
            f"{folder / empty[0]} holds no images (expected {', '.join(ENDINGS)} files)"
        )
    paths = [path for name in classes for path in files[name]]
    images: list[npt.NDArray[Any]] = []
    for path in paths:
        image = read_image(path)
        if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            raise ValueError(
                f"{path} is {image.dtype} {list(image.shape)}, but {paths[0]} is "
                f"{images[0].dtype} {list(images[0].shape)}; all images must be alike"
            )
        images.append(image)
    labels = [label for label, name in enumerate(classes) for _ in files[name]]
    return LensingImages(
        images=np.stack(images), labels=np.array(labels, dtype=np.uint8), classes=tuple(classes)
    )
