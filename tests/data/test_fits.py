"""FITS images: which HDU is read and as what, and what is refused with which message."""

import sys

import numpy as np
import pytest

from eqcvt.data import load, read_image
from eqcvt.predict import Images

pytestmark = pytest.mark.needs("astropy")
IMAGE = np.arange(36).reshape(6, 6)


def write(path, *arrays):
    from astropy.io import fits

    path.parent.mkdir(parents=True, exist_ok=True)
    units = [fits.PrimaryHDU(arrays[0]), *(fits.ImageHDU(array) for array in arrays[1:])]
    fits.HDUList(units).writeto(path)
    return path


@pytest.mark.parametrize("ending", ["fits", "fit", "FITS", "fits.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "i8", "f4", "f8"])
def test_every_type_of_number_is_read(tmp_path, ending, dtype):
    image = read_image(write(tmp_path / f"a.{ending}", IMAGE.astype(dtype)))
    assert image.dtype == (np.uint8 if dtype == "u1" else np.float32)
    assert image.dtype.isnative
    assert np.array_equal(image, IMAGE)


def test_the_first_image_is_read(tmp_path):
    from astropy.io import fits

    flat, colour = np.zeros(5), np.stack([IMAGE, IMAGE + 1, IMAGE + 2]).astype(np.int16)
    assert np.array_equal(read_image(write(tmp_path / "a.fits", None, flat, colour, IMAGE)), colour)
    assert np.array_equal(read_image(write(tmp_path / "b.fits", IMAGE[None], colour)), IMAGE)
    table = fits.BinTableHDU.from_columns([fits.Column("x", "I", array=np.arange(3))])
    scaled = fits.ImageHDU(IMAGE.astype(np.float32))
    scaled.scale("int16", bscale=0.5, bzero=3)
    fits.HDUList([fits.PrimaryHDU(), table, scaled]).writeto(tmp_path / "c.fits")
    assert np.array_equal(read_image(tmp_path / "c.fits"), IMAGE)


def test_the_image_named_sci_is_read(tmp_path):
    from astropy.io import fits

    names = {"ERR": IMAGE + 1, "SCI": IMAGE, "DQ": IMAGE + 2}
    units = [fits.ImageHDU(array.astype(np.float32), name=name) for name, array in names.items()]
    fits.HDUList([fits.PrimaryHDU(), *units]).writeto(tmp_path / "a.fits")
    assert np.array_equal(read_image(tmp_path / "a.fits"), IMAGE)
    units[1].data = np.zeros((2, 6, 6))
    fits.HDUList([fits.PrimaryHDU(), *units]).writeto(tmp_path / "b.fits")
    assert np.array_equal(read_image(tmp_path / "b.fits"), IMAGE + 1)


def test_an_image_before_a_damaged_one_is_read(tmp_path):
    path = write(tmp_path / "a.fits", IMAGE.astype(np.float32), IMAGE)
    content = bytearray(path.read_bytes())
    content[5760 : 5760 + 160] = b"#" * 160  # the second header: each block has 2880 bytes
    path.write_bytes(content)
    assert np.array_equal(read_image(path), IMAGE)


@pytest.mark.parametrize("dtype", ["i2", "u2", "i4", "u4", "i8", "u8"])
def test_blank_pixels_are_no_numbers(tmp_path, dtype):
    from astropy.io import fits

    path = write(tmp_path / "a.fits", IMAGE.astype(dtype))
    lowest = 2 ** (8 * int(dtype[1]) - 1) if dtype[0] == "u" else 0
    fits.setval(path, "BLANK", value=7 - lowest)
    with pytest.raises(ValueError, match=r"a\.fits holds NaN or infinity"):
        read_image(path)
    image = read_image(path, finite=False)
    assert np.array_equal(image, np.where(IMAGE == 7, np.nan, IMAGE), equal_nan=True)


def test_folders_of_classes_and_of_a_survey(tmp_path):
    for place in ("no/1.fits", "no/2.fits.gz", "sub/1.fit"):
        write(tmp_path / place, IMAGE.astype(np.int32))
    data = load(tmp_path)
    assert (data.labels.tolist(), data.classes) == ([0, 0, 1], ("no", "sub"))
    assert np.array_equal(data.images, [IMAGE] * 3)
    survey = [tmp_path, tmp_path / "no" / "2.fits.gz"]
    chunks = list(Images.find(survey).chunks(1, 4, "crop"))
    assert [chunk.names[0][-9:] for chunk in chunks][1:] == ["2.fits.gz", "sub/1.fit", "2.fits.gz"]
    expected = (IMAGE[1:5, 1:5] - 7) / 21
    assert all(np.allclose(chunk.images[0, 0], expected) for chunk in chunks)


@pytest.mark.filterwarnings("ignore:File may have been truncated", "ignore:Error validating header")
def test_what_is_no_image_is_named(tmp_path, monkeypatch):
    path, nan = tmp_path / "a.fits", np.full((6, 6), np.nan)
    cube = np.zeros((2, 6, 6))
    for arrays, message in (
        ((None, cube), r"no HDU is an image \[H, W\], .* their shapes are \[\], \[2, 6, 6\]"),
        ((nan,), "holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=rf"a\.fits.*{message}"):
            read_image(write(path, *arrays))
        path.unlink()
    whole = write(path, IMAGE).read_bytes()
    for start in (b"", b"hello", whole[:1000], whole[:2900]):
        path.write_bytes(start)
        with pytest.raises(ValueError, match=r"cannot read .*a\.fits: "):
            read_image(path)
    monkeypatch.setitem(sys.modules, "astropy.io", None)
    message = r'a\.fits needs the package astropy: pip install "eqcvt\[fits\]"'
    with pytest.raises(ImportError, match=message):
        read_image(path)
    with pytest.raises(ImportError, match=message):
        list(Images.find([path], skip_bad=True).chunks(1, 4, "crop"))
