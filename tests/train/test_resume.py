"""Checkpoints: a resumed run equals an unbroken one; damaged ones are refused by name."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eqcvt.models import load_model
from eqcvt.train import TrainConfig, train
from eqcvt.train import loop as training_loop
from eqcvt.train.checkpoint import seed_epoch
from eqcvt.train.distributed import Process
from tests.train.rings import config, rings, without_times


class Stop(Exception):
    """Ends a run from outside."""


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, error: BaseException) -> None:
    """Make the run end after a step of the given epoch (from 1), as Ctrl-C would."""
    step = training_loop._Run._step

    def broken(self: Any, *arguments: Any) -> Tensor:
        loss = step(self, *arguments)
        if self.state.progress.epoch + 1 == epoch:
            raise error
        return loss

    monkeypatch.setattr(training_loop._Run, "_step", broken)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_runs(one: Path, two: Path) -> None:
    for part in ("best", "last"):
        first, second = tensors(one / part), tensors(two / part)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name
    histories = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert without_times(histories[0]) == without_times(histories[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "rotate"},
        {"ema": 0.8, "optimizer": "adamw", "weight_decay": 0.1, "clip": 0.5},
    ],
)
def test_resumed_run_is_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = config(tmp_path, epochs=4, out=tmp_path / "whole", **changes)
    expected = train(whole, quiet=True)
    broken = replace(whole, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 3, Stop())
        with pytest.raises(Stop):
            train(broken, quiet=True)
    torch.manual_seed(999)
    resumed = train(broken, resume=True, quiet=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    assert without_times(resumed.history) == without_times(expected.history)
    assert resumed.best_epoch == expected.best_epoch


def test_epochs_may_grow_where_the_rate_does_not_depend_on_them(tmp_path: Path) -> None:
    short = config(tmp_path, schedule="constant", out=tmp_path / "grown")
    train(short, quiet=True)
    train(replace(short, epochs=3), resume=True, quiet=True)
    train(replace(short, epochs=3, out=str(tmp_path / "whole")), quiet=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "grown")


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path) -> None:
    run = config(tmp_path, schedule="constant")
    train(run, quiet=True)
    before = TrainConfig.from_file(tmp_path / "run" / "config.toml")
    with pytest.raises(ValueError, match="epochs must be at least the 2 that are done, got 1"):
        train(replace(run, epochs=1), resume=True, quiet=True)
    assert TrainConfig.from_file(tmp_path / "run" / "config.toml") == before


def test_several_processes_are_told_to_go_on_as_several(tmp_path: Path) -> None:
    run = object.__new__(training_loop._Run)
    run.saved_epoch, run.folder = 1, tmp_path / "run"
    run.process, run.reporter = Process(0, 4, torch.device("cpu")), Mock()
    command = f"torchrun --nproc-per-node 4 -m eqcvt train --out {tmp_path / 'run'} --resume,"
    assert f"Go on with: {command}" in run.interrupted()


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_in_epoch(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"the state after epoch 1 is in .*last"):
        train(config(tmp_path))
    assert "interrupted in epoch 2" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "run" / "metrics.json").read_text())) == 1
    assert not list((tmp_path / "run").glob(".*"))


def test_interrupted_before_the_first_epoch_can_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="the state after epoch 0"):
            train(config(tmp_path), quiet=True)
    assert len(train(config(tmp_path), resume=True, quiet=True).history) == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of one epoch."""
    run = config(tmp_path_factory.mktemp("finished"), epochs=1, ema=0.5)
    train(run, quiet=True)
    return run


@pytest.fixture
def copied(finished: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The finished run, copied to where a test may damage it."""
    shutil.copytree(finished.out, tmp_path / "run")
    return replace(finished, out=str(tmp_path / "run"))


@pytest.mark.parametrize("part", ["best", "last"])
def test_a_checkpoint_names_its_classes_wherever_it_is(
    finished: TrainConfig, tmp_path: Path, part: str
) -> None:
    moved = shutil.copytree(Path(finished.out) / part, tmp_path / "moved")
    assert load_model(moved).classes == ("no_sub", "sub")


def test_whoever_may_read_the_settings_may_read_the_weights(finished: TrainConfig) -> None:
    run = Path(finished.out)
    modes = {path.stat().st_mode for path in run.rglob("*.safetensors")}
    assert modes == {(run / "config.toml").stat().st_mode}


def test_finished_run_resumes_to_itself(copied: TrainConfig) -> None:
    before = tensors(Path(copied.out) / "last")
    result = train(copied, resume=True, quiet=True)
    after = tensors(Path(copied.out) / "last")
    assert len(result.history) == 1
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"other settings: lr was 0.001, now 0.5"),
        ({"model": "cvt", "model_kwargs": {}}, "model was 'eqcvt_c4', now 'cvt'; model_kwargs was"),
        (
            {"epochs": 2},
            r"epochs was 1, now 2 \(the onecycle .*: --init .*/run --out NEW\)",
        ),
        ({"seed": 3, "batch_size": 4}, "batch_size was 8, now 4; seed was 0, now 3"),
        ({"ema": 0.0}, "ema was 0.5, now 0.0"),
    ],
)
def test_other_settings_are_refused(
    copied: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(copied, **changes), resume=True, quiet=True)


def test_other_images_are_refused(copied: TrainConfig, tmp_path: Path) -> None:
    other = rings(24, seed=5).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"images are not the ones it was trained on .*other.npz"):
        train(replace(copied, data=str(other)), resume=True, quiet=True)


def test_moved_images_are_accepted(copied: TrainConfig, tmp_path: Path) -> None:
    moved = shutil.copy(copied.data, tmp_path / "moved.npz")
    assert len(train(replace(copied, data=str(moved)), resume=True, quiet=True).history) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def other_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def without_progress(path: Path) -> None:
    path.write_text(json.dumps({"format": 1, "config": {}}))


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("safetensors", truncate, ValueError, r"last.training_state.safetensors is damaged"),
        ("safetensors", flip_a_bit, ValueError, r"training_state.safetensors is damaged.*checksum"),
        ("safetensors", Path.unlink, FileNotFoundError, r"training_state.safetensors is missing"),
        ("json", truncate, ValueError, r"last.training_state.json is damaged"),
        ("json", without_progress, ValueError, r"training_state.json is damaged: .*progress"),
        ("json", other_format, ValueError, r"training_state.json has format 99.* reads format 1"),
        ("json", Path.unlink, FileNotFoundError, r"nothing to resume: .*training_state.json"),
    ],
)
def test_damaged_checkpoints_are_named(
    copied: TrainConfig,
    name: str,
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    damage(Path(copied.out) / "last" / f"training_state.{name}")
    with pytest.raises(error, match=message):
        train(copied, resume=True, quiet=True)


def test_every_epoch_and_process_has_its_own_random_numbers() -> None:
    draws = []
    for seed, epoch, rank in itertools.product((0, 1), (0, 1, 2), (0, 1)):
        seed_epoch(seed, epoch, rank)
        draws.append(float(torch.rand(1, dtype=torch.float64)))
    assert len(set(draws)) == 12
    seed_epoch(0, 0, 0)
    assert float(torch.rand(1, dtype=torch.float64)) == draws[0]
