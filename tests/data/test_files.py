"""Reading and writing sets: what is read, and what is refused with which message."""

import dataclasses
import json
import pickle
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from PIL import Image

from eqcvt.data import (
    LensingImages,
    generate,
    load,
    read_image,
    resolve,
    split,
    to_unit,
)


@pytest.fixture(scope="module")
def simulated():
    return generate(resolve("deeplense", size=17), range(12))


def images_of(count=6, size=9, dtype=np.uint8, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "images": rng.integers(0, 255, (count, size, size)).astype(dtype),
        "labels": (np.arange(count) % 2).astype(np.uint8),
    }
    return LensingImages(**(fields | changes))


def test_round_trip(tmp_path, simulated):
    again = load(simulated.save(tmp_path / "set.npz"))
    for item in dataclasses.fields(simulated):
        ours, theirs = getattr(again, item.name), getattr(simulated, item.name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
        elif item.name == "parameters":
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        else:
            assert ours == theirs
    assert (again.channels, again.size, len(again)) == (1, (17, 17), 12)


def test_plain_archives_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 3, 5, 4)), labels=np.array([0, 2, 1]))
    data = load(tmp_path / "a.npz")
    assert data.images.dtype == np.float32
    assert (data.channels, data.size) == (3, (5, 4))
    assert data.classes == ("class_0", "class_1", "class_2")
    assert (data.parameters, data.config, data.seed, data.index) == ({}, {}, None, None)


def test_sets_are_made_of_lists_and_tensors_too():
    images = torch.arange(50, dtype=torch.uint8).view(2, 5, 5)
    for labels in ([1, 0], torch.tensor([1, 0]), ["sub", "no_sub"]):
        data = LensingImages(images, labels)
        assert (data.labels.dtype, data.labels.tolist()) == (np.uint8, [1, 0])
        assert np.array_equal(data.images, images.numpy())
    with pytest.raises(ValueError, match="'subb'; did you mean 'sub'"):
        LensingImages(images, ["subb", "sub"])


def test_classes_with_names_may_have_no_image(tmp_path):
    images, classes = np.zeros((2, 5, 5), np.uint8), np.array(["a", "b", "c"])
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 2]), classes=classes)
    assert load(tmp_path / "a.npz").subset([1]).classes == ("a", "b", "c")


def test_labels_tell_the_classes_where_no_names_are_given(tmp_path, simulated):
    path = tmp_path / "a.npz"

    def read(labels, **columns):
        np.savez(path, images=np.zeros((3, 5, 5), np.uint8), labels=np.array(labels), **columns)
        data = load(path)
        assert data.labels.dtype == np.uint8
        return data.labels.tolist(), data.classes

    two, names = ("class_0", "class_1"), np.array(["b", "a", "c"])
    for labels in ([1, 0, 1], [True, False, True], [1.0, 0.0, 1.0], np.array([1, 0, 1], ">i8")):
        assert read(labels) == ([1, 0, 1], two)
    assert read([1, 1, 1]) == ([1, 1, 1], two)
    for as_given in (np.asarray, np.char.encode):
        text = as_given(np.array(["axiön", "no_sub", "axiön"]))
        assert read(text) == ([1, 0, 1], ("no_sub", "axiön"))
        assert read(["c", "b", "b"], classes=as_given(names)) == ([2, 0, 0], ("b", "a", "c"))
    # A simulated set has its names twice; another's configuration has none.
    config = {**simulated.config, "classes": ["no_sub", "cdm"]}
    assert read([0, 1, 1], config=np.array(json.dumps(config)))[1] == ("no_sub", "cdm")
    assert read([0, 1, 1], config=np.array('{"classes": 2}'))[1] == two


def test_arrays_that_are_not_read_are_named(tmp_path):
    columns = {"images": np.zeros((2, 5, 5), np.uint8), "labels": np.array([0, 1])}
    np.savez(tmp_path / "a.npz", class_names=np.array(["x", "y"]), **columns)
    with pytest.raises(ValueError, match=r"a\.npz: did you mean 'classes' by 'class_names'\? Ren"):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", image_id=np.array([{}, {}]), parameter_z=np.ones(2), **columns)
    with pytest.warns(UserWarning, match=r"a\.npz: not read: image_id; .* as parameter_image_id"):
        assert list(load(tmp_path / "a.npz").parameters) == ["z"]


def test_subset_takes_indices_and_masks(simulated):
    by_index, by_mask = simulated.subset([9, 2]), simulated.subset(simulated.labels == 1)
    assert by_index.index.tolist() == [9, 2]
    assert np.array_equal(by_index.images[0], simulated.images[9])
    assert by_index.parameters["shear"][1] == simulated.parameters["shear"][2]
    assert by_mask.index.tolist() == [1, 3, 5, 7, 9, 11]


def shard_folder(folder, data, cuts=((0, 4), (4, 8), (8, 12))):
    for number, (start, stop) in enumerate(cuts):
        part = data.subset(range(start, stop))
        part.save(folder / f"deeplense-{number:05d}-of-{len(cuts):05d}.npz")
    return folder


def test_shards_are_sorted_by_index(tmp_path, simulated):
    simulated.subset([5, 1, 3]).save(tmp_path / "a.npz")
    simulated.subset([4, 0, 2]).save(tmp_path / "b.npz")
    joined = load(tmp_path)
    assert joined.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(joined.images, simulated.images[:6])


def test_shards_that_do_not_fit_are_named(tmp_path, simulated):
    folder = shard_folder(tmp_path / "s", simulated)
    last = folder / "deeplense-00002-of-00003.npz"
    assert len(load(folder)) == 12
    for change, message in (
        ({"seed": 7}, r"00002-of-00003.npz does not belong with .*00000.*another seed \(7 inst"),
        ({"config": {}}, "another configuration"),
        ({"classes": ("a", "b")}, "another classes"),
        ({"parameters": {}}, "another parameters"),
        ({"images": simulated.images[8:, :9, :9]}, r"another image shape \(\(9, 9\) instead"),
    ):
        dataclasses.replace(simulated.subset(range(8, 12)), **change).save(last)
        with pytest.raises(ValueError, match=message):
            load(folder)
    simulated.subset(range(7, 12)).save(last)
    with pytest.raises(ValueError, match=r"holds these images twice: index 7$"):
        load(folder)
    simulated.subset(range(9, 12)).save(last)
    with pytest.raises(ValueError, match=r"lacks images with index 8$"):
        load(folder)
    last.unlink()
    with pytest.raises(ValueError, match="lacks shard 2 of 00003"):
        load(folder)
    simulated.subset([0]).save(folder / "deeplense-00001-of-00009.npz")
    with pytest.raises(ValueError, match=r"mixes shards of runs with \[3, 9\] shards"):
        load(folder)


def test_bad_archives_are_named(tmp_path):
    def archive(**columns):
        np.savez(tmp_path / "bad.npz", **columns)

    good = {"images": np.zeros((4, 5, 5), np.uint8), "labels": np.zeros(4, np.uint8)}
    nan = np.zeros((4, 5, 5), np.float32)
    nan[2, 1, 1] = np.nan
    for columns, error, message in (
        ({"images": good["images"], "y": good["labels"]}, ValueError, "lacks 'labels'; it holds"),
        (
            good | {"images": np.zeros((4, 5, 5), np.int32)},
            TypeError,
            "or floating, got int32: save",
        ),
        (good | {"images": np.zeros((4, 5), np.uint8)}, ValueError, r"\[N, H, W\] or .* \(4, 5\)"),
        (
            good | {"images": np.zeros((4, 5, 6, 3), np.uint8)},
            ValueError,
            r"channels first, got \(4, 5, 6, 3\): save np.moveaxis\(images, -1, 1\)",
        ),
        (good | {"config": np.array("{")}, ValueError, "'config' is not JSON .Expecting"),
        (good | {"seed": np.array("x")}, ValueError, "'seed' is not JSON .Expecting"),
        (good | {"classes": np.array(["a", "a"])}, ValueError, "different names, got a, a"),
        (
            good | {"labels": np.array([1, 2, 1, 2])},
            ValueError,
            "labels go up to 2 but lack 0: number .* gap .subtract 1., or add",
        ),
        (
            good | {"labels": np.array([5, 0, 0, 5])},
            ValueError,
            "up to 5 but lack 1, 2, 3, 4: number",
        ),
        (good | {"images": nan}, ValueError, "1 of 4 hold NaN or infinity, the first is image 2"),
        (good | {"labels": np.zeros(3, np.uint8)}, ValueError, r"labels must have the shape \[4\]"),
        (good | {"labels": np.full(4, 0.5)}, TypeError, "from 0 to 255 or names .*, got 0.5"),
        (good | {"labels": np.full(4, np.nan)}, TypeError, "labels must be whole .*, got nan"),
        (good | {"labels": np.full(4, np.inf)}, ValueError, r"in 0\.\.255, got inf\.\.inf"),
        (good | {"labels": np.zeros(4, complex)}, TypeError, "labels must be .*, got complex128"),
        (
            good | {"labels": np.array(["a", "b", "c", "a"]), "classes": np.array(["a", "b"])},
            ValueError,
            "labels must be one of 'a', 'b', got 'c'",
        ),
        (good | {"classes": np.array("ab")}, ValueError, "classes must be a list of names, got"),
        (good | {"config": np.array("[1]")}, ValueError, r"must be a JSON object, got \[1\]"),
        (good | {"labels": np.array([0, 1, -1, 0])}, ValueError, "labels must lie in 0..255"),
        (
            good | {"labels": np.array([0, 1, 2, 0]), "classes": np.array(["a", "b"])},
            ValueError,
            r"labels must lie in 0..1 for the classes a, b, got 2",
        ),
        (good | {"parameter_shear": np.zeros(9)}, ValueError, r"shear must have the shape \[4\]"),
        (good | {"labels": np.array([None] * 4)}, ValueError, "'labels' holds pickled Python obj"),
    ):
        archive(**columns)
        with pytest.raises(error, match=message) as caught:
            load(tmp_path / "bad.npz")
        assert "bad.npz" in str(caught.value)


def test_damaged_and_missing_files_are_named(tmp_path, simulated):
    path = simulated.save(tmp_path / "set.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*set\.npz: truncated or not a numpy file"):
        load(path)
    middle = whole.index(b"images.npy") + 200
    path.write_bytes(whole[:middle] + b"\0" * 50 + whole[middle + 50 :])
    with pytest.raises(ValueError, match=r"set\.npz.*'images'.*damaged"):
        load(path)
    for start in (b"", b"hello", b"PK", whole[:5], b"\x93NUMP", b"\x93NUMPY\x01\0\5\0a"):
        path.write_bytes(start)
        with pytest.raises(ValueError, match=r"cannot read .*set\.npz: truncated or not a numpy f"):
            load(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"set\.npz holds pickled Python objects"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"lacks 'images' and 'labels'; it holds readme\.txt"):
        load(path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(path)
    with pytest.raises(ValueError, match=r"a \.npy file under the name of a \.npz file"):
        load(path)
    with pytest.raises(
        FileNotFoundError, match=r"no such file.*sett\.npz; did you mean .*set\.npz"
    ):
        load(tmp_path / "sett.npz")
    with pytest.raises(FileNotFoundError, match=r"nor is there a folder .*nowhere"):
        load(tmp_path / "nowhere" / "set.npz")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt: a set is a \.npz file"):
        load(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"saved as a \.npz file, got 'a\.h5'"):
        simulated.save("a.h5")


def picture_folder(folder, names=("no_sub", "sub"), count=3, size=(8, 8), suffix="png", mode="L"):
    rng = np.random.default_rng(1)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = size if mode == "L" else (*size, len(mode))
            pixels = rng.integers(0, 255, shape).astype(np.uint8)
            Image.fromarray(pixels, mode=mode).save(folder / name / f"{number}.{suffix}")
    return folder


def test_ml4sci_folders(tmp_path):
    picture_folder(tmp_path / "train", count=11)
    picture_folder(tmp_path / "val", count=2)
    train, val = load(tmp_path, split="train"), load(tmp_path, split="val")
    assert (len(train), len(val), len(load(tmp_path))) == (22, 4, 26)
    assert train.classes == ("no_sub", "sub")
    assert train.labels.tolist() == [0] * 11 + [1] * 11
    # Natural order: 10.png after 9.png.
    with Image.open(tmp_path / "train" / "no_sub" / "10.png") as picture:
        assert np.array_equal(train.images[10], np.asarray(picture))
    assert len(load(tmp_path / "val")) == 4
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        load(tmp_path, split="test")
    with pytest.raises(ValueError, match="has no split 'val'; it has none: leave split out"):
        load(tmp_path / "train", split="val")


def test_split_files(tmp_path):
    images_of().save(tmp_path / "train.npz")
    assert len(load(tmp_path, split="train")) == 6


def test_colour_and_arrays(tmp_path):
    colour = load(picture_folder(tmp_path / "c", ("sphere", "no", "vort"), mode="RGB"))
    assert colour.classes == ("no", "sphere", "vort")
    assert colour.images.shape == (9, 3, 8, 8)
    jpeg = load(picture_folder(tmp_path / "j", suffix="jpg"))
    assert jpeg.images.shape == (6, 8, 8)
    for number, shape in enumerate([(1, 6, 6), (6, 6), (6, 6, 1), (3, 6, 6), (6, 6, 3)]):
        for name in ("no", "axion"):
            place = tmp_path / str(number) / name
            place.mkdir(parents=True)
            np.save(place / "a.npy", np.full(shape, 0.5))
        data = load(tmp_path / str(number))
        assert data.images.dtype == np.float32
        assert data.classes == ("no", "axion")
        assert data.images.shape == ((2, 6, 6) if number < 3 else (2, 3, 6, 6))


def test_an_opaque_alpha_channel_is_dropped(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (6, 6), dtype=np.uint8)
    alpha = np.full((6, 6), 255, np.uint8)
    imsave(tmp_path / "rgba.png", grey, cmap="gray", vmin=0, vmax=255)
    assert np.array_equal(read_image(tmp_path / "rgba.png"), [grey] * 3)
    Image.fromarray(np.dstack([grey, alpha]), mode="LA").save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png"), grey)
    alpha[3, 3] = 254
    Image.fromarray(np.dstack([grey, grey, grey, alpha])).save(tmp_path / "rgba.png")
    with pytest.raises(ValueError, match=r"rgba\.png: its mode is RGBA and not opaque"):
        read_image(tmp_path / "rgba.png")


def write_deep_png(path, kind, channels, image):
    """Write a 16-bit PNG, which Pillow does in grey alone."""
    size = struct.pack(">IIBBBBB", *image.shape[1::-1], 16, kind, 0, 0, 0)
    rows = image.astype(">u2").reshape(len(image), -1, channels)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", size), (b"IDAT", packed), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_pictures_of_16_bits_are_read_whole_or_refused(tmp_path):
    path = tmp_path / "a.png"
    grey = np.random.default_rng(0).integers(0, 65536, (6, 5), dtype=np.uint16)
    write_deep_png(path, 0, 1, grey)
    assert np.array_equal(read_image(path), grey)
    # Grey and alpha, colour, colour and alpha; all opaque.
    for kind, colours, alphas in ((4, 1, 1), (2, 3, 0), (6, 3, 1)):
        layers = [grey] * colours + [np.full_like(grey, 65535)] * alphas
        write_deep_png(path, kind, len(layers), np.dstack(layers))
        with pytest.raises(ValueError, match=r"a\.png: it has 16 bits a .* as 16-bit grey, \.npy"):
            read_image(path)


def test_what_is_not_read_beside_images_is_said(tmp_path):
    for name in ("no_sub", "sub"):
        (tmp_path / name).mkdir()
        for i in range(2):
            np.save(tmp_path / name / f"{i}.npy", np.eye(8))
    for ignored in (".DS_Store", "Thumbs.db"):
        (tmp_path / "sub" / ignored).touch()
    (tmp_path / "__MACOSX").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(tmp_path)) == 4
    (tmp_path / "sub" / "deep").mkdir()
    (tmp_path / "sub" / "3.tif").touch()
    with pytest.warns(UserWarning, match=r"sub: 2 of its 4 entries are not read, such as 3\.tif"):
        assert len(load(tmp_path)) == 4


def test_a_set_kept_apart_is_not_joined(tmp_path):
    files, pictures = tmp_path / "files", tmp_path / "pictures"
    for name in ("Test", "train"):
        images_of().save(files / f"{name}.npz")
        picture_folder(pictures / name.lower())
    with pytest.raises(ValueError, match=r"Test.npz is kept apart from train.npz.*train.npz"):
        load(files)
    with pytest.raises(ValueError, match="test is kept apart from train"):
        load(pictures)
    assert len(load(files, split="train")) == 6


def test_bad_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images: expected \.npz files, or one"):
        load(tmp_path / "empty")
    (tmp_path / "half" / "sub").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"half.sub holds no images \(expected \.png"):
        load(tmp_path / "half")

    folder = picture_folder(tmp_path / "f")

    def refused(name, message, error=ValueError):
        with pytest.raises(error, match=message) as caught:
            load(folder)
        assert name in str(caught.value)
        (folder / "sub" / name).unlink()

    place = folder / "sub"
    Image.new("L", (9, 8)).save(place / "size.png")
    refused("size.png", r"is uint8 \[8, 9\], but .* is uint8 \[8, 8\]; all images must be alike")
    for mode, message in (
        ("RGBA", "its mode is RGBA and not opaque; save it as 8-bit grey"),
        ("LA", "its mode is LA and not opaque; save"),
        ("P", "its mode is P; save"),
    ):
        Image.new(mode, (8, 8)).save(place / "mode.png")
        refused("mode.png", message)
    (place / "cut.png").write_bytes((place / "0.png").read_bytes()[:60])
    refused("cut.png", r"cannot read .*cut\.png")
    (place / "text.jpg").write_text("not a picture")
    refused("text.jpg", r"cannot read .*text\.jpg")
    np.save(place / "objects.npy", np.array([{}]), allow_pickle=True)
    refused("objects.npy", "holds pickled Python objects")
    np.save(place / "ints.npy", np.zeros((8, 8), np.int64))
    refused("ints.npy", "an image must be uint8, uint16 or floating, got int64", TypeError)
    np.save(place / "flat.npy", np.zeros(64, np.uint8))
    refused("flat.npy", r"must have the shape \[H, W\].* got \[64\]")
    np.save(place / "nan.npy", np.full((8, 8), np.nan))
    refused("nan.npy", "holds NaN or infinity")
    np.save(place / "short.npy", np.zeros((8, 8)))
    (place / "short.npy").write_bytes((place / "short.npy").read_bytes()[:200])
    refused("short.npy", r"cannot read .*short\.npy")
    (place / "dir.png").mkdir()
    (place / "._0.png").write_bytes(b"of another system")
    (folder / "set.npz").mkdir()
    (folder / "set.npz" / "0.png").write_bytes((place / "0.png").read_bytes())
    data = load(folder)
    assert (len(data), data.classes) == (7, ("no_sub", "set.npz", "sub"))


def test_split_is_per_class_reproducible_and_disjoint(simulated):
    data = dataclasses.replace(
        images_of(100), labels=np.repeat([0, 1], [80, 20]).astype(np.uint8), index=np.arange(100)
    )
    rest, held = split(data, 0.1)
    assert np.bincount(held.labels).tolist() == [8, 2]
    assert sorted([*rest.index, *held.index]) == list(range(100))
    assert held.index.tolist() == sorted(split(data, 0.1)[1].index)
    assert held.index.tolist() != split(data, 0.1, seed=2)[1].index.tolist()
    with pytest.raises(ValueError, match=r"hold out 0\.01 of the 20 images of class 'sub'"):
        split(data, 0.01)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\), got 1"):
        split(data, 1)


def test_to_unit():
    grey = torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8)
    assert torch.equal(to_unit(grey), torch.tensor([[[[0, 0.2], [0.4, 1]]]]))
    flux = torch.tensor([[[[-1.0, 3.0]], [[1.0, 0.0]]], [[[5.0, 5.0]], [[5.0, 5.0]]]])
    expected = torch.tensor([[[[0, 1.0]], [[0.5, 0.25]]], [[[0, 0.0]], [[0, 0]]]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scaled = to_unit(flux.to(dtype))
        assert scaled.dtype == torch.float32
        assert torch.equal(scaled, expected)
    with pytest.raises(TypeError, match=r"uint8 or floating, got torch\.int64"):
        to_unit(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\], got \[2, 2\]"):
        to_unit(torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", ">u2", ">i4", "i8", "?", "u1"])
def test_to_unit_of_arrays(dtype: str) -> None:
    array = np.array([[[0, 1, 1], [1, 0, 1]]]).astype(dtype)
    array.setflags(write=False)  # as a file that is mapped to memory
    expected = torch.tensor([[[[1.0, 1, 0], [1, 0, 1]]]]) / (255 if dtype == "u1" else 1)
    assert torch.equal(to_unit(array[..., ::-1]), expected)


def test_the_repr_of_a_set_says_its_size_and_not_its_pixels() -> None:
    data = LensingImages(np.zeros((2, 3, 5, 5), np.uint8), np.zeros(2, np.uint8))
    assert repr(data) == "LensingImages(2x3x5x5 uint8, classes: no_sub, sub)"
