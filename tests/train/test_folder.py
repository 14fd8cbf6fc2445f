"""The run folder: whose it is, what --overwrite removes, and what a killed run left in it."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eqcvt.models import load_model
from eqcvt.train import TrainConfig, train
from eqcvt.train import loop as training_loop
from tests.train.rings import config


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of two epochs at a constant rate."""
    run = config(tmp_path_factory.mktemp("twice"), schedule="constant")
    train(run, quiet=True)
    return run


@pytest.fixture
def copied(twice: TrainConfig, tmp_path: Path) -> TrainConfig:
    """That run, copied to where a test may damage it."""
    shutil.copytree(twice.out, tmp_path / "run")
    return replace(twice, out=str(tmp_path / "run"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run = config(tmp_path, epochs=1)
    train(run, quiet=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds a run \(config.toml.*overwrite"):
        train(run, quiet=True)
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before
    train(replace(run, seed=1), overwrite=True, quiet=True)
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() != before
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        train(run, resume=True, overwrite=True)


def test_a_file_system_without_locks_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("eqcvt.train.folder.FileLock.acquire", acquire)
    assert train(config(tmp_path, epochs=1), quiet=True).history


def test_two_processes_do_not_train_into_one_folder(tmp_path: Path) -> None:
    run = config(tmp_path, epochs=1)
    code = (
        "import sys\nfrom pathlib import Path\nfrom eqcvt.train.folder import alone\n"
        "with alone(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, run.out]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(
            FileExistsError, match=r"another process is training into .*run: choose"
        ):
            train(run, quiet=True, **flags)
    other.kill()
    other.communicate()
    assert len(train(run, quiet=True).history) == 1


def test_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match=r"the run folder .*run is a file"):
        train(config(tmp_path), quiet=True)


def test_overwrite_removes_what_was_measured_of_the_run_and_nothing_else(
    copied: TrainConfig,
) -> None:
    run = Path(copied.out)
    evaluation = run / "evaluation"
    evaluation.mkdir()
    (run / "curves.png").touch()
    (evaluation / "metrics.json").write_text(json.dumps({"models": {"EqCvT C4": {}}}))
    for name in ("roc", "samples_eqcvt_c4", "mine"):
        (evaluation / f"{name}.png").touch()
    train(replace(copied, epochs=1), overwrite=True, quiet=True)
    assert not (run / "curves.png").exists()
    assert [path.name for path in evaluation.iterdir()] == ["mine.png"]
    (evaluation / "metrics.json").write_text("[]")  # of no evaluation
    train(replace(copied, epochs=1), overwrite=True, quiet=True)
    assert {path.name for path in evaluation.iterdir()} == {"mine.png", "metrics.json"}
    (evaluation / "metrics.json").write_text(json.dumps({"models": {}}))
    (evaluation / "mine.png").unlink()
    train(replace(copied, epochs=1), overwrite=True, quiet=True)
    assert not evaluation.exists()


@pytest.mark.parametrize("left", ["new", "old"])
def test_a_run_killed_while_it_put_a_checkpoint_in_place_goes_on(
    copied: TrainConfig, left: str
) -> None:
    run = Path(copied.out)
    (run / ".last.k3j2_x9a").mkdir()
    (run / ".best.abcdefgh" / "new").mkdir(parents=True)  # half written
    (run / ".metrics.json.abcdefgh").mkdir()
    (run / ".last.notes").mkdir()
    (run / "last").rename(run / ".last.k3j2_x9a" / "old")
    if left == "new":
        shutil.copytree(run / ".last.k3j2_x9a" / "old", run / ".last.k3j2_x9a" / "new")
        (run / ".last.k3j2_x9a" / "old" / "training_state.json").unlink()
    before = weights(run / "best")
    assert len(train(copied, resume=True, quiet=True).history) == 2
    assert weights(run / "best") == before
    assert [path.name for path in run.glob(".*")] == [".last.notes"]
    assert (run / "last" / "training_state.json").is_file()


def test_a_run_killed_between_last_and_best_has_its_best_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit

    run, folder = config(tmp_path, epochs=1), tmp_path / "run"
    monkeypatch.setattr(training_loop.checkpoint, "save_model", killed)
    with pytest.raises(SystemExit):
        train(run, quiet=True)
    monkeypatch.undo()
    assert not (folder / "best").exists()
    assert json.loads((folder / "last/training_state.json").read_text())["progress"]["epoch"] == 1
    assert train(run, resume=True, quiet=True).best_epoch == 1
    assert weights(folder / "best") == weights(folder / "last")


def test_a_best_model_that_is_lost_is_said(
    copied: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 6, dtype=torch.float64)[:11]
    monkeypatch.setattr(training_loop._Run, "_validate", lambda self: worse)
    run, best = replace(copied, epochs=3), Path(copied.out) / "best"
    train(run, resume=True, quiet=True)
    load_model(best)
    (best / "model.safetensors").write_bytes(b"12345678")
    with pytest.warns(
        UserWarning, match=r"best epoch, \d, is lost \(.*best.model.safetensors is not"
    ):
        train(run, resume=True, quiet=True)
    shutil.rmtree(best)
    with pytest.warns(UserWarning, match=r"is lost \(.*best is not a saved model.*later epoch is"):
        train(run, resume=True, quiet=True)


def test_a_run_folder_that_is_moved_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = training_loop._Run._validate

    def moved(self: Any) -> torch.Tensor:
        if self.state.progress.epoch == 1:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return validate(self)

    monkeypatch.setattr(training_loop._Run, "_validate", moved)
    run = config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the run folder .*run is gone: was it moved\?"):
        train(run, quiet=True)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    moved_run = replace(run, out=str(tmp_path / "elsewhere"))
    assert len(train(moved_run, resume=True, quiet=True).history) == 2
