"""Trained models on disk: which files a name means, and going on from one with other images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eqcvt._check import choice
from eqcvt._files import replacing, write_tensors
from eqcvt.models import VisionModel, list_pretrained, pretrained_folder
from eqcvt.models._base import CONFIG, WEIGHTS, class_names, read_config, read_weights

SEEN = "trained_on.safetensors"
# What a model may differ in from the one whose weights it starts from.
FREE = {"image_size", "num_classes", "dropout"}
CLASSIFIER = "head.classifier."


def model_folder(path: Path, *, last: bool = False) -> Path:
    """Return the folder with the model's files that ``path`` means.

    ``path`` is a checkpoint folder, a run folder, whose best (or last) model is meant, or, where
    there is no such folder, the name of a trained model that comes with the package.

    Raises:
        FileNotFoundError, ValueError: if it is none of these; the message says what would do.
    """
    names = list_pretrained()
    if not path.exists() and names and len(path.parts) == 1:
        return pretrained_folder(choice(f"no folder {path}, and a trained model", str(path), names))
    if not path.exists():
        raise FileNotFoundError(f"no folder {path}: give a run folder or a checkpoint folder")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is a file: give a run folder or a checkpoint folder")
    chosen = path / ("last" if last else "best")
    if (chosen / WEIGHTS).is_file():
        return chosen
    if (path / WEIGHTS).is_file():
        return path
    raise FileNotFoundError(f"{path} holds no model: neither {WEIGHTS} nor {chosen.name}/{WEIGHTS}")


def seen_images(folder: Path) -> NDArray[np.int64] | None:
    """Return the ``LensingImages.hashes`` of what the model in a checkpoint folder was trained on.

    They are in its run, or beside a model that comes with the package; None where not known.

    Raises:
        ValueError: if the file that holds them is damaged.
    """
    path = (folder.parent if folder.name in ("best", "last") else folder) / SEEN
    return np.asarray(read_weights(path)["images"]) if path.is_file() else None


def save_seen_images(run: Path, hashes: NDArray[np.int64]) -> None:
    """Write what ``seen_images`` reads of the models of a run."""
    with replacing(run / SEEN) as new:
        write_tensors(new, {"images": torch.from_numpy(np.unique(hashes))})


def start_from(model: VisionModel, source: str, classes: Sequence[str]) -> str:
    """Give a new model the weights of a trained one.

    The classifier stays new where the trained one knows other classes.

    Args:
        model: the new model, which may differ in image size, classes and dropout only.
        source: as ``model_folder`` takes it.
        classes: names of the new model's classes.

    Returns:
        What was done, in a sentence.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is of another kind; the message says in what.
    """
    folder = model_folder(Path(source))
    theirs, ours = read_config(folder / CONFIG), json.loads(json.dumps(model.config))
    differ = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted({*theirs, *ours} - FREE)
        if theirs.get(key) != ours.get(key)
    ]
    if differ:
        raise ValueError(f"cannot start from {folder}: {'; '.join(differ)}")
    weights = read_weights(folder / WEIGHTS)
    known = class_names(folder)
    same = theirs["num_classes"] == ours["num_classes"] and known in ((), tuple(classes))
    if not same:
        own = model.state_dict()
        weights |= {name: own[name] for name in own if name.startswith(CLASSIFIER)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder} is not whole: {error}") from None
    kept = "" if same else f"; the classifier is new, as its classes were {', '.join(known) or '?'}"
    return f"starts from {source}{kept}"
