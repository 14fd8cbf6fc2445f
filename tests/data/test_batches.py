"""Batches and augmentation: the same images for any number of processes, exact quarter turns."""

import itertools

import numpy as np
import pytest
import torch

from eqcvt.data import Augment, Batches, LensingImages, rotate


def numbered(count):
    """Images that show their own number."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 4, 4)).copy()
    return LensingImages(images=images, labels=(np.arange(count) % 2).astype(np.uint8))


def order(batches):
    return [images[:, 0, 0, 0].tolist() for images, _ in batches]


def test_batches_hold_raw_images_and_labels():
    batches = Batches(numbered(7), 3)
    assert len(batches) == 3
    images, labels = next(iter(batches))
    assert (images.shape, images.dtype) == ((3, 1, 4, 4), torch.uint8)
    assert (labels.tolist(), labels.dtype) == ([0, 1, 0], torch.int64)
    assert order(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert order(Batches(numbered(7), 3, drop_last=True)) == [[0, 1, 2], [3, 4, 5]]
    flux = LensingImages(np.zeros((2, 3, 4, 4), np.float32), np.zeros(2, np.uint8))
    images, _ = next(iter(Batches(flux, 2)))
    assert (images.shape, images.dtype) == ((2, 3, 4, 4), torch.float32)


def test_places_are_those_of_the_batches():
    batches = Batches(numbered(50), 8, shuffle=True, seed=2, rank=1, world_size=2)
    for places, (images, labels) in zip(batches.places(), batches, strict=True):
        assert places.dtype == torch.int64
        assert images[:, 0, 0, 0].tolist() == places.tolist()
        taken = batches.take(places)
        assert torch.equal(taken[0], images)
        assert torch.equal(taken[1], labels)


def test_images_and_labels_stay_together_when_shuffled():
    for images, labels in Batches(numbered(50), 8, shuffle=True):
        assert torch.equal(images[:, 0, 0, 0].long() % 2, labels)


def test_permutation_depends_on_seed_and_epoch_alone():
    batches = Batches(numbered(40), 8, shuffle=True, seed=5)
    first = order(batches)
    assert sorted(itertools.chain(*first)) == list(range(40))
    assert order(batches) == first
    torch.manual_seed(99)
    assert order(Batches(numbered(40), 8, shuffle=True, seed=5)) == first
    batches.set_epoch(1)
    second = order(batches)
    assert second != first
    batches.set_epoch(0)
    assert order(batches) == first
    assert order(Batches(numbered(40), 8, shuffle=True, seed=6)) != first
    fresh = Batches(numbered(40), 8, shuffle=True, seed=5)
    fresh.set_epoch(1)
    assert order(fresh) == second


@pytest.mark.parametrize("count", [24, 27, 25])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_process_sees(count, world_size):
    options = {"shuffle": True, "seed": 3}
    whole = order(Batches(numbered(count), 8, **options))
    parts = [
        order(Batches(numbered(count), 8, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole):
        assert list(itertools.chain(*(part[number] for part in parts))) == batch
    assert all(len(part) == len(whole) for part in parts)
    assert all(len(part[0]) == 8 // world_size for part in parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7, "world_size": 2}, "divide by world_size 2, got 7; nearest: 6 or 8"),
        ({"batch_size": 1, "world_size": 2}, "got 1; nearest: 2"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "rank must be below world_size 2, got 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 20, "drop_last": True}, "10 images do not fill one batch of 20"),
    ],
)
def test_batches_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(numbered(10), **options)


def test_batches_refuse_an_empty_set_and_a_negative_epoch():
    with pytest.raises(ValueError, match="there are no images"):
        Batches(numbered(10).subset([]), 2)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        Batches(numbered(10), 2).set_epoch(-1)


def images(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def elements(image):
    turns = [image.rot90(k, (-2, -1)) for k in range(4)]
    return turns + [turn.flip(-1) for turn in turns]


def test_dihedral_is_exact_and_reaches_all_eight():
    torch.manual_seed(0)
    image = images(1, 2, 5, 5)
    batch = image.expand(400, -1, -1, -1)
    turned = Augment("dihedral")(batch)
    which = [[torch.equal(one, e[0]) for e in elements(image)] for one in turned]
    assert all(sum(row) == 1 for row in which)
    counts = np.sum(which, axis=0)
    assert counts.min() > 25
    assert counts.sum() == 400


@pytest.mark.parametrize("mode", ["rotate", "dihedral", "mixed", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1, 9, 9), (1, 3, 8, 8), (0, 1, 9, 9)])
def test_shape_and_type_stay(mode, dtype, shape):
    batch = images(*shape, dtype=dtype)
    turned = Augment(mode)(batch)
    assert (turned.shape, turned.dtype) == (batch.shape, batch.dtype)


def test_mixed_turns_half_by_any_angle_and_half_exactly():
    torch.manual_seed(0)
    image = images(1, 2, 9, 9)
    turned = Augment("mixed")(image.expand(401, -1, -1, -1))
    exact = [any(torch.equal(one, e[0]) for e in elements(image)) for one in turned]
    assert exact == [False] * 201 + [True] * 200
    assert len({one.numpy().tobytes() for one in turned[201:]}) == 8
    assert len({one.numpy().tobytes() for one in turned[:201]}) == 201


def test_rotation_uses_one_angle_per_image_and_torchs_generator():
    batch = images(1, 1, 33, 33).expand(6, -1, -1, -1)
    torch.manual_seed(4)
    first = Augment("rotate")(batch)
    assert len({image.numpy().tobytes() for image in first}) == 6
    assert not torch.equal(Augment("rotate")(batch), first)
    torch.manual_seed(4)
    assert torch.equal(Augment("rotate")(batch), first)
    assert Augment("rotate")(images(2, 1, 9, 5)).shape == (2, 1, 9, 5)


def disc(size, x, y):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    middle = (size - 1) / 2
    return torch.exp(-((columns - middle - x) ** 2 + (rows - middle - y) ** 2) / 18.0)[None, None]


@pytest.mark.parametrize("supersample", [1, 3])
@pytest.mark.parametrize("size", [64, 65])
def test_rotation_turns_counter_clockwise_about_the_centre(supersample, size):
    image = disc(size, 16.0, 0.0).expand(3, -1, -1, -1)
    turned = rotate(image, torch.tensor([30.0, 90.0, -90.0]), supersample)
    x, y = 16 * np.cos(np.pi / 6), -16 * np.sin(np.pi / 6)
    for number, expected in enumerate([disc(size, x, y), disc(size, 0, -16), disc(size, 0, 16)]):
        # Interpolation blurs; a rotation by another angle or centre is off by 0.1 and more.
        assert (turned[number] - expected[0]).abs().max() < 0.06
    assert torch.allclose(turned[1], image[1].rot90(1, (1, 2)), atol=0.06)


def defined_rotation(image, degrees, supersample):
    """The rotation by its definition, each step as a dense matrix in float64, [H, W] -> [H, W]."""

    def enlarge(size):
        places = (torch.arange(size * supersample).double() + 0.5) / supersample - 0.5
        return tent(places.clamp(0, size - 1)[:, None] - torch.arange(size))

    def reduce(size):
        places = (torch.arange(size)[:, None].double() + 0.5) * supersample - 0.5
        weights = tent((places - torch.arange(size * supersample)) / supersample)
        return weights / weights.sum(1, keepdim=True)

    def tent(distance):
        return (1 - distance.abs()).clamp(min=0)

    height, width = (size * supersample for size in image.shape)
    y, x = (torch.arange(n).double() - (n - 1) / 2 for n in (height, width))
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    from_x = cos * x - sin * y[:, None] + (width - 1) / 2
    from_y = sin * x + cos * y[:, None] + (height - 1) / 2
    fine = enlarge(image.shape[0]) @ image @ enlarge(image.shape[1]).T
    weights_x = tent(from_x[..., None] - torch.arange(width))
    weights_y = tent(from_y[..., None] - torch.arange(height))
    turned = torch.einsum("ijy,yx,ijx->ij", weights_y, fine, weights_x)
    return reduce(image.shape[0]) @ turned @ reduce(image.shape[1]).T


@pytest.mark.parametrize("supersample", [1, 2, 3])
@pytest.mark.parametrize("size", [(9, 9), (8, 11), (1, 5)])
def test_rotation_is_enlarging_turning_and_reducing(supersample, size):
    batch = images(20, 2, *size, dtype=torch.float64)
    degrees = torch.linspace(-180, 190, 20, dtype=torch.float64)
    turned = rotate(batch, degrees, supersample)
    for number in (0, 3, 7, 12, 19):
        expected = [
            defined_rotation(channel, degrees[number], supersample) for channel in batch[number]
        ]
        torch.testing.assert_close(turned[number], torch.stack(expected), rtol=0, atol=1e-12)
    # White noise is the hardest image: its slopes multiply the rounding of the places.
    single = rotate(batch.float(), degrees.float(), supersample)
    torch.testing.assert_close(single.double(), turned, rtol=0, atol=1e-5)


def test_rotation_smooths_noise_as_documented():
    torch.manual_seed(0)
    noise = torch.randn(99, 1, 65, 65)
    for degrees, left in ((0.0, 0.54), (45.0, 0.50)):
        turned = rotate(noise, torch.full((99,), degrees))[..., 25:40, 25:40]
        assert float(turned.std()) == pytest.approx(left, abs=0.01)


def test_angles_cover_the_circle():
    torch.manual_seed(0)
    turned = Augment("rotate", supersample=1)(disc(33, 10.0, 0.0).expand(600, -1, -1, -1))
    place = turned.flatten(1).argmax(dim=1)
    angle = torch.atan2(16.0 - place // 33, place % 33 - 16.0)
    counts = torch.histc(angle, bins=8, min=-np.pi, max=np.pi)
    assert counts.min() > 45


def test_evaluation_mode_leaves_images():
    batch = images(2, 1, 9, 9)
    assert torch.equal(Augment().eval()(batch), batch)
    assert torch.equal(Augment("none")(batch), batch)


def test_augment_refuses():
    with pytest.raises(TypeError, match=r"got torch\.uint8: scale them with eqcvt\.data\.to_unit"):
        Augment("rotate")(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\], got \[4, 4\]"):
        Augment("rotate")(torch.zeros(4, 4))
    for mode in ("dihedral", "mixed"):
        with pytest.raises(ValueError, match="quarter turns need square images, got 4x5"):
            Augment(mode)(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="did you mean 'rotate'"):
        Augment("rotated")
    with pytest.raises(ValueError, match="supersample must be at least 1"):
        Augment(supersample=0)
    assert "mixed" in repr(Augment())
