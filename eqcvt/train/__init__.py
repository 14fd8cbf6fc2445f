"""Training, evaluation and rotation robustness."""

from eqcvt.train.average import Average
from eqcvt.train.config import RECIPES, TrainConfig
from eqcvt.train.evaluate import evaluate, logits_over_angles, predict_logits, rotation_robustness
from eqcvt.train.graph import GraphedStep
from eqcvt.train.loop import TrainResult, train
from eqcvt.train.step import Step

__all__ = [
    "RECIPES",
    "Average",
    "GraphedStep",
    "Step",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "logits_over_angles",
    "predict_logits",
    "rotation_robustness",
    "train",
]
