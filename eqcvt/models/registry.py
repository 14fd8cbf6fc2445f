"""Models by name, and models from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eqcvt import _check
from eqcvt.models._base import CONFIG, WEIGHTS, VisionModel, read_config, read_weights
from eqcvt.models.cvt import CVT_13_STAGES, CvT
from eqcvt.models.eqcvt import EqCvT

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
        ValueError: on an unknown name (the nearest is named) or a value that is not allowed.
        TypeError: on an unknown argument.

    Example:
        >>> create_model("eqcvt_c4", in_channels=1).num_features
        32
    """
    architecture, defaults = _MODELS[_check.choice("model", name, list_models())]
    return ARCHITECTURES[architecture](**{**defaults, **kwargs})


def load_model(folder: str | Path, *, device: str = "cpu") -> VisionModel:
    """Load a model of any class from a folder written by ``save_pretrained``.

    Args:
        folder: the folder with ``config.json`` and ``model.safetensors``.
        device: where to put the model.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if a file is damaged or does not fit the model.
    """
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
    return model.to(device).eval()
