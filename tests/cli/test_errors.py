"""Bad input on the command line: one line on standard error, exit code 2, no traceback."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eqcvt
from tests.cli.conftest import SIZE, invoke

OPTIONS: list[tuple[str, str]] = [
    ("simulate OUT.npz --preset deeplens", r"preset must be one of .*; did you mean 'deeplense'"),
    ("simulate OUT.npz --count 0", "count must be at least 1, got 0"),
    ("simulate OUT --count 4 --shard 2/2", "--shard must be i/n with 0 <= i < n.*got '2/2'"),
    ("simulate OUT --count 4 --shard half", "--shard must be i/n with 0 <= i < n.*got 'half'"),
    ("simulate OUT.npz --set halo.shear", "--set must be FIELD=VALUE, got 'halo.shear'"),
    ("simulate OUT.npz --set halo.shear=big", "--set halo.shear must be a number, .* got 'big'"),
    ("simulate OUT.npz --set halo.sheer=1", "did you mean 'halo.shear'"),
    ("simulate OUT.npz --set source.index=100", "source.index must be at least .*got 100"),
    ("simulate OUT.npz --dtype int8", "dtype must be one of 'uint8', 'float32', got 'int8'"),
    ("train", "no training images: give --data PATH, or a --config file with data"),
    ("train --data NONE", "no such file or folder: .*none"),
    ("train --data IMAGES --model eqcvt_c5", "model must be one of .*; did you mean 'eqcvt_c"),
    ("train --data IMAGES --lr -1", "lr must be above 0, got -1"),
    ("train --data IMAGES --epochs 0", "epochs must be at least 1, got 0"),
    ("train --data IMAGES --augment flip", "augment must be one of .*, got 'flip'"),
    ("train --data IMAGES --model-arg fields", "--model-arg must be NAME=VALUE, got 'fields'"),
    ("train --data IMAGES --out OUT --batch-size 4 --model-arg grop=D4", "did you mean 'group'"),
    ("train --data IMAGES --device tpu", "device must be one of 'auto', 'cpu'.*got 'tpu'"),
    (
        "train --data IMAGES --out OUT --batch-size 64",
        r"batch_size 64 is more than the \d+ training images: the largest",
    ),
    ("train --data IMAGES --out RUN", "already holds a run .*overwrite"),
    ("train --data IMAGES --out OUT --batch-size 4 --resume", "nothing to resume"),
    (
        "train --out OUT --resume",
        "nothing to resume: no .*config.toml; --out names the run's folder",
    ),
    ("train --out RUN --resume --lr 0.5", "with other settings: lr was 0.001, now 0.5"),
    ("train --data IMAGES --resume --overwrite", "resume and overwrite exclude each other"),
    ("train --config NONE.toml", "no configuration file .*none.toml"),
    ("train --config IMAGES", "a configuration is a .toml, .yaml or .yml file"),
    ("train --config NONE.toml --recipe poster", "no configuration file"),
    ("evaluate NONE", "no folder .*none: give a run folder or a checkpoint folder"),
    ("evaluate IMAGES", "is a file: give a run folder or a checkpoint folder"),
    ("evaluate EMPTY", "holds no model: neither model.safetensors nor best/model.safetensors"),
    ("evaluate CHECKPOINT", "belongs to no run: say which images with --data PATH"),
    ("evaluate RUN --data NONE", "no such file or folder"),
    ("evaluate COLOUR --data IMAGES", "takes images with 3 channels, the data have 1"),
    ("evaluate LARGE --data IMAGES", "takes images with 65x65 pixels, the data have 33x33"),
    ("evaluate THREE --data IMAGES", "takes images with 3 classes, the data have 2"),
    ("evaluate DAMAGED --data IMAGES", "model.safetensors is not a whole safetensors file"),
    ("predict RUN NONE.png", "no file or folder .*none.png"),
    ("predict RUN EMPTY", "holds no image"),
    ("predict RUN RUN/config.toml", "is not an image: its ending must be one of"),
    ("predict RUN SMALL", r"smaller than the model's 33x33: use --fit pad .* or --fit resize"),
    ("predict RUN SMALL --fit refuse", "33x33: use --fit pad or --fit resize"),
    ("predict RUN SMALL --fit squeeze", "fit must be one of 'crop', 'pad', 'resize', 'refuse'"),
    ("predict RUN RGB", "has 3 channels, and the model takes 1"),
    ("predict RUN NAN", "holds NaN or infinity"),
    ("predict RUN PICKLE", "pickled Python objects"),
    ("predict RUN BROKEN", "cannot read .*broken.png"),
    ("predict RUN NOIMAGES", "has no array 'images'; it holds labels"),
    ("predict RUN IMAGES --out OUT.txt", "the ending of --out must be one of '.csv', '.json'"),
    ("predict RUN IMAGES --shard 0/2", "a part is written to a file: say which with --out FILE"),
    ("predict RUN IMAGES --out OUT.csv --shard 2/2", "--shard must be i/n .*got '2/2'"),
    ("predict RUN IMAGES --shard 0/1", "a part is written to a file: say which with --out FILE"),
    ("predict RUN IMAGES --out FOLDER.csv", "folder.csv is a folder: give the path of a file"),
    ("predict RUN IMAGES --out FOLDER.csv --shard 0/2 --overwrite", "folder.csv is a folder"),
    ("export RUN FOLDER.pt2 --overwrite", "folder.pt2 is a folder: give the path of a file"),
    ("predict RUN IMAGES --amp half", "amp must be one of 'off', 'bf16', 'fp16', got 'half'"),
    ("predict RUN IMAGES --amp fp16 --device cpu", "amp='fp16' needs a GPU"),
    ("merge OUT.csv", "out.csv.parts holds no parts of out.csv"),
    ("export RUN OUT.pth", "must be one of '.pt2', '.onnx', got '.pth'"),
    ("export NONE OUT.pt2", "no folder .*none"),
    ("convert NONE.pt OUT", "none.pt"),
    ("convert RUN/config.toml OUT", "config.toml"),
    ("convert IMAGES RUN", "exists: give another path, or --overwrite to replace it"),
]


@pytest.fixture
def places(images: Path, run_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """What the capital words in OPTIONS stand for."""
    found = {"IMAGES": images, "RUN": run_folder, "CHECKPOINT": tmp_path / "checkpoint"}
    eqcvt.load_model(run_folder / "best").save_pretrained(found["CHECKPOINT"])
    changes = {
        "COLOUR": ("in_channels", 3),
        "LARGE": ("image_size", 65),
        "THREE": ("num_classes", 3),
    }
    for name, (key, value) in changes.items():
        found[name] = tmp_path / name.lower()
        default: dict[str, Any] = {"in_channels": 1, "num_classes": 2, "image_size": SIZE}
        eqcvt.create_model("cvt", **{**default, key: value}).save_pretrained(found[name])
    found["DAMAGED"] = tmp_path / "damaged"
    eqcvt.load_model(found["CHECKPOINT"]).save_pretrained(found["DAMAGED"])
    (found["DAMAGED"] / "model.safetensors").write_bytes(b"12345678")
    found["EMPTY"] = tmp_path / "empty"
    found["EMPTY"].mkdir()
    found["FOLDER"] = tmp_path / "folder"
    for ending in (".csv", ".pt2"):
        found["FOLDER"].with_suffix(ending).mkdir()
    arrays: dict[str, Any] = {
        "SMALL": np.zeros((20, 20), np.uint8),
        "RGB": np.arange(3 * SIZE * SIZE, dtype=np.float32).reshape(3, SIZE, SIZE),
        "NAN": np.full((SIZE, SIZE), np.nan, np.float32),
        "PICKLE": np.array([{}], dtype=object),
    }
    for name, array in arrays.items():
        found[name] = tmp_path / f"{name.lower()}.npy"
        np.save(found[name], array, allow_pickle=True)
    found["BROKEN"] = tmp_path / "broken.png"
    found["BROKEN"].write_bytes(b"\x89PNG")
    found["NOIMAGES"] = tmp_path / "noimages.npz"
    np.savez(found["NOIMAGES"], labels=np.zeros(2, np.uint8))
    return {**found, "NONE": tmp_path / "none", "OUT": tmp_path / "out"}


@pytest.mark.parametrize(("command", "message"), OPTIONS, ids=[c for c, _ in OPTIONS])
def test_error(command: str, message: str, places: dict[str, Path]) -> None:
    words = "|".join(sorted(places, key=len, reverse=True))
    text = re.sub(rf"\b({words})\b", lambda m: str(places[m[0]]), command)
    result = invoke(*text.split(), code=2)
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert re.search(message, lines[-1]), lines[-1]
    assert "Traceback" not in result.output + result.stderr
    assert not places["OUT"].exists() or not any(places["OUT"].glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training"], "No such command 'training'"),
        (["train", "--epoch", "3"], "No such option: --epoch"),
        (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["predict"], "Missing argument"),
    ],
)
def test_usage_error(arguments: list[str], message: str) -> None:
    assert message in invoke(*arguments, code=2).stderr


def test_debug_shows_where(tmp_path: Path) -> None:
    result = invoke("--debug", "evaluate", tmp_path / "none", code=1)
    assert isinstance(result.exception, FileNotFoundError)


def test_interrupted_run_says_how_to_go_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eqcvt.train.report import Reporter

    steps = []

    def step(self: Reporter, loss: torch.Tensor) -> None:
        steps.append(loss)
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "step", step)
    out = tmp_path / "my run"
    arguments = ("--data", images, "--out", out, "--epochs", 3, "--batch-size", 16)
    result = invoke("train", *arguments, "--augment", "none", "--device", "cpu", code=130)
    advice = re.search(r"Go on with: eqcvt (.*), or", result.output)
    assert advice is not None
    assert json.loads((out / "classes.json").read_text()) == ["no_sub", "sub"]
    monkeypatch.undo()
    text = invoke(*shlex.split(advice[1])).output
    assert "epoch 3/3" in text
