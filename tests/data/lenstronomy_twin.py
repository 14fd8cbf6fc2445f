"""The same scenes rendered with lenstronomy, as an independent check of our images."""

import math

import numpy as np
from astropy.cosmology import FlatLambdaCDM
from caustics.light.func import k_sersic
from lenstronomy.Cosmo.lens_cosmo import LensCosmo
from lenstronomy.Data.pixel_grid import PixelGrid
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from lenstronomy.Util.param_util import phi_q2_ellipticity

from eqcvt.data import Light, Renderer
from eqcvt.data.render import psf
from eqcvt.data.scene import Scene


def _sersic(macro: dict[str, float], name: str, light: Light) -> dict[str, float]:
    e1, e2 = phi_q2_ellipticity(macro[f"{name}_angle"], macro[f"{name}_axis_ratio"])
    # lenstronomy approximates the constant b_n in I exp(-b_n ((r / R)^(1/n) - 1)) more coarsely;
    # with these I and R its profile is the same curve as ours.
    ours = float(k_sersic(light.index))
    theirs = 1.9992 * light.index - 0.3271
    return {
        "amp": macro[f"{name}_intensity"] * math.exp(ours - theirs),
        "R_sersic": light.radius * (theirs / ours) ** light.index,
        "n_sersic": light.index,
        "e1": e1,
        "e2": e2,
        "center_x": macro[f"{name}_x"],
        "center_y": macro[f"{name}_y"],
    }


def render(renderer: Renderer, scene: Scene) -> np.ndarray:
    """Return lenstronomy's image of a scene without noise, in electrons/s [size, size]."""
    config, camera, macro = renderer.config, renderer.config.camera, scene.macro
    margin = camera.psf_pixels // 2
    count = camera.size + 2 * margin
    corner = -(count - 1) / 2 * camera.pixel_scale
    grid = PixelGrid(
        nx=count,
        ny=count,
        transform_pix2angle=np.diag([1, -1]) * camera.pixel_scale,
        ra_at_xy_0=corner,
        dec_at_xy_0=-corner,
    )
    kernel = np.outer(psf(camera), psf(camera))
    gamma, phi = macro["shear"], macro["shear_angle"]
    radius, q = renderer.halo_radius(scene), macro["halo_axis_ratio"]
    e1, e2 = phi_q2_ellipticity(macro["halo_angle"], q)
    models = ["SIE" if q < 1 else "SIS", "SHEAR"]
    lenses = [
        {"theta_E": radius, "center_x": 0, "center_y": 0} | ({"e1": e1, "e2": e2} if q < 1 else {}),
        {"gamma1": gamma * math.cos(2 * phi), "gamma2": gamma * math.sin(2 * phi)},
    ]
    cosmology = FlatLambdaCDM(H0=config.cosmology.hubble, Om0=config.cosmology.omega_matter)
    redshifts = (config.cosmology.lens_redshift, config.cosmology.source_redshift)
    einstein_mass = LensCosmo(*redshifts, cosmology).mass_in_theta_E(1.0)
    for x, y, mass in zip(scene.x, scene.y, scene.mass, strict=True):
        place = {"center_x": x, "center_y": y}
        if scene.kind == "tnfw":
            tau = config.subhalos.truncation
            scale = config.subhalos.scale_radius * (mass / 1e9) ** (1 / 3)
            # Baltz et al. 2009, equation A.4, then the deflection of an NFW halo at its radius.
            bracket = (tau**2 - 1) * math.log(tau) + tau * math.pi - (tau**2 + 1)
            inner = mass * (tau**2 + 1) ** 2 / (tau**2 * bracket)
            alpha = inner * (1 - math.log(2)) / (scale * einstein_mass)
            models.append("TNFW")
            lenses.append(place | {"Rs": scale, "alpha_Rs": alpha, "r_trunc": tau * scale})
        else:
            models.append("POINT_MASS")
            lenses.append(place | {"theta_E": math.sqrt(mass / einstein_mass)})
    model = ImageModel(
        grid,
        PSF(psf_type="PIXEL", kernel_point_source=kernel),
        LensModel(models),
        LightModel(["SERSIC_ELLIPSE"]),
        LightModel(["SERSIC_ELLIPSE"]),
        kwargs_numerics={"supersampling_factor": camera.oversampling},
    )
    source = _sersic(macro, "source", config.source)
    lens = _sersic(macro, "lens", config.lens_light)
    image = model.image(lenses, [source], [lens]) / camera.pixel_scale**2
    return image[margin:-margin, margin:-margin]
