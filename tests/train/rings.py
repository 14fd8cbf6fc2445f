"""Tiny images of rings whose radius is the class, and a configuration to train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eqcvt.data import LensingImages
from eqcvt.train import TrainConfig

SIZE = 33
TINY: dict[str, Any] = {
    "fields": 2,
    "stages": [{"dim": 8, "head_dim": 8}],
    "head_hidden": 8,
}


def rings(count: int, *, classes: int = 2, seed: int = 0, noise: float = 10.0) -> LensingImages:
    """Noisy uint8 images of rings with the radii 6, 9, ... for the classes 0, 1, ..."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % classes).astype(np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    radius = 6.0 + 3.0 * labels[:, None, None]
    light = 180 * np.exp(-((np.hypot(x, y) - radius) ** 2) / 2)
    images = np.clip(light + noise * random.standard_normal(light.shape) + 30, 0, 255)
    names = ("no_sub", "sub", "vortex")[:classes]
    return LensingImages(images.astype(np.uint8), labels, names)


def config(folder: Path, **changes: Any) -> TrainConfig:
    """A run of two short epochs on rings, whose files lie in ``folder``."""
    for name, count in (("train", 24), ("val", 11)):
        path = folder / f"{name}.npz"
        if not path.exists():
            rings(count, seed=count).save(path)
    values = {
        "data": folder / "train.npz",
        "val_data": folder / "val.npz",
        "out": folder / "run",
        "model_kwargs": TINY,
        "epochs": 2,
        "batch_size": 8,
        "augment": "dihedral",
        "device": "cpu",
    }
    return TrainConfig(**{**values, **changes})


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
        for row in history
    ]
