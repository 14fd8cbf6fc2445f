"""Simulation configurations: every number of the simulated sets, as frozen dataclasses.

Units: angles on the sky in arcseconds, orientations in radians, masses in solar masses,
intensities in electrons per second and pixel. A field that is a pair ``(low, high)`` is drawn
uniformly between the two; a single number stands for ``(number, number)``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from eqcvt._check import boolean, choice, integer, number

Range = tuple[float, float]
STRUCTURES = ("none", "point", "tnfw", "line")


def _number(low: float = 0.0, high: float = math.inf) -> dict[str, Any]:
    return {"check": partial(number, low=low, high=high)}


def _range(low: float = 0.0, high: float = math.inf) -> dict[str, Any]:
    return {"check": partial(_checked_range, low=low, high=high)}


def _integer(minimum: int = 1) -> dict[str, Any]:
    return {"check": partial(integer, minimum=minimum)}


def _checked_range(what: str, given: object, low: float, high: float) -> Range:
    pair = (given, given) if isinstance(given, (int, float)) else given
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{what} must be a number or a pair (low, high), got {given!r}")
    first, last = (number(what, value, low, high) for value in pair)
    if first > last:
        raise ValueError(f"{what} must be a pair (low, high) with low <= high, got {given!r}")
    return first, last


@dataclass(frozen=True)
class _Section:
    """Checks every field against its metadata, so that a section in hand is a valid one."""

    def __post_init__(self) -> None:
        for item in fields(self):
            what = f"{type(self).__name__.lower()}.{item.name}"
            value = item.metadata["check"](what, getattr(self, item.name))
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class Cosmology(_Section):
    """Flat LCDM and the two redshifts; ``hubble`` in km/s/Mpc."""

    lens_redshift: float = field(default=0.5, metadata=_number(1e-4, 20))
    source_redshift: float = field(default=1.0, metadata=_number(1e-4, 20))
    hubble: float = field(default=70.0, metadata=_number(1, 1000))
    omega_matter: float = field(default=0.3, metadata=_number(0, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_redshift <= self.lens_redshift:
            raise ValueError(
                f"cosmology.source_redshift must be above lens_redshift {self.lens_redshift}, "
                f"got {self.source_redshift}"
            )


@dataclass(frozen=True)
class Camera(_Section):
    """Pixels, point-spread function and noise.

    A field of ``pixels`` x ``pixels`` is imagined and its centre of ``size`` x ``size`` kept, the
    lens at the middle of the kept part. Only the kept part and the margin from which the PSF
    scatters light into it are computed. ``oversampling`` is the number of rays per pixel side.
    The PSF is a Gaussian of ``psf_sigma`` arcseconds sampled on ``psf_pixels`` x ``psf_pixels``
    pixels, at least 5 ``psf_sigma`` wide (0 arcseconds: none); ``exposure`` in seconds; ``sky`` in
    electrons/s/pixel.
    """

    pixels: int = field(default=150, metadata=_integer())
    size: int = field(default=129, metadata=_integer())
    pixel_scale: float = field(default=0.06, metadata=_number(1e-4, 10))
    oversampling: int = field(default=2, metadata=_integer())
    psf_sigma: float = field(default=0.1, metadata=_number(0, 10))
    psf_pixels: int = field(default=11, metadata=_integer())
    exposure: float = field(default=300.0, metadata=_number(1e-3))
    sky: float = field(default=0.1, metadata=_number())
    noise: bool = field(default=True, metadata={"check": boolean})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size > self.pixels:
            raise ValueError(
                f"camera.size must be at most camera.pixels ({self.pixels}), got {self.size}"
            )
        if self.psf_pixels % 2 == 0:
            raise ValueError(
                f"camera.psf_pixels must be odd, got {self.psf_pixels}; "
                f"nearest: {self.psf_pixels - 1} or {self.psf_pixels + 1}"
            )
        needed = math.ceil(5 * self.psf_sigma / self.pixel_scale - 1e-9)
        if self.psf_pixels < needed:
            raise ValueError(
                f"camera.psf_pixels must span 5 psf_sigma, which are {5 * self.psf_sigma:g} "
                f'arcseconds, got {self.psf_pixels} pixels of {self.pixel_scale:g}"; '
                f"nearest: {needed | 1}"
            )


@dataclass(frozen=True)
class Halo(_Section):
    """The smooth lens: an isothermal halo (spherical at axis ratio 1) and external shear.

    ``einstein_radius`` is that of the circle with the area inside the critical curve.
    """

    einstein_radius: Range = field(default=(1.2, 1.2), metadata=_range(1e-3, 100))
    axis_ratio: Range = field(default=(1.0, 1.0), metadata=_range(0.05, 1))
    shear: Range = field(default=(0.0, 0.3), metadata=_range(0, 0.9))


@dataclass(frozen=True)
class Light(_Section):
    """A Sersic profile; ``radius`` holds half the light, as the geometric mean of both axes.

    ``intensity`` is that at ``radius`` (0: no light), ``offset`` the distance from the lens.
    """

    index: float = field(default=1.5, metadata=_number(0.3, 10))
    radius: float = field(default=0.5, metadata=_number(1e-3, 100))
    intensity: Range = field(default=(0.7, 0.9), metadata=_range())
    axis_ratio: Range = field(default=(0.7, 1.0), metadata=_range(0.05, 1))
    offset: Range = field(default=(0.0, 1.2), metadata=_range())


@dataclass(frozen=True)
class Subhalos(_Section):
    """Substructure of every kind; a class picks its kind by ``SimulationConfig.structures``.

    ``point`` and ``tnfw``: a Poisson number (at least one) of subhalos, dN/dm ~ m^-mass_slope
    on ``mass_range``, distance from the lens uniform in ``radius``, then all masses rescaled so
    that their sum is ``mass_fraction`` of the mass inside the Einstein radius. ``tnfw`` has the
    scale radius scale_radius * (m / 1e9 Msun)^(1/3) and is truncated at ``truncation`` of them.
    ``line`` (a vortex): ``line_number`` equal point masses, evenly spaced on a straight line of
    free angle, ``line_length`` long, its middle at a distance ``line_offset`` from the lens, of
    the same ``mass_fraction``. ``conserve_mass``: the smooth halo loses what the subhalos add
    inside the Einstein radius.
    """

    mean_number: float = field(default=25.0, metadata=_number(0.1, 10_000))
    mass_slope: float = field(default=1.9, metadata=_number(0, 5))
    mass_range: Range = field(default=(5e8, 1e10), metadata=_range(1, 1e14))
    radius: Range = field(default=(0.0, 1.0), metadata=_range())
    mass_fraction: Range = field(default=(0.065, 0.085), metadata=_range(0, 0.9))
    scale_radius: float = field(default=0.1, metadata=_number(1e-4, 10))
    truncation: float = field(default=4.0, metadata=_number(0.1, 1000))
    line_number: int = field(default=25, metadata=_integer(2))
    line_length: Range = field(default=(0.5, 2.0), metadata=_range())
    line_offset: Range = field(default=(0.0, 0.5), metadata=_range())
    conserve_mass: bool = field(default=False, metadata={"check": boolean})


@dataclass(frozen=True)
class SimulationConfig:
    """All that decides a simulated set, together with its seed.

    Args:
        name: Used in file names of shards.
        classes: Class names; image i has label i mod len(classes).
        structures: One of ``none``, ``point``, ``tnfw``, ``line`` for each class.
        cosmology, camera, halo, lens_light, source, subhalos: The sections.

    Raises:
        ValueError, TypeError: A number that makes no sense, by the name of its field.
    """

    name: str = "deeplense"
    classes: tuple[str, ...] = ("no_sub", "sub")
    structures: tuple[str, ...] = ("none", "point")
    cosmology: Cosmology = Cosmology()
    camera: Camera = Camera()
    halo: Halo = Halo()
    lens_light: Light = Light(
        index=2.5, intensity=(1.2, 1.2), axis_ratio=(0.5, 1.0), offset=(0.0, 0.0)
    )
    source: Light = Light()
    subhalos: Subhalos = Subhalos()

    def __post_init__(self) -> None:
        for name in ("classes", "structures"):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or not all(isinstance(s, str) for s in given):
                raise TypeError(f"{name} must be a list of names, got {given!r}")
            object.__setattr__(self, name, tuple(given))
        if not isinstance(self.name, str) or not self.name or set(self.name) & set("/\\"):
            raise ValueError(f"name must be usable in a file name, got {self.name!r}")
        if not 1 <= len(self.classes) <= 256 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must be 1 to 256 different names, got {self.classes}")
        if len(self.structures) != len(self.classes):
            raise ValueError(
                f"structures must name one kind for each of the {len(self.classes)} classes, "
                f"got {self.structures}"
            )
        for kind in self.structures:
            choice("structures", kind, STRUCTURES)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-able dictionaries and lists."""
        result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return result

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> SimulationConfig:
        """Return the configuration of ``to_dict``'s output; what is left out is the default.

        Raises:
            ValueError: An unknown field, with the nearest one named.
        """
        sections = {
            "cosmology": Cosmology,
            "camera": Camera,
            "halo": Halo,
            "lens_light": Light,
            "source": Light,
            "subhalos": Subhalos,
        }
        default = cls()
        found: dict[str, Any] = {}
        for key, value in given.items():
            choice("field of the simulation", key, [item.name for item in fields(cls)])
            if key in sections:
                if not isinstance(value, Mapping):
                    raise TypeError(f"{key} must be a table of fields, got {value!r}")
                value = _section(getattr(default, key), key, value)
            found[key] = value
        return cls(**found)

    def override(self, changes: Mapping[str, Any]) -> SimulationConfig:
        """Return a copy with some fields changed.

        Args:
            changes: Values by dotted name, e.g. ``{"camera.pixel_scale": 0.1,
                "subhalos.mass_fraction": (0.01, 0.02), "lens_light.intensity": 0}``.

        Raises:
            ValueError: An unknown field, with the nearest one named.
        """
        table = self.to_dict()
        names = [
            f"{key}.{item}"
            for key, part in table.items()
            if isinstance(part, dict)
            for item in part
        ]
        names += [key for key, part in table.items() if not isinstance(part, dict)]
        for name, value in changes.items():
            choice("field of the simulation", name, names)
            section, _, item = name.rpartition(".")
            (table[section] if section else table)[item] = value
        return type(self).from_dict(table)

    def with_size(self, size: int) -> SimulationConfig:
        """Return a copy for images of another size that show the same patch of sky.

        The pixel scale is multiplied by old size / new size and the margin of the field (in
        pixels) kept; PSF and all lens parameters keep their arcseconds, intensities stay per
        pixel. The PSF has more pixels where they are smaller, and no fewer where they are larger.
        ``deeplense`` at 65 has pixels of 0.119", at 33 of 0.235". To crop more or less
        at the same pixel scale, override ``camera.size`` instead.
        """
        integer("size", size, 8)
        camera = self.camera
        changed = dataclasses.replace(
            camera,
            size=size,
            pixels=size + camera.pixels - camera.size,
            pixel_scale=camera.pixel_scale * camera.size / size,
            psf_pixels=max(camera.psf_pixels, -(-camera.psf_pixels * size // camera.size) | 1),
        )
        return dataclasses.replace(self, camera=changed)


_S = TypeVar("_S", bound=_Section)


def _section(default: _S, name: str, given: Mapping[str, Any]) -> _S:
    checks = {item.name: item.metadata["check"] for item in fields(default)}
    for key, value in given.items():  # here, where a source's light is told from a lens's
        checks[choice(f"field of {name}", key, checks)](f"{name}.{key}", value)
    return dataclasses.replace(default, **given)


_DEEPLENSE = SimulationConfig()

PRESETS: dict[str, SimulationConfig] = {
    "deeplense": _DEEPLENSE,
    "control": dataclasses.replace(
        _DEEPLENSE, name="control", subhalos=Subhalos(radius=(0.25, 2.0), conserve_mass=True)
    ),
    "three_class": dataclasses.replace(
        _DEEPLENSE,
        name="three_class",
        classes=("no_sub", "sphere", "vortex"),
        structures=("none", "point", "line"),
    ),
}
"""``deeplense``: the poster's set, whose label is nearly the ring's size. ``control``: the same
with the mass inside the ring conserved, the honest test of seeing substructure. ``three_class``:
nothing, point masses as in ``deeplense``, or a line of equal point masses of the same total."""


def resolve(
    preset: str | SimulationConfig,
    *,
    size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> SimulationConfig:
    """Return the configuration meant by a preset's name (or itself), overrides first, then size."""
    if isinstance(preset, SimulationConfig):
        config = preset
    else:
        config = PRESETS[choice("preset", preset, PRESETS)]
    if overrides:
        config = config.override(overrides)
    return config if size is None else config.with_size(size)
