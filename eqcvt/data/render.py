"""Images of scenes, ray-traced with caustics (extra ``sim``) in float64, one at a time.

x grows along the columns and y falls along the rows, so that a picture of the array shows y
upwards; the lens is at the middle of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eqcvt.data.config import Camera, Light, SimulationConfig
from eqcvt.data.files import LensingImages
from eqcvt.data.scene import Floats, Scene, distances, draw, noise_map

# Keeps a ray that meets a singular centre exactly finite; far below any other length here.
_SOFTENING = 1e-9
_MASS_UNIT = 1e9


def caustics() -> Any:
    """Return the package caustics, or say how to install it."""
    try:
        import caustics as package
    except ImportError as error:
        raise ImportError(
            'simulating images needs the package caustics: pip install "eqcvt[sim]"'
        ) from error
    return package


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one torch thread, so that images do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=4)
def _rays(camera: Camera) -> tuple[Tensor, Tensor]:
    """Positions of the rays in arcseconds [H, W], H the size with the PSF's margin, oversampled."""
    margin = camera.psf_pixels // 2 if camera.psf_sigma > 0 else 0
    count = (camera.size + 2 * margin) * camera.oversampling
    step = camera.pixel_scale / camera.oversampling
    line = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * step
    y, x = torch.meshgrid(-line, line, indexing="ij")
    return x.contiguous(), y.contiguous()


def _light(profile: Light, macro: dict[str, float], name: str, x: Tensor, y: Tensor) -> Tensor:
    intensity = macro[f"{name}_intensity"]
    if intensity == 0:
        return torch.zeros_like(x)
    func = caustics().light.func
    q = macro[f"{name}_axis_ratio"]
    result: Tensor = func.brightness_sersic(
        macro[f"{name}_x"],
        macro[f"{name}_y"],
        q,
        torch.tensor(macro[f"{name}_angle"], dtype=torch.float64),
        profile.index,
        # caustics measures the radius along the major axis.
        profile.radius / math.sqrt(q),
        intensity,
        x,
        y,
        func.k_sersic(profile.index),
    )
    return result


class Renderer:
    """Draws and renders the images of one set.

    Args:
        config: The set.

    Raises:
        ImportError: Without caustics.
    """

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self._func = caustics().lenses.func
        self.lens_distance, self.source_distance, self.between = distances(config.cosmology)
        path = (self.between, self.lens_distance, self.source_distance)
        self.einstein_mass = float(self._func.rein_to_mass_point(1.0, *path))
        """Mass in solar masses inside an Einstein radius of 1 arcsecond: pi R^2 Sigma_cr."""

    def scene(self, seed: int, index: int, label: int | None = None) -> Scene:
        """Draw the parameters of image ``index`` (of another class if ``label`` is given)."""
        return draw(self.config, self.einstein_mass, seed, index, label)

    def subhalo_deflection(self, scene: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Reduced deflection by the subhalos at rays x, y, all in arcseconds."""
        ax, ay = torch.zeros_like(x), torch.zeros_like(y)
        for x0, y0, mass in zip(scene.x, scene.y, scene.mass, strict=True):
            if scene.kind == "tnfw":
                law = self.config.subhalos
                tau = torch.tensor(law.truncation, dtype=torch.float64)
                scale = law.scale_radius * (float(mass) / _MASS_UNIT) ** (1 / 3)
                total = self._func.M0_totmass_tnfw(float(mass), tau)
                place = (float(x0), float(y0), scale, tau, x, y, total, self.lens_distance)
                dx, dy = self._func.physical_deflection_angle_tnfw(*place, _SOFTENING)
                factor = self.between / self.source_distance
                dx, dy = dx * factor, dy * factor
            else:
                radius = math.sqrt(float(mass) / self.einstein_mass)
                place_point = (float(x0), float(y0), radius, x, y, _SOFTENING)
                dx, dy = self._func.reduced_deflection_angle_point(*place_point)
            ax += dx
            ay += dy
        return ax, ay

    def mass_inside(self, scene: Scene) -> float:
        r"""Mass in solar masses that the subhalos add inside the Einstein radius R of the halo.

        Points are counted; extended ones follow from Gauss's theorem in the plane,
        M(<R) / M_E = <alpha_r> / R, with the mean of the radial deflection over the circle.
        """
        radius = scene.macro["einstein_radius"]
        if scene.kind != "tnfw":
            return float(scene.mass[np.hypot(scene.x, scene.y) < radius].sum())
        angle = torch.arange(4096, dtype=torch.float64) * (2 * math.pi / 4096)
        x, y = radius * torch.cos(angle), radius * torch.sin(angle)
        ax, ay = self.subhalo_deflection(scene, x, y)
        mean = float((ax * torch.cos(angle) + ay * torch.sin(angle)).mean())
        return mean * radius * self.einstein_mass

    def halo_radius(self, scene: Scene) -> float:
        """Einstein radius in arcseconds of the smooth halo, after mass conservation if asked."""
        radius = scene.macro["einstein_radius"]
        if not self.config.subhalos.conserve_mass or scene.kind == "none":
            return radius
        # The mass of an isothermal halo inside a fixed radius is proportional to its strength.
        return radius * (1 - self.mass_inside(scene) / (self.einstein_mass * radius**2))

    def render(self, scene: Scene) -> Floats:
        """Return the image without noise in electrons/s, float64 [size, size]."""
        macro, camera = scene.macro, self.config.camera
        x, y = _rays(camera)
        radius, q = self.halo_radius(scene), macro["halo_axis_ratio"]
        if q == 1.0:
            ax, ay = self._func.reduced_deflection_angle_sis(0.0, 0.0, radius, x, y, _SOFTENING)
        else:
            axis = (
                torch.tensor(macro[name], dtype=torch.float64)
                for name in ("halo_axis_ratio", "halo_angle")
            )
            shape = (*axis, radius)
            ax, ay = self._func.reduced_deflection_angle_sie(0.0, 0.0, *shape, x, y, _SOFTENING)
        gamma, phi = macro["shear"], macro["shear_angle"]
        shear = (gamma * math.cos(2 * phi), gamma * math.sin(2 * phi))
        sx, sy = self._func.reduced_deflection_angle_external_shear(0.0, 0.0, *shear, x, y)
        ax, ay = ax + sx, ay + sy
        if scene.mass.size:
            dx, dy = self.subhalo_deflection(scene, x, y)
            ax, ay = ax + dx, ay + dy
        light = _light(self.config.source, macro, "source", x - ax, y - ay)
        light = light + _light(self.config.lens_light, macro, "lens", x, y)
        return _blur(_bin(light.numpy(), camera.oversampling), camera)

    def observe(self, image: Floats, seed: int, index: int) -> Floats:
        """Add the image's own noise: its standard-normal map times sqrt((image + sky) / exposure).

        The map depends on (seed, index) alone, so twins have the same one.
        """
        camera = self.config.camera
        if not camera.noise:
            return image
        deviation = np.sqrt((image + camera.sky) / camera.exposure)
        return image + deviation * noise_map(seed, index, camera.size)

    def parameters(self, scene: Scene) -> dict[str, float]:
        """Return the physical parameters that are stored beside an image.

        ``einstein_radius`` is that of the smooth halo that was rendered. ``einstein_radius_drawn``
        is that before it lost the subhalos' mass, if asked: ``subhalo_mass_fraction`` is their
        mass over that inside the radius drawn, ``subhalo_mass_inside`` what of it lies within it.
        """
        return {
            **scene.macro,
            "einstein_radius": self.halo_radius(scene),
            "einstein_radius_drawn": scene.macro["einstein_radius"],
            "n_subhalos": float(scene.mass.size),
            "subhalo_mass_fraction": scene.fraction,
            "subhalo_mass": float(scene.mass.sum()),
            "subhalo_mass_inside": self.mass_inside(scene),
        }


def _bin(light: Floats, times: int) -> Floats:
    """Mean over the rays of each pixel, summed in a fixed order."""
    total = np.zeros((light.shape[0] // times, light.shape[1] // times))
    for row in range(times):
        for column in range(times):
            total += light[row::times, column::times]
    return total / times**2


def psf(camera: Camera) -> Floats:
    """Return one axis of the normalised PSF [psf_pixels]; the PSF is its outer product."""
    offset = (np.arange(camera.psf_pixels) - camera.psf_pixels // 2) * camera.pixel_scale
    kernel = np.exp(-0.5 * (offset / camera.psf_sigma) ** 2)
    return np.asarray(kernel / kernel.sum())


def _blur(image: Floats, camera: Camera) -> Floats:
    if camera.psf_sigma == 0:
        return image
    size = camera.size
    rows = np.zeros((size, image.shape[1]))
    for shift, weight in enumerate(psf(camera)):
        rows += weight * image[shift : shift + size]
    result = np.zeros((size, size))
    for shift, weight in enumerate(psf(camera)):
        result += weight * rows[:, shift : shift + size]
    return result


def to_grey(image: Floats) -> npt.NDArray[np.uint8]:
    """Scale an image's own minimum and maximum to 0 and 255 and round; refuse NaN and infinity."""
    if bad := int((~np.isfinite(image)).sum()):
        raise ValueError(f"{bad} of the {image.size} pixels of an image are NaN or infinite")
    low, high = image.min(), image.max()
    grey = np.rint((image - low) * (255 / max(high - low, 1e-300)))
    return np.asarray(grey, dtype=np.uint8)


def generate(
    config: SimulationConfig,
    indices: Sequence[int],
    *,
    seed: int = 1337,
    dtype: str = "uint8",
    label: int | None = None,
) -> LensingImages:
    """Simulate some images of a set, in memory and in this process.

    Args:
        config: The set.
        indices: Which images; each depends on (config, seed, its index) alone.
        seed: Seed of the set.
        dtype: ``uint8`` (grey, per-image minimum to maximum) or ``float32`` (electrons/s).
        label: Give every image this class instead of index mod number of classes; 0 gives the
            smooth twins.

    Returns:
        The images with their parameters, in the order of ``indices``.
    """
    renderer = Renderer(config)
    size = config.camera.size
    images = np.zeros((len(indices), size, size), dtype=dtype)
    labels = np.zeros(len(indices), dtype=np.uint8)
    table: list[dict[str, float]] = []
    with one_thread(), torch.inference_mode():
        for place, index in enumerate(indices):
            scene = renderer.scene(seed, index, label)
            image = renderer.observe(renderer.render(scene), seed, index)
            images[place] = to_grey(image) if dtype == "uint8" else image
            labels[place] = scene.label
            table.append(renderer.parameters(scene))
    names = table[0] if table else {}
    return LensingImages(
        images=images,
        labels=labels,
        classes=config.classes,
        parameters={name: np.array([row[name] for row in table]) for name in names},
        config=config.to_dict(),
        seed=seed,
        index=np.asarray(indices, dtype=np.int64),
    )
