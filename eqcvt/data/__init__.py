"""Lensing images: simulation, files, batches, augmentation, contact sheets."""

from .augment import MODES, Augment, rotate
from .config import (
    PRESETS,
    Camera,
    Cosmology,
    Halo,
    Light,
    SimulationConfig,
    Subhalos,
    resolve,
)
from .files import LensingImages, load, split, to_unit
from .folders import read_image
from .loader import Batches
from .render import Renderer, generate
from .sheet import contact_sheet
from .simulate import simulate

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
    "contact_sheet",
    "generate",
    "load",
    "read_image",
    "resolve",
    "rotate",
    "simulate",
    "split",
    "to_unit",
]
