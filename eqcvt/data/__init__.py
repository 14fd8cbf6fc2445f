"""Lensing images: simulation, files, batches, augmentation."""

from eqcvt.data.augment import MODES, Augment, rotate
from eqcvt.data.config import (
    PRESETS,
    Camera,
    Cosmology,
    Halo,
    Light,
    SimulationConfig,
    Subhalos,
    resolve,
)
from eqcvt.data.files import LensingImages, load, split, to_unit
from eqcvt.data.folders import read_image
from eqcvt.data.loader import Batches
from eqcvt.data.render import Renderer, generate
from eqcvt.data.simulate import simulate

__all__ = [
    "MODES",
    "PRESETS",
    "Augment",
    "Batches",
    "Camera",
    "Cosmology",
    "Halo",
    "LensingImages",
    "Light",
    "Renderer",
    "SimulationConfig",
    "Subhalos",
    "generate",
    "load",
    "read_image",
    "resolve",
    "rotate",
    "simulate",
    "split",
    "to_unit",
]
