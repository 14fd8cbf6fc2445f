"""Images whose numbers float32 cannot tell apart are seen as if they were of plain units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eqcvt.data import LensingImages, load, read_image, to_unit
from eqcvt.data.pixels import pixels
from eqcvt.predict import Images

RANDOM = np.random.default_rng(0)
PLAIN = RANDOM.integers(0, 200, (3, 9, 9)).astype(np.float64)
WIDE = {
    "pedestal": PLAIN + 1e9,
    "below zero": PLAIN - 1e13,
    "tiny": PLAIN * 1e-50,
    "small pedestal": PLAIN * 1e-50 + 1e-47,
    "counts": PLAIN.astype(np.int64) + 2**40,
}


def seen(images: np.ndarray) -> torch.Tensor:
    return to_unit(torch.from_numpy(images))


@pytest.mark.parametrize("name", WIDE)
def test_training_and_prediction_see_them_alike(tmp_path: Path, name: str) -> None:
    expected = seen(PLAIN.astype(np.float32))
    images = WIDE[name]
    paths = [tmp_path / f"{i}.{'fits' if name == 'counts' else 'npy'}" for i in range(3)]
    for path, image in zip(paths, images, strict=True):
        if name == "counts":
            fits = pytest.importorskip("astropy.io.fits")
            fits.PrimaryHDU(image).writeto(path)
        else:
            np.save(path, image)
    trained = [np.stack([read_image(path) for path in paths])]
    if name != "counts":
        paths.append(tmp_path / "a.npz")
        np.savez(paths[-1], images=images, labels=[0, 1, 0])
        trained.append(load(paths[-1]).images)
    together = torch.cat([seen(found) for found in trained])
    torch.testing.assert_close(together, torch.cat([expected] * len(trained)), atol=1e-3, rtol=0)
    chunks = [chunk.images for chunk in Images.find(paths).chunks(1, 9, "refuse")]
    assert torch.equal(torch.cat(chunks), together)
    if images.dtype == np.float64:
        torch.testing.assert_close(seen(images), expected, atol=1e-3, rtol=0)


def test_pixels_behind_a_mask_are_refused() -> None:
    images = np.ma.masked_greater(PLAIN, 150)
    said = r"got one that masks \d+ of its 243 numbers.*images.filled\(0\)"
    for take in (to_unit, lambda array: LensingImages(array, [0, 1, 0], ("a", "b"))):
        with pytest.raises(ValueError, match=said):
            take(images)
        take(np.ma.masked_greater(PLAIN, 500))  # hides nothing
    with pytest.raises(ValueError, match="labels must be plain arrays"):
        LensingImages(PLAIN, np.ma.masked_equal([0, 1, 2], 2), ("a", "b"))


def test_arrays_are_seen_as_tensors_are() -> None:
    plain = (PLAIN / 7).astype(np.float32)
    for kind in ("f4", ">f4"):
        assert torch.equal(to_unit(plain.astype(kind)), seen(plain))
    for images in (WIDE["pedestal"], WIDE["counts"]):
        torch.testing.assert_close(to_unit(images), seen(PLAIN), atol=1e-6, rtol=0)


def test_one_of_them_changes_no_other() -> None:
    plain = np.concatenate([PLAIN / 7, PLAIN + 3000, np.full((1, 9, 9), 7.3)])
    mixed = np.concatenate([plain, *WIDE.values(), np.full((1, 9, 9), 1e40)])
    for i in (1, len(plain) + 1):
        mixed[i, 0, :3] = np.nan, np.inf, -np.inf
    found = pixels(mixed)
    assert found.dtype == np.float32
    expected = mixed[: len(plain)].astype(np.float32)
    assert np.array_equal(found[: len(plain)], expected, equal_nan=True)
    assert (np.isfinite(found) == np.isfinite(mixed))[:-1].all()
    assert np.isinf(found[-1]).all()
    for kind in ("f2", "f4", ">f4", "u1", "u2"):
        narrow = (PLAIN + 1e4).astype(kind)
        assert np.array_equal(pixels(narrow), narrow.astype(np.uint8 if kind == "u1" else "f4"))
