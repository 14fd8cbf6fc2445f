"""A simulated set and a trained run, made once through the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import eqcvt
from eqcvt.cli import app
from tests.train.rings import TINY

SIZE = 33
COUNT = 14  # images of ``survey``


def invoke(*arguments: object, code: int = 0) -> Result:
    """Run ``eqcvt ARGUMENTS`` in this process and assert its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 simulated images."""
    path = tmp_path_factory.mktemp("images") / "set.npz"
    invoke("simulate", path, "--count", 48, "--size", SIZE, "--seed", 3, "--workers", 1)
    return path


@pytest.fixture(scope="session")
def run_folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on them."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    invoke(*TRAIN, "--data", images, "--out", folder, "--epochs", 2)
    return folder


TRAIN = ("train", "--batch-size", 16, "--val-fraction", 0.25, "--augment", "none")
TRAIN += ("--device", "cpu", "--schedule", "constant")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with names for its classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    eqcvt.EqCvT(in_channels=1, image_size=SIZE, **TINY).save_pretrained(folder)
    (folder / "classes.json").write_text('["no_sub", "sub"]')
    return folder


@pytest.fixture
def survey(tmp_path: Path) -> Path:
    """14 images in pictures, arrays and archives."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 255, (COUNT, SIZE, SIZE), dtype=np.uint8)
    folder = tmp_path / "survey"
    (folder / "b").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(grey[i]).save(folder / f"{i}.png")
    np.savez_compressed(folder / "b" / "seven.npz", images=grey[4:11], labels=np.zeros(7, np.uint8))
    np.savez(folder / "one.npz", images=grey[11:12, None])
    np.save(folder / "real.npy", grey[12].astype(np.float64))
    np.save(folder / "wide.npy", random.integers(0, 255, (SIZE + 4, SIZE + 4), dtype=np.uint8))
    return folder
