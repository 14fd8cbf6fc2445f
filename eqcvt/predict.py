"""Class probabilities for images in files and folders."""

from __future__ import annotations

import csv
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eqcvt._check import choice, integer
from eqcvt._files import replacing
from eqcvt.data import read_image, to_unit
from eqcvt.data.files import read_array
from eqcvt.models import VisionModel

ENDINGS = (".png", ".jpg", ".jpeg", ".npy", ".npz")
FITS = ("crop", "pad", "resize", "refuse")


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        name: the file, followed by ``[i]`` where it holds several images.
        label: name of the most probable class.
        probabilities: for each class's name its softmax probability.
        note: how the image was made to fit the model; empty if it did.
    """

    name: str
    label: str
    probabilities: dict[str, float]
    note: str = ""


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files given, and for each folder the image files at any depth in it, sorted.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no image.
        ValueError: a file that is not one of ``ENDINGS``.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS)
            if not inside:
                raise FileNotFoundError(f"{path} holds no image ({', '.join(ENDINGS)})")
            found += inside
        elif not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        elif path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path} is not an image: its ending must be one of {ENDINGS}")
        else:
            found.append(path)
    return found


def read_images(path: Path, channels: int) -> list[NDArray[Any]]:
    """Return the images of one file, each ``[C, H, W]`` with ``C = channels``.

    A picture or ``.npy`` is one image, read as for training; a ``.npz`` holds several,
    ``[N, H, W]`` or ``[N, C, H, W]``, under the key ``images``.

    Raises:
        ValueError: unreadable, not numbers, not finite, or another number of channels.
    """
    array = _read_archive(path) if path.suffix.lower() == ".npz" else read_image(path)[None]
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"{path} holds no images: their shape is {list(array.shape)}")
    if array.shape[1] == 3 and channels == 1 and (array == array[:, :1]).all():
        array = array[:, :1]
    if array.shape[1] != channels:
        raise ValueError(
            f"{path} has {array.shape[1]} channels, and the model takes {channels}: "
            f"convert the image, or train a model on such images"
        )
    return list(array)


def fit_image(image: Tensor, size: int, how: str = "crop") -> tuple[Tensor, str]:
    """Make ``[C, H, W]`` into ``[C, size, size]``; return it and what was done.

    ``crop`` cuts out the centre of a larger image and refuses a smaller one; ``pad`` also puts a
    smaller one in the centre of zeros; ``resize`` interpolates, which changes the pixel scale;
    ``refuse`` refuses every other size.

    Raises:
        ValueError: the image does not fit under ``how``; the message names what would do.
    """
    choice("fit", how, FITS)
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image, ""
    shape = f"{height}x{width}"
    if how == "resize":
        resized = F.interpolate(
            image[None], (size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]
        return resized, f"resized from {shape}: its pixel scale is not the training images'"
    if how == "refuse":
        raise ValueError(
            f"the image is {shape} and the model takes {size}x{size}: "
            f"use --fit crop, --fit pad or --fit resize"
        )
    if how == "crop" and min(height, width) < size:
        raise ValueError(
            f"the image is {shape}, smaller than the model's {size}x{size}: use --fit pad (zeros "
            f"around it) or --fit resize (changes the pixel scale)"
        )
    missing = (max(size - height, 0), max(size - width, 0))
    top, left = missing[0] // 2, missing[1] // 2
    image = F.pad(image, (left, missing[1] - left, top, missing[0] - top))
    top, left = (image.shape[-2] - size) // 2, (image.shape[-1] - size) // 2
    verb = "padded" if any(missing) else "centre-cropped"
    return image[..., top : top + size, left : left + size], f"{verb} from {shape}"


@torch.inference_mode()
def predict(
    model: VisionModel,
    paths: Sequence[str | Path],
    *,
    classes: Sequence[str] = (),
    fit: str = "crop",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> Iterator[Prediction]:
    """Yield a prediction for every image of every file, in the order of the files.

    Args:
        model: an ``EqCvT`` or ``CvT`` in eval mode, on ``device``.
        paths: files and folders (see ``find_images``).
        classes: names of the classes; ``class 0``, ``class 1``, ... if empty.
        fit: what to do with images of another size (see ``fit_image``).
        batch_size: images per forward pass.
        device: where the model is.

    Raises:
        ValueError, FileNotFoundError: as ``find_images``, ``read_images`` and ``fit_image`` say.
    """
    size, channels = model.config["image_size"], model.config["in_channels"]
    names = list(classes) or [f"class {k}" for k in range(model.num_classes)]
    integer("batch_size", batch_size)
    choice("fit", fit, FITS)
    files = find_images(paths)
    waiting: list[tuple[str, Tensor, str]] = []
    for path in files:
        images = read_images(path, channels)
        for i, raw in enumerate(images):
            name = str(path) if len(images) == 1 else f"{path}[{i}]"
            try:
                image, note = fit_image(to_unit(torch.tensor(raw)[None])[0], size, fit)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            waiting.append((name, image, note))
            if len(waiting) == batch_size:
                yield from _run(model, waiting, names, device)
                waiting.clear()
    if waiting:
        yield from _run(model, waiting, names, device)


def write_predictions(predictions: Sequence[Prediction], path: str | Path) -> Path:
    """Write predictions as a table ``.csv`` or a list ``.json``, whole or not at all."""
    path = Path(path)
    choice("the prediction file's ending", path.suffix, (".csv", ".json"))
    with replacing(path) as temporary:
        if path.suffix == ".json":
            temporary.write_text(json.dumps([vars(p) for p in predictions], indent=1) + "\n")
        else:
            with temporary.open("w", newline="") as file:
                table = csv.writer(file)
                names = list(predictions[0].probabilities) if predictions else []
                table.writerow(["file", "class", *names, "note"])
                for p in predictions:
                    table.writerow([p.name, p.label, *p.probabilities.values(), p.note])
    return path


def _run(
    model: VisionModel,
    waiting: Sequence[tuple[str, Tensor, str]],
    classes: Sequence[str],
    device: str | torch.device,
) -> Iterator[Prediction]:
    """Classify one batch."""
    batch = torch.stack([image for _, image, _ in waiting]).to(device)
    table = model(batch).double().softmax(dim=-1).tolist()
    for (name, _, note), row in zip(waiting, table, strict=True):
        if not all(map(math.isfinite, row)):
            raise ValueError(f"{name}: the model gave a value that is not finite")
        best = max(range(len(row)), key=row.__getitem__)
        yield Prediction(name, classes[best], dict(zip(classes, row, strict=True)), note)


def _read_archive(path: Path) -> NDArray[Any]:
    """Return the array ``images`` of a ``.npz`` file, as uint8 or float32."""
    archive = read_array(path)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"cannot read {path}: a .npy file under the name of a .npz file")
    with archive:
        if "images" not in archive.files:
            held = ", ".join(archive.files) or "nothing"
            raise ValueError(f"{path} has no array 'images'; it holds {held}")
        try:
            array: NDArray[Any] = archive["images"]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: 'images' is damaged or pickled ({error})") from error
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{path} holds NaN or infinity")
    if array.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{path}: images must be uint8 or floating, got {array.dtype}")
    return array
