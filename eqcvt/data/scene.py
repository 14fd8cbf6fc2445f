"""What is on the sky: the parameters of one image, drawn from (seed, index)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from eqcvt.data.config import Cosmology, SimulationConfig, Subhalos

Floats = npt.NDArray[np.float64]
_MACRO, _SUBHALOS, _NOISE = 0, 1, 2
_LIGHT_SPEED = 299792.458  # km/s


@dataclass(frozen=True)
class Scene:
    """The parameters of one image.

    Args:
        label: Class of the image.
        macro: Halo, shear, lens light and source by name (arcseconds, radians, electrons/s).
        kind: Kind of the substructure.
        x, y: Positions of the subhalos in arcseconds [n].
        mass: Masses of the subhalos in solar masses [n].
        fraction: Their sum over the mass inside the Einstein radius of the smooth halo.
    """

    label: int
    macro: dict[str, float]
    kind: str = "none"
    x: Floats = field(default_factory=lambda: np.zeros(0))
    y: Floats = field(default_factory=lambda: np.zeros(0))
    mass: Floats = field(default_factory=lambda: np.zeros(0))
    fraction: float = 0.0


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """Return the random numbers of one stream of one image, the same anywhere and in any order."""
    sequence = np.random.SeedSequence(seed, spawn_key=(index, stream))
    return np.random.Generator(np.random.Philox(sequence))


def noise_map(seed: int, index: int, size: int) -> Floats:
    """Return the standard-normal map [size, size] that image ``index`` has for noise."""
    return generator(seed, index, _NOISE).standard_normal((size, size))


def distances(cosmology: Cosmology) -> tuple[float, float, float]:
    r"""Angular-diameter distances to the lens, to the source and between them, in Mpc.

    D(z1, z2) = c / (H0 (1 + z2)) \int_{z1}^{z2} dz / sqrt(Om (1 + z)^3 + 1 - Om), flat LCDM
    without radiation (Hogg 1999, astro-ph/9905116, equations 15 to 19).
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def between(z1: float, z2: float) -> float:
        z = 0.5 * (z2 - z1) * nodes + 0.5 * (z2 + z1)
        om = cosmology.omega_matter
        integral = 0.5 * (z2 - z1) * np.sum(weights / np.sqrt(om * (1 + z) ** 3 + 1 - om))
        return float(_LIGHT_SPEED / cosmology.hubble * integral / (1 + z2))

    lens, source = cosmology.lens_redshift, cosmology.source_redshift
    return between(0.0, lens), between(0.0, source), between(lens, source)


def draw(
    config: SimulationConfig, einstein_mass: float, seed: int, index: int, label: int | None = None
) -> Scene:
    """Draw the parameters of image ``index``.

    Args:
        config: The set.
        einstein_mass: Mass in solar masses inside an Einstein radius of 1 arcsecond.
        seed, index: Key of the image's three random streams (macro, subhalos, noise).
        label: Class to draw instead of index mod number of classes; macro parameters and noise
            do not depend on it, so 0 gives the smooth twin where class 0 has no substructure.
    """
    label = index % len(config.classes) if label is None else label
    rng = generator(seed, index, _MACRO)
    halo, lens, source = config.halo, config.lens_light, config.source
    macro = {
        "einstein_radius": rng.uniform(*halo.einstein_radius),
        "halo_axis_ratio": rng.uniform(*halo.axis_ratio),
        "halo_angle": rng.uniform(0, math.pi),
        "shear": rng.uniform(*halo.shear),
        "shear_angle": rng.uniform(0, 2 * math.pi),
    }
    for name, light in (("lens", lens), ("source", source)):
        offset, angle = rng.uniform(*light.offset), rng.uniform(0, 2 * math.pi)
        macro[f"{name}_x"] = offset * math.cos(angle)
        macro[f"{name}_y"] = offset * math.sin(angle)
        macro[f"{name}_axis_ratio"] = rng.uniform(*light.axis_ratio)
        macro[f"{name}_angle"] = rng.uniform(0, math.pi)
        macro[f"{name}_intensity"] = rng.uniform(*light.intensity)
    kind = config.structures[label]
    if kind == "none":
        return Scene(label, macro)
    rng = generator(seed, index, _SUBHALOS)
    fraction = float(rng.uniform(*config.subhalos.mass_fraction))
    total = fraction * einstein_mass * macro["einstein_radius"] ** 2
    x, y, mass = (_line if kind == "line" else _swarm)(config.subhalos, rng)
    return Scene(label, macro, kind, x, y, mass * (total / mass.sum()), fraction)


def _swarm(law: Subhalos, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    number = max(1, int(rng.poisson(law.mean_number)))
    mass = power_law(law, rng.random(number))
    radius = rng.uniform(*law.radius, number)
    angle = rng.uniform(0, 2 * math.pi, number)
    return radius * np.cos(angle), radius * np.sin(angle), mass


def power_law(law: Subhalos, uniform: Floats) -> Floats:
    """Masses with dN/dm ~ m^-slope on the law's range, by inversion of the cumulative law."""
    low, high = law.mass_range
    power = 1 - law.mass_slope
    if abs(power) < 1e-9:
        return np.asarray(low * (high / low) ** uniform)
    return np.asarray((low**power + uniform * (high**power - low**power)) ** (1 / power))


def _line(law: Subhalos, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    length, angle = rng.uniform(*law.line_length), rng.uniform(0, math.pi)
    offset, towards = rng.uniform(*law.line_offset), rng.uniform(0, 2 * math.pi)
    along = np.linspace(-0.5, 0.5, law.line_number) * length
    x = offset * math.cos(towards) + along * math.cos(angle)
    y = offset * math.sin(towards) + along * math.sin(angle)
    return x, y, np.ones(law.line_number)
