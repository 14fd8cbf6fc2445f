"""EqCvT: a rotation-equivariant Convolutional vision Transformer for strong-lensing images."""

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType

from eqcvt import convert, nn, ops
from eqcvt.fast import accelerate, decelerate
from eqcvt.models import (
    CvT,
    EqCvT,
    create_model,
    list_models,
    list_pretrained,
    load_model,
    load_pretrained,
    pretrained_folder,
)
from eqcvt.ops import use_backend

try:
    __version__ = _version("eqcvt")
except _PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CvT",
    "EqCvT",
    "__version__",
    "accelerate",
    "convert",
    "create_model",
    "decelerate",
    "list_models",
    "list_pretrained",
    "load_model",
    "load_pretrained",
    "nn",
    "ops",
    "pretrained_folder",
    "use_backend",
]

# Parts that need more than the models, each imported when it is first asked for.
_LATER = ("data", "export", "plots", "predict", "report", "train", "tune")


def __getattr__(name: str) -> _ModuleType:
    if name in _LATER:
        return _import_module(f"eqcvt.{name}")
    raise AttributeError(f"module 'eqcvt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
