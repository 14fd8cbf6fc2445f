"""The command line from simulation to export, in temporary folders."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eqcvt
from eqcvt.convert import to_escnn
from eqcvt.data import load
from eqcvt.train import TrainConfig
from tests.cli.conftest import SIZE, TRAIN, invoke


def test_version_and_help() -> None:
    assert invoke("--version").output == f"eqcvt {eqcvt.__version__}\n"
    text = invoke("--help").output
    for command in ("simulate", "train", "evaluate", "predict", "export", "convert", "doctor"):
        assert command in text
    text = " ".join(invoke("train", "--help").output.replace("│", " ").split())
    for default in ("adam)", "runs/eqcvt)", "0)", "0.0)", "0.9 0.999)"):
        assert f"(default: {default}" in text


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "eqcvt", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"eqcvt {eqcvt.__version__}\n"


def test_simulated_set(images: Path) -> None:
    data = load(images)
    assert len(data) == 48
    assert data.size == (SIZE, SIZE)
    assert data.seed == 3


def test_shards_join_to_the_set_and_previews_are_drawn(images: Path, tmp_path: Path) -> None:
    for i in range(2):
        arguments = ("--count", 48, "--size", SIZE, "--seed", 3, "--workers", 1)
        invoke("simulate", tmp_path / "set", *arguments, "--shard", f"{i}/2", "--preview")
    assert np.array_equal(load(tmp_path / "set").images, load(images).images)
    sheets = sorted((tmp_path / "set").glob("*.png"))
    assert len(sheets) == 2
    assert np.asarray(Image.open(sheets[0]).convert("L")).std() > 5
    assert min(Image.open(sheets[0]).size) > 100


def test_simulation_settings_are_overridden(tmp_path: Path) -> None:
    out = tmp_path / "set.npz"
    changes = ("--set", "halo.shear=0:0.05", "--set", "camera.noise=false")
    arguments = ("--preset", "control", "--count", 2, "--size", 17, "--workers", 1)
    invoke("simulate", out, *arguments, "--dtype", "float32", *changes)
    data = load(out)
    assert data.config["halo"]["shear"] == [0, 0.05]
    assert data.config["camera"]["noise"] is False
    assert data.config["name"] == "control"
    assert data.images.dtype == np.float32


def test_run_folder(run_folder: Path) -> None:
    config = TrainConfig.from_file(run_folder / "config.toml")
    assert (config.epochs, config.batch_size) == (2, 16)
    assert len(json.loads((run_folder / "metrics.json").read_text())) == 2
    assert json.loads((run_folder / "classes.json").read_text()) == ["no_sub", "sub"]
    model = eqcvt.load_model(run_folder / "best")
    assert (model.config["in_channels"], model.config["image_size"]) == (1, SIZE)
    assert Image.open(run_folder / "curves.png").width > 100


def test_resumed_run_equals_an_unbroken_one(images: Path, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke(*TRAIN, "--data", images, "--out", out, "--epochs", 1)
    invoke("train", "--config", out / "config.toml", "--epochs", 2, "--resume")
    unbroken = eqcvt.load_model(run_folder / "last").state_dict()
    resumed = eqcvt.load_model(out / "last").state_dict()
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())


def test_a_run_goes_on_with_its_own_settings(
    images: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "first"
    invoke(*TRAIN, "--data", images, "--out", out, "--epochs", 1)
    moved = out.rename(tmp_path / "moved")
    invoke("train", "--out", moved, "--epochs", 2, "--resume")
    assert not out.exists()
    unbroken = eqcvt.load_model(run_folder / "last").state_dict()
    resumed = eqcvt.load_model(moved / "last").state_dict()
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())
    (tmp_path / "runs").mkdir()
    moved.rename(tmp_path / "runs" / "eqcvt")
    monkeypatch.chdir(tmp_path)
    assert "epoch 2/2" not in invoke("train", "--resume").output


def test_flags_override_the_file_and_model_arguments_reach_the_model(
    images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "small.yaml"
    text = "epochs: 9\nbatch_size: 12\nmodel: cvt\nmodel_kwargs: {dropout: 0.2}\n"
    file.write_text(f"data: {images}\naugment: none\n{text}")
    out = tmp_path / "run"
    arguments = ("--config", file, "--epochs", 1, "--model", "eqcvt_c4", "--out", out)
    invoke("train", *arguments, "--model-arg", "fields=3", "--model-arg", "invariance=exact")
    config = TrainConfig.from_file(out / "config.toml")
    assert (config.epochs, config.batch_size, config.model) == (1, 12, "eqcvt_c4")
    model = eqcvt.load_model(out / "last")
    chosen = {key: model.config[key] for key in ("fields", "invariance", "dropout")}
    assert chosen == {"fields": 3, "invariance": "exact", "dropout": 0.2}


def test_prediction_of_files_and_folders(images: Path, run_folder: Path, tmp_path: Path) -> None:
    data = load(images)
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    Image.fromarray(data.images[0]).save(folder / "grey.png")
    Image.fromarray(np.stack([data.images[1]] * 3, -1)).save(folder / "colour.png")
    np.save(folder / "array.npy", data.images[2])
    np.savez(tmp_path / "several.npz", images=data.images[3:5])
    out = tmp_path / "table.csv"
    paths = (folder.parent, tmp_path / "several.npz")
    text = invoke("predict", run_folder, *paths, "--out", out, "--batch-size", 2).output
    assert "grey.png" in text
    with out.open() as file:
        rows = list(csv.DictReader(file))
    order = [2, 1, 0, 3, 4]
    model = eqcvt.load_model(run_folder / "best")
    raw = torch.from_numpy(data.images[order][:, None] / np.float32(255))
    with torch.no_grad():
        expected = model(raw).softmax(dim=1)
    assert [Path(row["file"]).name for row in rows] == [
        "array.npy", "colour.png", "grey.png", "several.npz[0]", "several.npz[1]",
    ]  # fmt: skip
    for row, (no_sub, sub) in zip(rows, expected.tolist(), strict=True):
        assert float(row["no_sub"]) == pytest.approx(no_sub, abs=1e-5)
        assert float(row["sub"]) == pytest.approx(sub, abs=1e-5)
        assert row["class"] == ("sub" if sub > no_sub else "no_sub")


def test_prediction_fits_images_of_another_size(run_folder: Path, tmp_path: Path) -> None:
    large, small = tmp_path / "large.npy", tmp_path / "small.npy"
    picture = np.random.default_rng(0).integers(0, 255, (41, 40), dtype=np.uint8)
    np.save(large, picture)
    np.save(small, picture[4:37, 3:36])
    found = {}
    for name, path in (("cropped", large), ("same", small)):
        out = tmp_path / f"{name}.json"
        result = invoke("predict", run_folder, path, "--out", out, "--rows", 0)
        found[name] = json.loads(out.read_text())[0]["probabilities"]
        warned = "warning: " in result.stderr and "centre-cropped from 41x40" in result.stderr
        assert warned == (name == "cropped")
    assert found["cropped"] == found["same"]
    warning = invoke("predict", run_folder, large, "--fit", "resize").stderr
    assert "resized from 41x40: its pixel scale is not the training images'" in warning
    np.save(small, picture[:20, :20])
    warning = invoke("predict", run_folder, small, "--fit", "pad").stderr
    assert "padded from 20x20" in warning


def test_export_through_the_command_line(run_folder: Path, tmp_path: Path) -> None:
    files = (tmp_path / "model.pt2", tmp_path / "model.onnx")
    text = invoke("export", run_folder, *files).output
    assert text.count("largest difference from the model") == 2
    assert all(path.stat().st_size > 1000 for path in files)
    files[0].unlink()
    message = invoke("export", run_folder, *files, code=2).stderr
    assert f"{files[1]} exists: give another path, or --overwrite to replace it" in message
    assert not files[0].exists()
    files[1].write_text("old")
    invoke("export", run_folder, files[1], "--overwrite")
    assert files[1].stat().st_size > 1000


def test_conversion_of_published_weights(tmp_path: Path) -> None:
    model = eqcvt.CvT(in_channels=1, num_classes=2, image_size=SIZE).eval()
    torch.save(to_escnn(model).state_dict(), tmp_path / "published.pt")
    out = tmp_path / "cvt"
    arguments = ("convert", tmp_path / "published.pt", out, "--image-size", SIZE)
    assert invoke(*arguments).output.endswith(": CvT, 463,106 parameters\n")
    x = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(eqcvt.load_model(out)(x), model(x))
    assert "exists: give another path, or --overwrite" in invoke(*arguments, code=2).stderr
    invoke(*arguments, "--overwrite")
    refused = invoke(*arguments, "--overwrite", "--kv-stride", 0, code=2).stderr
    assert "kv_stride must be at least 1, got 0" in refused


@pytest.mark.needs("escnn")
def test_conversion_of_published_steerable_weights(tmp_path: Path) -> None:
    model = eqcvt.EqCvT(in_channels=1, image_size=SIZE).eval()
    torch.save(to_escnn(model).eval().state_dict(), tmp_path / "published.pt")
    text = invoke("convert", tmp_path / "published.pt", tmp_path / "out").output
    assert "EqCvT, 64,810 parameters, relative residual of the steerable filters" in text
    assert float(text.split()[-1]) < 1e-5
    x = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        logits = eqcvt.load_model(tmp_path / "out")(x)
        assert (logits - model(x)).abs().max() < 1e-5


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> dict[str, object]:
        warnings.warn("it is late,\n  go home", stacklevel=2)
        return {}

    monkeypatch.setattr("eqcvt.doctor.report", report)
    assert invoke("doctor", "--json").stderr == "warning: it is late, go home\n"
    monkeypatch.setenv("RANK", "1")  # torchrun's first process has said it
    assert invoke("doctor", "--json").stderr == ""


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQCVT_EXAMPLE", "1")
    found = json.loads(invoke("doctor", "--json").output)
    assert found["versions"]["eqcvt"] == eqcvt.__version__
    assert found["versions"]["torch"]
    assert found["devices"][0]["device"] == "cpu"
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["variables"]["EQCVT_EXAMPLE"] == "1"
    chosen = [(row["op"], row["device"]) for row in found["backends"] if row["chosen"]]
    ops = {row["op"] for row in found["backends"]}
    assert {op for op, device in chosen if device == "cpu"} == ops
    assert len(chosen) == len(set(chosen))
    assert all(row["reason"] for row in found["backends"] if not row["available"])
    text = invoke("doctor").output
    assert "reference" in text
    assert "native extension" in text
    with eqcvt.use_backend("reference"):
        text = invoke("doctor").output
    assert "asked for" in text
    assert "the first that can" not in text


def test_models_are_listed_with_their_parameters() -> None:
    rows = {row["name"]: row for row in json.loads(invoke("models", "--json").output)}
    assert set(rows) == set(eqcvt.list_models())
    assert rows["eqcvt_c4"]["parameters"] == 64_810
    assert "64,810" in invoke("models").output
    assert "65,170" in invoke("models", "--channels", 3).output
