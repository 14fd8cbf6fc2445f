"""Prediction where images are bad: damaged, not finite, constant, of other channels."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eqcvt
from eqcvt.data import load
from eqcvt.predict import Images, predict, read
from tests.cli.conftest import COUNT, SIZE, invoke, rows


def test_a_bad_image_ends_the_run_and_leaves_nothing(
    model: Path, survey: Path, tmp_path: Path
) -> None:
    whole = (survey / "3.png").read_bytes()
    (survey / "3.png").write_bytes(whole[:100])
    out = tmp_path / "out.csv"
    arguments = ("predict", model, survey, "--out", out, "--batch-size", 1)
    assert "cannot read" in invoke(*arguments, code=2).stderr
    assert not out.exists()
    assert "3.png" in invoke(*arguments, "--shard", "0/2", code=2).stderr
    assert not list(tmp_path.glob("out.csv.parts/*"))
    (survey / "3.png").write_bytes(whole)
    for i in range(2):
        invoke(*arguments, "--shard", f"{i}/2")
    invoke("merge", out)
    assert len(rows(out)) == COUNT


def damage(survey: Path) -> dict[str, str]:
    """Spoil images; return what is to be said of each."""
    (survey / "0.png").write_bytes(b"\x89PNG")
    (survey / "0a.npz").write_bytes(b"no archive")
    nan = np.full((2, SIZE, SIZE), 0.5, np.float32)
    nan[1, 3, 3] = np.nan
    np.savez(survey / "0b.npz", images=nan)
    np.savez(survey / "0f.npz", images=np.zeros((2, SIZE, SIZE, 3), np.uint8))
    np.save(survey / "0c.npy", np.arange(3 * SIZE * SIZE, dtype=np.float32).reshape(3, SIZE, SIZE))
    np.save(survey / "0d.npy", np.zeros((5, 5), np.uint8))
    np.save(survey / "0e.npy", np.array([{}], dtype=object), allow_pickle=True)
    with (survey / "one.npz").open("r+b") as file:
        file.seek(600)
        file.write(b"\0\1\2\3")
    return {
        "0.png": "cannot read",
        "0a.npz": "cannot read .*0a.npz: File is not a zip file",
        "0b.npz[1]": "it holds NaN or infinity",
        "0c.npy": "has 3 channels, and the model takes 1",
        "0d.npy": "the image is 5x5, smaller than the model's 33x33",
        "0e.npy": "pickled Python objects",
        "0f.npz": r"channels first, got \(2, 33, 33, 3\): save np.moveaxis",
        "one.npz": "Bad CRC-32",
    }


@pytest.mark.parametrize("number", [1, 3])
def test_bad_images_are_passed_over_where_asked(
    model: Path, survey: Path, tmp_path: Path, number: int
) -> None:
    good = tmp_path / "good.csv"
    invoke("predict", model, survey, "--out", good)
    bad, out = damage(survey), tmp_path / "out.csv"
    arguments = ("predict", model, survey, "--out", out, "--skip-bad", "--batch-size", 4)
    if number == 1:
        text = invoke(*arguments).stderr
    else:
        for i in range(number):
            invoke(*arguments, "--shard", f"{i}/{number}")
        text = invoke("merge", out).stderr
    assert f"warning: {len(bad)} of {COUNT + 7} images could not be read" in text
    found = {Path(row["file"]).name: row for row in rows(out)}
    assert len(found) == COUNT + 7
    for name, why in bad.items():
        row = found.pop(name)
        assert (row["class"], row["no_sub"], row["sub"]) == ("", "", "")
        assert row["note"].startswith("skipped: ")
        assert re.search(why, row["note"]), row["note"]
    assert all(row["class"] for row in found.values())
    for row in rows(good):
        name = Path(row["file"]).name
        if name in found:
            assert float(found[name]["sub"]) == pytest.approx(float(row["sub"]), abs=1e-6)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_gives_no_image(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any
) -> None:
    monkeypatch.setattr(read, "ROWS", 2)
    path, out = tmp_path / "a.npz", tmp_path / "out.csv"
    save(path, images=np.random.default_rng(0).random((20, SIZE, SIZE)).astype(np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 4] + bytes(99) + whole[len(whole) // 4 + 99 :])
    arguments = ("predict", model, path, "--out", out)
    for shard in ((), ("--shard", "0/2"), ("--shard", "1/2")):
        assert "cannot read" in invoke(*arguments, *shard, code=2).stderr
    invoke(*arguments, "--skip-bad")
    alone = [(row["class"], row["note"]) for row in rows(out)]
    for i in range(2):
        invoke(*arguments, "--skip-bad", "--shard", f"{i}/2")
    invoke("merge", out, "--overwrite")
    assert [(row["class"], row["note"]) for row in rows(out)] == alone
    assert len(alone) == 20
    assert all(not label and why.startswith("skipped: cannot read") for label, why in alone)


def header(descr: str, shape: str) -> bytes:
    """Return how a ``.npy`` file begins."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("torn.npy", header("'<f4'", "(33, 33")),
        ("huge.npy", header("'<f4'", f"({2**20}, {2**20})")),
        ("torn.npz", header("'<f4'", "(2, 33, 33")),
        ("huge.npz", header("'<f4'", f"({10**9}, 33, 33)")),
        ("less.npz", header("'<f4'", "(-3, 33, 33)")),
        ("more.npz", header("'<f4'", "(-3, -33, 33)")),
        ("bomb.png", b"\x89PNG\r\n\x1a\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_that_lie_are_bad_images(
    model: Path, tmp_path: Path, name: str, begin: bytes
) -> None:
    path, out = tmp_path / name, tmp_path / "out.csv"
    if path.suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", begin + bytes(4 * 3 * SIZE**2))
            archive.writestr("labels.npy", header("'|u1'", "(1,)") + b"\0")
    elif path.suffix == ".npy":
        path.write_bytes(begin + bytes(99))
    else:
        size = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
        path.write_bytes(begin + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size)))
    message = invoke("predict", model, path, code=2).stderr
    assert message.startswith(f"error: cannot read {path}")
    invoke("predict", model, path, "--out", out, "--skip-bad")
    (row,) = rows(out)
    assert row["note"].startswith(f"skipped: cannot read {path}")
    if path.suffix == ".npz":
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_one_colour_image_among_grey_ones_is_the_only_bad_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type
) -> None:
    images = np.random.default_rng(0).integers(0, 99, (6, 1, SIZE, SIZE)).astype(dtype)
    images = np.tile(images, (1, 3, 1, 1))
    images[1, 0, 3, 3] += 1
    path = tmp_path / "a.npz"
    np.savez(path, images=images)
    net, read_all = eqcvt.load_model(model), Images.find([path], skip_bad=True)
    for number in (read.ROWS, 4):
        monkeypatch.setattr(read, "ROWS", number)
        found = list(predict(net, read_all))
        assert [p.name for p in found if not p.label] == [f"{path}[1]"]
        assert found[1].note.startswith("skipped: it has 3 channels, and the model takes 1")
    assert found[0].probabilities != found[2].probabilities
    with pytest.raises(ValueError, match=r"a\.npz\[1\] has 3 channels, and the model takes 1"):
        list(predict(net, path))


@pytest.mark.parametrize("value", [0, 7, 7.3])
def test_constant_images_are_noted(model: Path, tmp_path: Path, value: float) -> None:
    kind = np.float32 if isinstance(value, float) else np.uint8
    for extra in (-4, 0, 6):
        size = SIZE + extra
        images = np.random.default_rng(0).integers(0, 99, (3, size, size)).astype(kind)
        images[1] = value
        np.savez(tmp_path / "a.npz", images=images)
        for fit in ("pad", "resize"):
            notes = [p.note for p in predict(eqcvt.load_model(model), tmp_path, fit=fit)]
            assert notes[0] == notes[2]
            assert notes[1] == "; ".join(filter(None, (notes[0], "constant image")))


@pytest.mark.parametrize("outlier", [25500, np.nan, np.inf])
def test_pixels_that_are_cut_away_do_not_count(model: Path, tmp_path: Path, outlier: float) -> None:
    image = np.random.default_rng(2).random((SIZE, SIZE)).astype(np.float32)
    star = np.pad(image, 16)
    star[1, 1] = outlier
    wide = star[:, 20:-20]  # to be cut in one direction and padded in the other
    narrow = wide[16:-16]
    for name, array in (("image", image), ("star", star), ("wide", wide), ("narrow", narrow)):
        np.save(tmp_path / f"{name}.npy", array)
        np.savez(tmp_path / f"{name}.npz", images=array[None])
    net = eqcvt.load_model(model)
    for ending in ("npy", "npz"):
        paths = [tmp_path / f"{n}.{ending}" for n in ("image", "star", "wide", "narrow")]
        for fit, same in (("crop", paths[:2]), ("pad", paths[:2]), ("pad", paths[2:])):
            one, other = predict(net, same, fit=fit)
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
        if not np.isfinite(outlier):
            with pytest.raises(ValueError, match=rf"star\.{ending} holds NaN or infinity"):
                list(predict(net, paths[1:2], fit="resize"))
