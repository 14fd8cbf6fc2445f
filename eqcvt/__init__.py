"""EqCvT: a rotation-equivariant Convolutional vision Transformer for strong-lensing images."""

from importlib.metadata import PackageNotFoundError, version

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
    __version__ = version("eqcvt")
except PackageNotFoundError:  # run from a source tree that is not installed
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
