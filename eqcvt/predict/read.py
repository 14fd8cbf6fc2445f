"""Reading images a few at a time, fitting them to the model, and handling those that are bad."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eqcvt._check import choice
from eqcvt.data import read_image, to_unit
from eqcvt.data.pixels import check_shape, pixel_type, pixels

FITS = ("crop", "pad", "resize", "refuse")
ROWS = 32  # images of an archive that are read at a time
SKIPPED = "skipped"
CONSTANT = "constant image"

# A file, the number of its images, and the first and the last + 1 of those to read.
Item = tuple[Path, int, int, int]


@dataclass(frozen=True)
class Chunk:
    """Images that follow each other.

    Attributes:
        names: of each, the file, followed by ``[i]`` where it holds several images.
        images: [n, C, S, S], uint8, or float32 from 0 to 1.
        notes: what is to be known of each: how it was made to fit the model, that it is constant,
            or why it could not be read.
        read: whether each could be read; the others are zeros.
    """

    names: list[str]
    images: Tensor
    notes: list[str]
    read: list[bool]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> Chunk:
        return Chunk(self.names[rows], self.images[rows], self.notes[rows], self.read[rows])


@dataclass(frozen=True)
class Reader:
    """What images are made into, and what becomes of bad ones."""

    channels: int
    size: int
    fit: str
    skip_bad: bool

    def read(self, group: Iterable[Item]) -> Generator[Chunk, None, None]:
        """Yield the images of a group of files."""
        for path, count, start, stop in group:
            try:
                # Rows of a damaged archive cannot be taken back once they are yielded. Where its
                # last row ends the run anyway, the checksum is compared there, at no cost.
                check = self.skip_bad or stop - start < count
                for array in _rows(path, start, stop, check=check):
                    names = _names(path, count, start, start + len(array))
                    yield self._chunk(path, names, array)
                    start += len(array)
            except Exception as error:  # decoders fail in ways of their own on damaged files
                if not self.skip_bad or isinstance(error, ImportError):
                    raise
                yield self._unread(_names(path, count, start, stop), str(error))

    def _chunk(self, path: Path, names: list[str], array: NDArray[Any]) -> Chunk:
        """Return images ``[n, C, H, W]`` as the model takes them."""
        images, note = torch.from_numpy(np.require(array, requirements=["C", "W"])), ""
        flat = _flat(images)  # of which interpolation would make noise
        # Grey values of the right size stay bytes until they are on the device.
        if images.dtype != torch.uint8 or images.shape[-2:] != (self.size, self.size):
            try:
                images, note = fit_image(images, self.size, self.fit)
            except ValueError as error:
                raise ValueError(f"{names[0]}: {error}") from error
        flat |= _flat(images)
        given = images.shape[1]
        colour = (
            f"has {given} channel{'s' * (given > 1)}, and the model takes {self.channels}: "
            f"convert the image, or train a model on such images"
        )
        # What is not finite has made other pixels of the image NaN.
        finite = images.isfinite().flatten(1).all(1)
        read = finite.clone()
        if given == 3 and self.channels == 1:
            read &= (images == images[:, :1]).flatten(1).all(1)
            images = images[:, :1]
        elif given != self.channels:
            raise ValueError(f"{path} {colour}")
        whys = ["holds NaN or infinity" if not ok else colour for ok in finite.tolist()]
        if not read.all():
            if not self.skip_bad:
                first = read.tolist().index(False)
                raise ValueError(f"{names[first]} {whys[first]}")
            images[~read] = 0
        said = (note, f"{note}; {CONSTANT}" if note else CONSTANT)
        notes = [
            said[same] if ok else f"{SKIPPED}: it {why}"
            for ok, same, why in zip(read.tolist(), flat.tolist(), whys, strict=True)
        ]
        return Chunk(names, images, notes, read.tolist())

    def _unread(self, names: list[str], why: str) -> Chunk:
        """Return zeros in the place of images that could not be read."""
        shape = (len(names), self.channels, self.size, self.size)
        images = torch.zeros(1, dtype=torch.uint8).expand(shape)
        note = f"{SKIPPED}: {' '.join(why.split())}"
        return Chunk(names, images, [note] * len(names), [False] * len(names))


def _flat(images: Tensor) -> Tensor:
    """Return which images have pixels of one value only, bool [n]."""
    pixels = images.flatten(1)
    return (pixels == pixels[:, :1]).all(1)


def _names(path: Path, count: int, start: int, stop: int) -> list[str]:
    """Return what images of a file that holds ``count`` of them are called."""
    return [f"{path}[{i}]" for i in range(start, stop)] if count > 1 else [str(path)]


def fit_image(images: Tensor, size: int, how: str = "crop") -> tuple[Tensor, str]:
    """Make images ``[B, C, H, W]`` what a model takes; return them and what was done.

    ``crop`` cuts out the centre of a larger image and refuses a smaller one; ``pad`` also puts a
    smaller one in the centre of zeros; ``resize`` interpolates, which changes the pixel scale;
    ``refuse`` refuses every other size.

    The images are scaled as for training (see ``to_unit``) by the pixels that the model sees:
    after ``crop`` and ``resize``, and before the zeros are put around them.

    Args:
        images: uint8 or floating, not scaled.
        size: of the images that are returned, ``[B, C, size, size]``, float32 from 0 to 1.
        how: ``crop``, ``pad``, ``resize`` or ``refuse``.

    Raises:
        ValueError: the images do not fit under ``how``; the message names what would do.
    """
    choice("fit", how, FITS)
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return to_unit(images), ""
    shape = f"{height}x{width}"
    if how == "resize":
        grey = images.dtype == torch.uint8
        images = F.interpolate(
            to_unit(images) if grey else images.to(torch.float32),
            (size, size),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        note = f"resized from {shape}: its pixel scale is not the training images'"
        return images if grey else to_unit(images), note
    if how == "refuse":
        crop = "--fit crop, " if min(height, width) >= size else ""
        raise ValueError(
            f"the image is {shape} and the model takes {size}x{size}: "
            f"use {crop}--fit pad or --fit resize"
        )
    if how == "crop" and min(height, width) < size:
        raise ValueError(
            f"the image is {shape}, smaller than the model's {size}x{size}: use --fit pad (zeros "
            f"around it) or --fit resize (changes the pixel scale)"
        )
    top, left = max(height - size, 0) // 2, max(width - size, 0) // 2
    images = to_unit(images[..., top : top + size, left : left + size])
    missing = (max(size - height, 0), max(size - width, 0))
    top, left = missing[0] // 2, missing[1] // 2
    images = F.pad(images, (left, missing[1] - left, top, missing[0] - top))
    return images, f"{'padded' if any(missing) else 'centre-cropped'} from {shape}"


def count_images(path: Path) -> int:
    """Return the number of images in a file."""
    if path.suffix.lower() != ".npz":
        return 1
    with _archive(path) as (_, _, shape, _):
        return shape[0]


def _rows(path: Path, start: int, stop: int, *, check: bool = True) -> Iterator[NDArray[Any]]:
    """Yield images ``start`` to ``stop - 1`` of a file, ``[n, C, H, W]``, uint8 or float32.

    A picture, ``.npy`` or FITS file is one image, read as for training, but for NaN, which may be
    cut away later. A ``.npz`` holds several, ``[N, H, W]`` or ``[N, C, H, W]``, under the key
    ``images``, of which a few are in memory at a time. With ``check`` its checksum is compared
    before the first image is yielded, and otherwise when the last one of the archive is read.

    Raises:
        ValueError: unreadable, or not numbers.
    """
    if path.suffix.lower() != ".npz":
        image = read_image(path, finite=False)
        yield image.reshape(1, -1, *image.shape[-2:])
        return
    with _archive(path, check=check) as (file, dtype, shape, order):
        # Only an array in C's order has its images one after the other.
        before, step = (start, ROWS) if order == "C" else (0, shape[0])
        width = dtype.itemsize * math.prod(shape[1:])
        file.seek(before * width, 1)
        while before < stop:
            count = min(step, stop - before) if order == "C" else step
            data = file.read(count * width)
            if len(data) < count * width:
                raise ValueError("'images' is truncated")
            array = np.frombuffer(data, dtype).reshape((count, *shape[1:]), order=order)
            array = array[max(start - before, 0) : stop - before]
            before += count
            yield pixels(array).reshape(len(array), -1, *shape[-2:])


_Header = tuple[IO[bytes], np.dtype[Any], tuple[int, ...], Literal["C", "F"]]


@contextmanager
def _archive(path: Path, *, check: bool = False) -> Iterator[_Header]:
    """Open the array ``images`` of a ``.npz`` file: the bytes behind its header, and the header.

    With ``check`` all of it is read once before, for its checksum.

    Raises:
        ValueError: no such array or no images; what goes wrong inside the block, with the path.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if "images.npy" not in archive.namelist():
                held = ", ".join(n.removesuffix(".npy") for n in archive.namelist()) or "nothing"
                raise ValueError(f"it has no array 'images'; it holds {held}")
            if check:
                with archive.open("images.npy") as file:
                    while file.read(1 << 20):
                        pass
            with archive.open("images.npy") as file:
                read = _HEADERS.get(np.lib.format.read_magic(file))
                if read is None:
                    raise ValueError("'images' is an array with named columns")
                shape, fortran, dtype = read(file)
                if dtype.hasobject:
                    raise ValueError("'images' holds pickled Python objects, which are not read")
                pixel_type(dtype)
                check_shape(shape)
                if min(shape) < 1:
                    raise ValueError(f"it holds no images: their shape is {list(shape)}")
                size = archive.getinfo("images.npy").file_size - file.tell()
                if math.prod(shape) * dtype.itemsize != size:
                    raise ValueError(f"'images' has {size} bytes, too few or many for {shape}")
                yield file, dtype, shape, "F" if fortran else "C"
    except Exception as error:  # numpy and zipfile fail in many ways on damaged files
        raise ValueError(f"cannot read {path}: {error}") from error


_HEADERS: dict[Any, Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
