"""Finding and loading the models that a command names, and refusing to write over results."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eqcvt.models import VisionModel, list_pretrained
from eqcvt.train.trained import model_folder


@dataclass(frozen=True)
class Loaded:
    """A model from disk.

    Attributes:
        model: in eval mode, on ``device``.
        name: a short name for tables and pictures.
        folder: the checkpoint folder.
        run: the run folder it belongs to, if any.
        packaged: whether it came with the package and was given by name.
        device: where the model is.
    """

    model: VisionModel
    name: str
    folder: Path
    run: Path | None
    packaged: bool
    device: torch.device


def load(path: Path, *, last: bool = False, device: str = "auto") -> Loaded:
    """Load the model that ``path`` means (see ``model_folder``).

    Under torchrun, ``auto`` and ``cuda`` stand for the process's own GPU.

    Raises:
        FileNotFoundError: the folder, or a model in it, does not exist.
        ValueError: no such name, the files are damaged or no model of ours, or the device does not
            exist.
    """
    import eqcvt
    from eqcvt.nn import set_backend
    from eqcvt.train.distributed import resolve_device

    where = resolve_device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    folder = model_folder(path, last=last)
    packaged = not path.exists()
    run = folder.parent if folder.name in ("best", "last") else None
    model = eqcvt.load_model(folder).to(where).eval()
    set_backend(model, None)  # the fastest there is, or what EQCVT_BACKEND names
    return Loaded(model, display_name(model.config), folder, run, packaged, where)


def help_text(what: str) -> str:
    """Return the help of an argument that ``load`` reads: what it may be, and the names."""
    names = ", ".join(list_pretrained())
    return f"{what}{f', or a trained model that comes with eqcvt: {names}' if names else ''}."


def display_name(config: dict[str, Any]) -> str:
    """Return a model's name for tables, such as ``EqCvT C4 exact``."""
    parts = [str(config["architecture"])]
    parts += [str(config[key]) for key in ("group", "invariance") if key in config]
    return " ".join(parts)


def distinct(models: list[Loaded]) -> dict[str, Loaded]:
    """Return models by name, with their folder added where two names are the same."""
    names = [found.name for found in models]
    result: dict[str, Loaded] = {}
    for found in models:
        name = found.name
        if names.count(name) > 1:
            name += f" ({(found.run or found.folder).name})"
        while name in result:
            name += "'"
        result[name] = found
    return result


def free(path: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Refuse a path that exists, and is no empty folder, unless it may be replaced.

    Raises:
        FileExistsError: naming the option that allows it.
        IsADirectoryError: a folder where a file is to be, unless ``folder``.
    """
    if path.is_dir() and not folder:
        raise IsADirectoryError(f"{path} is a folder: give the path of a file")
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise FileExistsError(f"{path} exists: give another path, or --overwrite to replace it")
