"""A simulated set and a trained run, made once through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from eqcvt.cli import app

SIZE = 33


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
