"""Training, evaluation and rotation robustness."""

from eqcvt.train.config import RECIPES, TrainConfig
from eqcvt.train.evaluate import evaluate, logits_over_angles, predict_logits, rotation_robustness
from eqcvt.train.loop import TrainResult, train

__all__ = [
    "RECIPES",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "logits_over_angles",
    "predict_logits",
    "rotation_robustness",
    "train",
]
