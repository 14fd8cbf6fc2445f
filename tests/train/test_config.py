"""Settings: every wrong one is refused in words, and files give back what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eqcvt.train import TrainConfig


def make(**values: Any) -> TrainConfig:
    return TrainConfig.from_dict({"data": "images.npz", **values})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"epoch": 3}, ValueError, "unknown training setting 'epoch'; did you mean 'epochs'"),
        ({"learning": 1}, ValueError, "unknown training setting 'learning'"),
        ({"zzzzz": 1}, ValueError, "unknown training setting 'zzzzz'; known: data, val_data"),
        ({"recipe": "postr"}, ValueError, "recipe must be one of .* did you mean 'poster'"),
        ({"model": "eqcvt_c5"}, ValueError, "model must be one of .*'eqcvt_c4'.* got 'eqcvt_c5'"),
        ({"model_kwargs": [1]}, TypeError, r"model_kwargs must be a table .* got \[1\]"),
        ({"data": 3}, TypeError, "data must be a path, got int 3"),
        ({"data": ""}, ValueError, "data must be a path, got an empty text"),
        ({"out": None}, TypeError, "out must be a path, got NoneType"),
        ({"val_fraction": 0}, ValueError, "val_fraction must be above 0 and at most 0.9, got 0"),
        ({"val_fraction": 1.0}, ValueError, "val_fraction must be above 0 and at most 0.9"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 2.5}, TypeError, "epochs must be an integer, got float 2.5"),
        ({"epochs": True}, TypeError, "epochs must be an integer, got bool True"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2, got 1"),
        ({"batch_size": "64"}, TypeError, "batch_size must be an integer, got str '64'"),
        ({"optimizer": "adamv"}, ValueError, "optimizer must be one of .* did you mean 'adam"),
        ({"lr": 0}, ValueError, "lr must be above 0, got 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"lr": float("inf")}, ValueError, "lr must be finite, got inf"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got str 'fast'"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
        ({"betas": [0.9]}, TypeError, r"betas must be two numbers, got \[0.9\]"),
        ({"betas": [0.9, 1.0]}, ValueError, r"betas\[1\] must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": -1e-3}, ValueError, "weight_decay must be at least 0, got -0.001"),
        (
            {"weight_decay": 1e308},
            ValueError,
            r"weight_decay must be .* at most 3.40282e\+38, got 1e\+308",
        ),
        ({"schedule": "cosin"}, ValueError, "schedule must be one of .* did you mean 'cosine'"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be at least 0, got -1"),
        ({"warmup_epochs": 40}, ValueError, r"warmup_epochs must be below epochs \(40\), got 40"),
        ({"step_epochs": 0}, ValueError, "step_epochs must be at least 1, got 0"),
        ({"step_gamma": 1.5}, ValueError, "step_gamma must be above 0 and at most 1, got 1.5"),
        ({"label_smoothing": 1}, ValueError, r"label_smoothing must lie in \[0, 1\), got 1"),
        ({"clip": -1}, ValueError, "clip must be at least 0, got -1"),
        ({"amp": "fp32"}, ValueError, "amp must be one of 'off', 'bf16', 'fp16', got 'fp32'"),
        ({"amp": "fp16", "device": "cpu"}, ValueError, "amp='fp16' needs a GPU"),
        ({"ema": 1.0}, ValueError, r"ema must lie in \[0, 1\), got 1.0"),
        ({"early_stopping": -1}, ValueError, "early_stopping must be at least 0, got -1"),
        ({"augment": "rotation"}, ValueError, "augment must be one of .* did you mean 'rotate'"),
        ({"supersample": 0}, ValueError, "supersample must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, ValueError, "seed must be at most 9223372036854775807, got 92233"),
        ({"recalibrate": 10**30}, ValueError, "recalibrate must be at most 9223372036854775807"),
        ({"deterministic": 1}, TypeError, "deterministic must be True or False, got int 1"),
        ({"compile": "yes"}, TypeError, "compile must be True or False, got str 'yes'"),
        ({"cuda_graph": "on"}, TypeError, "cuda_graph must be True or False, got str 'on'"),
        ({"device": "gpu"}, ValueError, "device must be one of 'auto', 'cpu', 'cuda'"),
        ({"device": "cuda:x"}, ValueError, "device must be one of .* got 'cuda:x'"),
        ({"device": 0}, ValueError, "device must be one of .* got 0"),
    ],
)
def test_wrong_settings_are_refused(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**values)


def test_data_is_needed() -> None:
    with pytest.raises(ValueError, match="the setting 'data' is missing"):
        TrainConfig.from_dict({"epochs": 3})


def test_recipes() -> None:
    poster = make(recipe="poster", epochs=5)
    assert (poster.optimizer, poster.lr, poster.betas) == ("adam", 1e-4, (0.9, 0.999))
    assert (poster.weight_decay, poster.schedule, poster.epochs) == (1e-7, "constant", 5)
    assert (poster.augment, poster.supersample, poster.label_smoothing) == ("rotate", 3, 0)
    assert make(recipe="ours") == make()
    assert (make().lr, make().schedule, make().epochs) == (1e-3, "onecycle", 40)


def test_toml_gives_back_what_was_saved(tmp_path: Path) -> None:
    given = make(model_kwargs={"fields": 3, "group": "D4"}, betas=[0.8, 0.99], warmup_epochs=2)
    assert TrainConfig.from_file(given.save(tmp_path / "a" / "run.toml")) == given
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.toml"]


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('data = "~/a.npz"\nout = "~/zz"\ninit = "eqcvt-deeplense"\n')
    read = TrainConfig.from_file(tmp_path / "run.toml")
    assert (read.data, read.out) == (f"{tmp_path}/a.npz", f"{tmp_path}/zz")
    assert read.init == "eqcvt-deeplense"


def test_numpy_s_numbers_are_numbers(tmp_path: Path) -> None:
    given = make(model_kwargs={"fields": np.int64(3), "dropout": np.float32(0.5)}, lr=np.float64(1))
    assert TrainConfig.from_file(given.save(tmp_path / "run.toml")) == given
    with pytest.raises(TypeError, match=r"model_kwargs\['fields'\] must be made of .* got ndarray"):
        make(model_kwargs={"fields": np.ones(2)})


def test_yaml_reads_exponents_and_off(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: images.npz\nlr: 1e-4\namp: off\nrecipe: poster\nepochs: 3\n")
    read = TrainConfig.from_file(path)
    assert (read.lr, read.amp, read.epochs, read.schedule) == (1e-4, "off", 3, "constant")


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.json", "{}", ValueError, r"a .toml, .yaml or .yml file, got .*a.json"),
        ("a.toml", None, FileNotFoundError, r"no configuration file .*a.toml"),
        ("a.toml", "lr = = 1", ValueError, "a.toml is not valid TOML"),
        ("a.yaml", "a: [1", ValueError, "a.yaml is not valid YAML"),
        ("a.yaml", "- 1", ValueError, "a.yaml must hold named settings, got a list"),
        ("a.toml", "data = 'x'\nlrr = 1", ValueError, "a.toml: unknown .*did you mean 'lr'"),
        ("a.toml", "data = 'x'\nlr = 'x'", ValueError, "a.toml: lr must be a number"),
        ("a.yaml", "lr: 2024-13-01", ValueError, "a.yaml is not valid YAML: month must be in"),
    ],
)
def test_wrong_files_are_named(
    tmp_path: Path, name: str, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        TrainConfig.from_file(tmp_path / name)
