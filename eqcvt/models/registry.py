"""Models by name, models from a folder, and the trained models that come with the package."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from eqcvt import _check
from eqcvt.models._base import CONFIG, WEIGHTS, VisionModel, read_config, read_weights
from eqcvt.models.cvt import CVT_13_STAGES, CvT
from eqcvt.models.eqcvt import EqCvT

PRETRAINED = Path(__file__).resolve().parents[1] / "weights"

ARCHITECTURES: dict[str, type[VisionModel]] = {"EqCvT": EqCvT, "CvT": CvT}

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"eqcvt_{group.lower()}{'_exact' if invariance == 'exact' else ''}": (
            "EqCvT",
            {"group": group, "invariance": invariance},
        )
        for group in ("C4", "D4", "C8", "D8")
        for invariance in ("front", "exact")
    },
    "cvt": ("CvT", {}),
    "cvt_13": (
        "CvT",
        {
            "stages": CVT_13_STAGES,
            "head_hidden": None,
            "image_size": 224,
            "in_channels": 3,
            "num_classes": 1000,
            "dropout": 0.0,
        },
    ),
}


def list_models() -> list[str]:
    """Return the names that :func:`create_model` knows."""
    return sorted(_MODELS)


def create_model(name: str, **kwargs: Any) -> VisionModel:
    """Build a model by name.

    Args:
        name: one of :func:`list_models`, such as ``"eqcvt_c4"``, ``"eqcvt_c4_exact"`` or ``"cvt"``.
        kwargs: arguments of the model's constructor, which win over the name's.

    Raises:
        ValueError: on an unknown name or argument (the nearest is named), or a value that is not
            allowed.
        TypeError: on a value of the wrong type.

    Example:
        >>> create_model("eqcvt_c4", in_channels=1).num_features
        32
    """
    architecture, defaults = _MODELS[_check.choice("model", name, list_models())]
    known = inspect.signature(ARCHITECTURES[architecture]).parameters
    for key in kwargs:
        _check.choice(f"an argument of {name}", key, known)
    return ARCHITECTURES[architecture](**{**defaults, **kwargs})


def load_model(folder: str | Path, *, device: str = "cpu") -> VisionModel:
    """Load a model of any class from a folder written by ``save_pretrained``.

    Args:
        folder: the folder with ``config.json`` and ``model.safetensors``.
        device: where to put the model.

    Returns:
        The model in evaluation mode; ``model.classes`` are the names of its classes, of a
        ``classes.json`` there or in its run.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if a file is damaged or does not fit the model.
    """
    if not Path(folder).is_dir() and str(folder) in list_pretrained():
        raise FileNotFoundError(
            f"there is no folder {folder}: the trained model of that name comes with the package, "
            f"eqcvt.load_pretrained({str(folder)!r}) loads it"
        )
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    name = _check.choice(
        f"architecture in {folder / CONFIG}", config["architecture"], ARCHITECTURES
    )
    arguments = {key: value for key, value in config.items() if key != "architecture"}
    try:
        model = ARCHITECTURES[name](**arguments)
        model.load_state_dict(read_weights(folder / WEIGHTS))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} does not fit {name} of this version: {error}") from None
    model.name_classes(folder)
    return model.to(device).eval()


def list_pretrained() -> list[str]:
    """Return the names that :func:`load_pretrained` knows; none where no weights were packaged."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{WEIGHTS}"))


def pretrained_folder(name: str) -> Path:
    """Return the folder of a trained model that comes with the package.

    It holds what ``save_pretrained`` writes, ``classes.json`` (the names of the classes),
    ``card.json`` (what the model was trained on, how, and what it reached) and
    ``trained_on.safetensors`` (hashes of its training images).

    Raises:
        ValueError: on an unknown name (the nearest is named), or where no weights were packaged.
    """
    names = list_pretrained()
    if not names:
        raise ValueError(
            f"there is no trained model {name!r}: this installation of eqcvt carries none; train "
            f"one, or load a folder with eqcvt.load_model"
        )
    return PRETRAINED / _check.choice("trained model", name, names)


def load_pretrained(name: str, *, device: str = "cpu") -> VisionModel:
    """Load a trained model that comes with the package; nothing is downloaded.

    Args:
        name: one of :func:`list_pretrained`, such as ``"eqcvt-deeplense"``.
        device: where to put the model.

    Returns:
        The model in evaluation mode, with its ``classes``. :func:`pretrained_folder` has its card;
        ``eqcvt.fast.EqCvT.from_pretrained`` takes the name too.

    Raises:
        ValueError: as :func:`pretrained_folder`.
    """
    return load_model(pretrained_folder(name), device=device)
