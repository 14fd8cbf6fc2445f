"""Two processes that talk gloo against one process on the same global batches."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eqcvt import native, use_backend
from eqcvt.data import load
from eqcvt.models import create_model, load_model
from eqcvt.train import TrainConfig, evaluate, train
from eqcvt.train import setup as training_setup
from eqcvt.train.distributed import processes
from tests.torchrun import torchrun
from tests.train.rings import TINY, config, without_times


def double_model(*arguments: Any, **keywords: Any) -> torch.nn.Module:
    """In float64, rounding does not grow into a difference through Adam's division."""
    return create_model(*arguments, **keywords).double()


def main(*paths: str) -> None:
    """What each of the two processes does: one run after the other."""
    torch.set_num_threads(1)
    training_setup.create_model = double_model  # type: ignore[assignment]
    for path in paths:
        backend = Path(path).stem
        with use_backend(backend if backend in BACKENDS else "auto"):
            result = train(TrainConfig.from_file(path))
        Path(f"{path}.{os.environ['RANK']}.json").write_text(json.dumps(result.history))


BACKENDS = ("reference", "native")
SYNCED: dict[str, Any] = {
    "augment": "none",
    "sync_batch_norm": True,
    # Tokens as narrow as the native kernels take them.
    "model_kwargs": {**TINY, "stages": [{"dim": 16, "head_dim": 16}], "dropout": 0.0},
    "ema": 0.5,
    "clip": 0.5,
    "epochs": 3,
    "lr": 1e-2,
    "schedule": "constant",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs on two processes: batch norm over both, and over each alone."""
    folder = tmp_path_factory.mktemp("two")
    usable = BACKENDS if native.unavailable("cpu") is None else BACKENDS[:1]
    runs = [config(folder, out=folder / backend, **SYNCED) for backend in usable]
    runs += [config(folder, out=folder / "alone", augment="rotate", epochs=1)]
    paths = [str(run.save(folder / f"{Path(run.out).name}.toml")) for run in runs]
    output, _ = torchrun("tests.train.test_distributed", *paths)
    (folder / "stdout").write_text(output)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and history of the reference's run on one process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch, use_backend("reference"):
        patch.setattr(training_setup, "create_model", double_model)
        run = train(config(folder, out=folder / "run", **SYNCED), quiet=True)
    return run.folder, without_times(run.history)


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("native", marks=pytest.mark.needs("native"))]
)
def test_two_processes_equal_the_reference_on_one(
    two: Path, one: tuple[Path, list[dict[str, Any]]], backend: str
) -> None:
    histories = [json.loads((two / f"{backend}.toml.{r}.json").read_text()) for r in (0, 1)]
    assert without_times(histories[0]) == without_times(histories[1])
    for row, expected in zip(histories[0], one[1], strict=True):
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-9)
    for name in ("model", "training_state"):
        first, second = (
            load_file(run / "last" / f"{name}.safetensors") for run in (one[0], two / backend)
        )
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            # Biases in front of a batch norm have no gradient but rounding, and Adam enlarges it.
            torch.testing.assert_close(
                second[key], tensor, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_processes_agree_on_validation_without_common_statistics(two: Path) -> None:
    """Each process validates its share with the running statistics of the first one."""
    histories = [json.loads((two / f"alone.toml.{r}.json").read_text()) for r in (0, 1)]
    assert without_times(histories[0]) == without_times(histories[1])
    model = load_model(two / "alone" / "last")
    result = evaluate(model, load(two / "val.npz"), device="cpu", rotations=False)
    assert result["loss"] == pytest.approx(histories[0][0]["val_loss"], rel=1e-5)


def test_only_the_first_process_prints(two: Path) -> None:
    lines = (two / "stdout").read_text().splitlines()
    synced = ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    runs = len(list(two.glob("*.toml"))) - 1
    assert [line[:9] for line in lines] == [*runs * synced, "epoch 1/1"]


def test_environment_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE must be a number, got 'two'"), processes():
        pass


def test_one_gpu_for_two_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="'cuda:0' names one GPU, but 2 processes run"),
        processes("cuda:0"),
    ):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
