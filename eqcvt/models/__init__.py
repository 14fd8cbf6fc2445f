"""The models, their registry and their files."""

from eqcvt.models._base import VisionModel, evaluating, unwrapped
from eqcvt.models.cvt import CvT
from eqcvt.models.eqcvt import EqCvT
from eqcvt.models.registry import (
    create_model,
    list_models,
    list_pretrained,
    load_model,
    load_pretrained,
    pretrained_folder,
)

__all__ = [
    "CvT",
    "EqCvT",
    "VisionModel",
    "create_model",
    "evaluating",
    "list_models",
    "list_pretrained",
    "load_model",
    "load_pretrained",
    "pretrained_folder",
    "unwrapped",
]
