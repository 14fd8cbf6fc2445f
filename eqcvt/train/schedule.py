"""Learning-rate schedules as plain functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

from eqcvt.train.config import TrainConfig

START, END = 1 / 25, 1 / 25e4


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    r"""The learning rate of optimiser step ``step`` (from 0).

    With T steps in all, W of warm-up, and cos(a -> b, t) = b + (a - b) (1 + cos(pi t)) / 2:

    - ``onecycle``: cos(1/25 -> 1) up to step W - 1, then cos(1 -> 1/250,000) down to step T - 1
      (Smith & Topin 2018, arXiv:1708.07120, with torch's OneCycleLR constants).
    - ``cosine``: (s + 1) / W below W, then cos(1 -> 0, (s - W) / (T - W)).
    - ``step``: the same warm-up, then gamma^floor(epoch / step_epochs).
    - ``constant``: the same warm-up, then 1.

    Args:
        config: ``lr`` is the value at 1.
        step: counted over the whole run.
        steps_per_epoch: optimiser steps in an epoch.

    Returns:
        The rate for this step.
    """
    total = config.epochs * steps_per_epoch
    if config.schedule == "onecycle":
        share = 0.3 if config.warmup_epochs is None else config.warmup_epochs / config.epochs
        top = max(share * total - 1, 0.0)
        if step < top:
            return config.lr * _cosine(START, 1, step / top)
        return config.lr * _cosine(1, END, (step - top) / max(total - 1 - top, 1e-9))
    warm = (config.warmup_epochs or 0) * steps_per_epoch
    if step < warm:
        return config.lr * min((step + 1) / warm, 1)
    if config.schedule == "cosine":
        return config.lr * _cosine(1, 0, (step - warm) / (total - warm))
    if config.schedule == "step":
        epoch = step // steps_per_epoch
        return float(config.lr * config.step_gamma ** (epoch // config.step_epochs))
    return config.lr


def _cosine(start: float, end: float, t: float) -> float:
    """Half a cosine wave from ``start`` at t = 0 to ``end`` at t = 1."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
