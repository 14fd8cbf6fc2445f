"""A model's class probabilities for a stream of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eqcvt._check import amp_dtype, integer
from eqcvt.data import to_unit
from eqcvt.models import VisionModel, evaluating, unwrapped
from eqcvt.predict.ahead import ahead
from eqcvt.predict.images import Images
from eqcvt.predict.read import SKIPPED, Chunk


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        name: the file, followed by ``[i]`` where it holds several images.
        label: name of the most probable class; empty if the image could not be read.
        probabilities: for each class's name its softmax probability; empty likewise.
        note: how the image was made to fit the model, that it is constant, or why it could not be
            read; else empty.
    """

    name: str
    label: str
    probabilities: dict[str, float]
    note: str = ""


def class_names(model: VisionModel, classes: Sequence[str] = ()) -> list[str]:
    """Return the names given, or else the model's own, or ``class_0``, ``class_1``, ...

    Raises:
        ValueError: another number of names than the model has classes, two that are the same, or a
            model without any classes.
        TypeError: what is no ``EqCvT`` or ``CvT``, such as one in a ``DataParallel``.
    """
    model = unwrapped(model)
    number = model.num_classes
    if not number:
        raise ValueError("the model has no classes (num_classes=0): reset_classifier gives it some")
    names = list(classes or model.classes or ()) or [f"class_{k}" for k in range(number)]
    if len(names) != number:
        raise ValueError(f"the model has {number} classes, got {len(names)} names: {names}")
    if len(set(names)) < number:
        raise ValueError(f"the names of classes must differ, got {names}")
    return names


def predict(
    model: VisionModel,
    images: Images | str | Path | Iterable[str | Path],
    *,
    classes: Sequence[str] = (),
    fit: str = "crop",
    batch_size: int = 64,
    amp: str = "off",
    readers: int = 4,
) -> Iterator[Prediction]:
    """Yield a prediction for every image, in order; a few batches are in memory at a time.

    What is given is checked, and the files are found, at once. Threads read the next images while
    the model is at work, and on a GPU the next batch is sent while the last one's results come
    back. An array goes to the model itself: ``model(eqcvt.data.to_unit(array))``.

    Args:
        model: an ``EqCvT`` or ``CvT``; its device does the work. Each batch is evaluated as in
            evaluation mode, and the model keeps the mode it is in.
        images: a file or folder, or several (see ``find_images``), or ``Images`` of them, which may
            be a part and pass over bad images.
        classes: names of the classes; if empty, as ``class_names`` says.
        fit: what to do with images of another size (see ``fit_image``).
        batch_size: images per forward pass.
        amp: ``off``, ``bf16`` or ``fp16``: autocast, the latter on a GPU only.
        readers: threads that read and decode.

    Raises:
        ValueError, TypeError, FileNotFoundError: as ``class_names``, ``Images.find`` and
            ``Images.chunks`` say.
    """
    names = class_names(model, classes)
    integer("batch_size", batch_size)
    dtype = amp_dtype(amp, next(model.parameters()).device.type)
    if isinstance(images, (str, Path)):
        images = [images]
    found = images if isinstance(images, Images) else Images.find(images, readers=readers)
    size, channels = model.config["image_size"], model.config["in_channels"]
    chunks = found.chunks(channels, size, fit, readers=readers)
    return _predictions(model, chunks, names, batch_size, dtype, found.skip_bad)


@torch.inference_mode()
def _predictions(
    model: VisionModel,
    chunks: Iterable[Chunk],
    names: Sequence[str],
    batch_size: int,
    dtype: torch.dtype | None,
    skip_bad: bool,
) -> Iterator[Prediction]:
    """Yield the predictions of chunks of images."""
    weights = next(model.parameters())
    device = weights.device
    before: tuple[Chunk, Callable[[], Tensor]] | None = None
    for batch in ahead([_batches(chunks, batch_size, device)], threads=1, depth=2):
        x = _unit(batch.images.to(device, non_blocking=True)).to(weights.dtype)
        with (
            evaluating(model),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
        ):
            logits = model(x)
        # The results of a batch are waited for when the next one is on its way.
        if before is not None:
            yield from _answers(*before, names, skip_bad)
        before = batch, _fetched(logits.double().softmax(dim=-1))
    if before is not None:
        yield from _answers(*before, names, skip_bad)


def _fetched(results: Tensor) -> Callable[[], Tensor]:
    """Send results to the CPU; return what waits for them, and for nothing that comes after."""
    if results.device.type != "cuda":
        return lambda: results
    there = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
    there.copy_(results, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(results.device))

    def wait() -> Tensor:
        done.synchronize()
        return there

    return wait


def _unit(images: Tensor) -> Tensor:
    """Scale bytes to numbers from 0 to 1; what is floating has been scaled before."""
    return to_unit(images) if images.dtype == torch.uint8 else images


def _batches(
    chunks: Iterable[Chunk], size: int, device: torch.device
) -> Generator[Chunk, None, None]:
    """Cut and join chunks to batches of ``size``, the last one perhaps smaller."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins on the first GPU
    held: list[Chunk] = []
    missing = size
    for chunk in chunks:
        while len(chunk) >= missing:
            yield _joined([*held, chunk[:missing]], device)
            chunk, held, missing = chunk[missing:], [], size
        if len(chunk):
            held.append(chunk)
            missing -= len(chunk)
    if held:
        yield _joined(held, device)


def _joined(chunks: Sequence[Chunk], device: torch.device) -> Chunk:
    """Return one chunk, of one dtype, in memory that a GPU can copy from by itself."""
    parts = [chunk.images for chunk in chunks]
    if len({part.dtype for part in parts}) > 1:
        parts = [_unit(part) for part in parts]
    images = torch.cat(parts)
    return Chunk(
        [name for chunk in chunks for name in chunk.names],
        images.pin_memory() if device.type == "cuda" else images,
        [note for chunk in chunks for note in chunk.notes],
        [read for chunk in chunks for read in chunk.read],
    )


def _answers(
    batch: Chunk, probabilities: Callable[[], Tensor], classes: Sequence[str], skip_bad: bool
) -> Iterator[Prediction]:
    """Yield the predictions of one batch."""
    rows = zip(batch.names, batch.notes, batch.read, probabilities().tolist(), strict=True)
    for name, note, read, row in rows:
        if read and not all(map(math.isfinite, row)):
            why = "the model gave a value that is not finite"
            if not skip_bad:
                raise ValueError(f"{name}: {why}")
            note, read = f"{SKIPPED}: {why}", False
        if read:
            best = max(range(len(row)), key=row.__getitem__)
            yield Prediction(name, classes[best], dict(zip(classes, row, strict=True)), note)
        else:
            yield Prediction(name, "", {}, note)
