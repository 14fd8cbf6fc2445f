"""The physics of the simulated images: distances, masses, profiles, and another library."""

import numpy as np
import pytest
import torch

from eqcvt.data import Cosmology, Renderer, Subhalos, generate, resolve
from eqcvt.data.render import psf, to_grey
from eqcvt.data.scene import Scene, distances, power_law

from .lenstronomy_twin import render as lenstronomy_render


@pytest.mark.parametrize(
    "cosmology", [Cosmology(), Cosmology(0.1, 3.0, 67.4, 0.315), Cosmology(0.2, 0.6, 70, 1.0)]
)
def test_distances_agree_with_astropy(cosmology):
    from astropy.cosmology import FlatLambdaCDM

    other = FlatLambdaCDM(H0=cosmology.hubble, Om0=cosmology.omega_matter)
    near, far = cosmology.lens_redshift, cosmology.source_redshift
    expected = (
        other.angular_diameter_distance(near).value,
        other.angular_diameter_distance(far).value,
        ((other.comoving_distance(far) - other.comoving_distance(near)) / (1 + far)).value,
    )
    assert distances(cosmology) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("deeplense", {}),
        ("control", {}),
        ("three_class", {"halo.axis_ratio": [0.5, 0.9]}),
        ("control", {"structures": ["none", "tnfw"], "camera.oversampling": 4}),
        ("deeplense", {"camera.pixel_scale": 0.1, "camera.psf_sigma": 0.15}),
    ],
)
def test_images_agree_with_lenstronomy(preset, overrides):
    renderer = Renderer(resolve(preset, size=65, overrides=overrides))
    for index in range(2 * len(renderer.config.classes)):
        scene = renderer.scene(11, index)
        ours, theirs = renderer.render(scene), lenstronomy_render(renderer, scene)
        # Masses meet another G and solar mass in lenstronomy, 3e-4 from CODATA's.
        tolerance = 1e-8 if scene.kind == "none" else 1e-4
        assert np.abs(ours - theirs).max() < tolerance * theirs.max()


def test_full_size_image_agrees_with_lenstronomy():
    renderer = Renderer(resolve("deeplense"))
    scene = renderer.scene(1337, 1)
    ours, theirs = renderer.render(scene), lenstronomy_render(renderer, scene)
    assert ours.shape == (129, 129)
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.max()


def test_y_points_up_and_x_to_the_right():
    config = resolve("deeplense", size=33, overrides={"source.intensity": 0})
    renderer = Renderer(config)
    scene = renderer.scene(0, 0)
    scene.macro.update(lens_x=1.0, lens_y=2.0)
    row, column = np.unravel_index(renderer.render(scene).argmax(), (33, 33))
    scale = config.camera.pixel_scale
    assert (column - 16) * scale == pytest.approx(1.0, abs=scale)
    assert (16 - row) * scale == pytest.approx(2.0, abs=scale)


def test_mass_inside_the_einstein_radius_is_right():
    # pi R^2 Sigma_cr for 1.2" between z = 0.5 and 1.0, from astropy's constants and distances.
    from astropy import constants, units
    from astropy.cosmology import FlatLambdaCDM

    cosmology = FlatLambdaCDM(H0=70, Om0=0.3)
    lens, source = (cosmology.angular_diameter_distance(z) for z in (0.5, 1.0))
    between = source - lens * (1.5 / 2.0)
    sigma = constants.c**2 / (4 * np.pi * constants.G) * source / (lens * between)
    radius = lens * (1.2 * units.arcsec).to_value(units.rad)
    expected = (np.pi * radius**2 * sigma).to_value(units.Msun)
    renderer = Renderer(resolve("deeplense"))
    assert renderer.einstein_mass * 1.2**2 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", ["deeplense", "control", "three_class"])
def test_subhalos_follow_their_law(preset):
    renderer = Renderer(resolve(preset))
    classes = renderer.config.classes
    law = renderer.config.subhalos
    numbers, fractions, radii = [], [], []
    for index in range(600):
        scene = renderer.scene(3, index)
        assert scene.label == index % len(classes)
        if scene.label == 0:
            assert scene.mass.size == 0
            continue
        total = renderer.einstein_mass * 1.2**2
        assert scene.mass.sum() == pytest.approx(scene.fraction * total, rel=1e-12)
        fractions.append(scene.fraction)
        if scene.kind == "point":
            numbers.append(scene.mass.size)
            radii.append(np.hypot(scene.x, scene.y))
        else:
            assert np.ptp(scene.mass) == 0
            steps = np.diff(np.stack([scene.x, scene.y]), axis=1)
            assert np.allclose(steps, steps[:, :1])
            assert 0.5 <= np.hypot(*steps.sum(axis=1)) <= 2.0
    low, high = law.mass_fraction
    assert low <= min(fractions) < low + 0.002
    assert high - 0.002 < max(fractions) <= high
    assert np.mean(numbers) == pytest.approx(25, abs=1.2)
    assert np.var(numbers) == pytest.approx(25, rel=0.35)
    radii = np.concatenate(radii)
    edges = np.linspace(*law.radius, 5)
    share = np.histogram(radii, edges)[0] / radii.size
    assert radii.min() >= law.radius[0]
    assert radii.max() <= law.radius[1]
    assert share == pytest.approx([0.25] * 4, abs=0.03)


def test_masses_follow_the_power_law():
    law = Subhalos()
    mass = power_law(law, np.random.default_rng(0).random(200_000))
    edges = np.geomspace(*law.mass_range, 9)
    density = np.histogram(mass, edges)[0] / np.diff(edges)
    middle = np.sqrt(edges[1:] * edges[:-1])
    slope = np.polyfit(np.log(middle), np.log(density), 1)[0]
    assert slope == pytest.approx(-1.9, abs=0.02)
    flat = power_law(Subhalos(mass_slope=1.0), np.array([0.0, 0.5, 1.0]))
    assert flat == pytest.approx([5e8, np.sqrt(5e8 * 1e10), 1e10])


def _ring_mass(renderer: Renderer, scene: Scene) -> float:
    """Mass inside 1.2", from the mean radial deflection of halo and subhalos on that circle."""
    angle = torch.arange(20_000, dtype=torch.float64) * (2 * np.pi / 20_000)
    x, y = 1.2 * torch.cos(angle), 1.2 * torch.sin(angle)
    ax, ay = renderer.subhalo_deflection(scene, x, y)
    radial = float((ax * torch.cos(angle) + ay * torch.sin(angle)).mean())
    return (renderer.halo_radius(scene) + radial) * 1.2 * renderer.einstein_mass


@pytest.mark.parametrize("kind", ["point", "tnfw", "line"])
def test_control_conserves_the_mass_inside_the_ring(kind):
    control = Renderer(resolve("control", overrides={"structures": ["none", kind]}))
    grown = Renderer(
        resolve(
            "control", overrides={"structures": ["none", kind], "subhalos.conserve_mass": False}
        )
    )
    whole = control.einstein_mass * 1.2**2
    for index in (1, 3, 5):
        scene = control.scene(2, index)
        inside = control.mass_inside(scene)
        assert 0 < inside <= scene.mass.sum()
        assert control.halo_radius(scene) < 1.2
        assert _ring_mass(control, scene) == pytest.approx(whole, rel=1e-3)
        assert _ring_mass(grown, scene) == pytest.approx(whole + inside, rel=1e-3)


def test_deeplense_adds_the_subhalo_mass_inside_the_ring():
    renderer = Renderer(resolve("deeplense"))
    for index in (1, 3, 5):
        scene = renderer.scene(2, index)
        assert renderer.halo_radius(scene) == 1.2
        assert renderer.mass_inside(scene) == pytest.approx(scene.mass.sum())
        whole = renderer.einstein_mass * 1.2**2
        assert _ring_mass(renderer, scene) == pytest.approx(whole * (1 + scene.fraction), rel=1e-3)


def test_total_mass_of_a_truncated_halo():
    overrides = {"subhalos.scale_radius": 0.004, "structures": ["none", "tnfw"]}
    renderer = Renderer(resolve("deeplense", overrides=overrides))
    scene = Scene(1, {"einstein_radius": 1.2}, "tnfw", *np.array([[0.1], [0.2], [1e9]]))
    assert renderer.mass_inside(scene) == pytest.approx(1e9, rel=1e-2)


def _profile_change(preset: str) -> float:
    config = resolve(preset, size=65, overrides={"camera.noise": False})
    sub, smooth = (generate(config, range(60), label=n, dtype="float32").images for n in (1, 0))
    y, x = np.indices((65, 65)) - 32
    radius = np.hypot(x, y).astype(int)
    change = (sub - smooth).mean(axis=0)
    profile = [change[radius == r].mean() for r in range(30)]
    return float(np.abs(profile).max() / smooth.max())


def test_radial_profile_tells_the_classes_in_deeplense_and_hardly_in_control():
    assert _profile_change("control") < 0.4 * _profile_change("deeplense")


def test_parameters_are_physical():
    config = resolve("control", size=33, overrides={"halo.einstein_radius": [1.1, 1.3]})
    whole = Renderer(config).einstein_mass
    data = generate(config, range(8))
    table = data.parameters
    drawn = table["einstein_radius_drawn"]
    assert len(set(drawn)) == 8
    ring = whole * drawn**2
    assert table["subhalo_mass"] == pytest.approx(table["subhalo_mass_fraction"] * ring)
    lost = 1 - table["einstein_radius"] / drawn
    assert table["subhalo_mass_inside"] == pytest.approx(lost * ring)
    data = generate(resolve("control", size=33), range(8))
    table = data.parameters
    sub = data.labels == 1
    assert (table["einstein_radius_drawn"] == 1.2).all()
    assert (table["einstein_radius"][~sub] == 1.2).all()
    assert (table["einstein_radius"][sub] < 1.2).all()
    assert (table["n_subhalos"][~sub] == 0).all()
    assert (table["subhalo_mass"][sub] > 1e10).all()
    assert (table["subhalo_mass"][sub] < 1e11).all()
    assert (table["subhalo_mass_inside"] <= table["subhalo_mass"]).all()
    assert set(table) >= {
        "shear", "shear_angle", "lens_axis_ratio", "lens_angle", "source_x", "source_y",
        "source_axis_ratio", "source_intensity", "subhalo_mass_fraction",
    }  # fmt: skip


@pytest.mark.parametrize("oversampling", [1, 3])
@pytest.mark.parametrize("axis_ratio", [1, 0.5])
def test_a_ray_through_the_centre_stays_finite(oversampling, axis_ratio):
    changes = {"camera.oversampling": oversampling, "halo.axis_ratio": axis_ratio}
    data = generate(resolve("deeplense", size=33, overrides=changes), range(2), dtype="float32")
    assert np.isfinite(data.images).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_has_no_grey_values(value):
    image = np.eye(4)
    image[0, :3] = value
    with pytest.raises(ValueError, match="3 of the 16 pixels of an image are NaN or infinite"):
        to_grey(image)


def test_other_telescopes_and_lenses_are_a_few_lines():
    euclid = {
        "name": "euclid",
        "camera.pixel_scale": 0.1,
        "camera.size": 65,
        "camera.psf_sigma": 0.08,
        "lens_light.intensity": 0,
        "halo.axis_ratio": [0.6, 0.95],
        "structures": ["none", "tnfw"],
        "subhalos.mass_fraction": 0.01,
    }
    data = generate(resolve("deeplense", overrides=euclid), range(2), dtype="float32")
    assert data.size == (65, 65)
    assert (data.parameters["lens_intensity"] == 0).all()
    assert data.parameters["subhalo_mass_fraction"][1] == 0.01
    # Without the galaxy's light the middle of the ring is dark.
    assert data.images[0, 32, 32] < 0.2 * data.images[0].max()


def test_smaller_images_show_the_same_sky():
    overrides = {"camera.noise": False, "camera.oversampling": 6}
    large = resolve("deeplense", size=99, overrides=overrides)
    small = resolve("deeplense", size=33, overrides=overrides | {"camera.oversampling": 18})
    first, second = (generate(c, [4], dtype="float32").images[0] for c in (large, small))
    binned = first.reshape(33, 3, 33, 3).mean(axis=(1, 3))
    assert small.camera.pixel_scale == pytest.approx(0.06 * 129 / 33)
    # Equal but for the PSF, which is sampled more coarsely.
    assert np.corrcoef(binned.ravel(), second.ravel())[0, 1] > 0.99


def test_the_psf_of_a_larger_image_is_as_wide_in_arcseconds():
    camera = resolve("deeplense").camera
    assert [resolve("deeplense", size=n).camera.psf_pixels for n in (33, 65, 130)] == [11, 11, 13]
    for size in (129, 257, 516):
        fine = resolve("deeplense", size=size).camera
        assert fine.psf_pixels * fine.pixel_scale >= camera.psf_pixels * camera.pixel_scale - 1e-9
        offset = (np.arange(fine.psf_pixels) - fine.psf_pixels // 2) * fine.pixel_scale
        assert np.sqrt(psf(fine) @ offset**2) == pytest.approx(camera.psf_sigma, rel=0.01)
