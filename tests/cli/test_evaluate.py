"""``eqcvt evaluate``: what it measures, of which images, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eqcvt
from eqcvt.data import LensingImages, load
from eqcvt.train.trained import seen_images
from tests.cli.conftest import SIZE, TRAIN, invoke


def saved(data: LensingImages, path: Path) -> Path:
    """Write a set as other programs would."""
    np.savez(path, images=data.images, labels=data.labels, classes=np.array(data.classes))
    return path


def test_evaluation_of_two_models(images: Path, run_folder: Path, tmp_path: Path) -> None:
    other = eqcvt.CvT(in_channels=1, num_classes=2, image_size=SIZE)
    other.save_pretrained(tmp_path / "cvt")
    out = tmp_path / "results"
    arguments = ("--data", images, "--compare", tmp_path / "cvt", "--out", out, "--angles", 8)
    result = invoke("evaluate", run_folder, *arguments, "--samples", 4)
    text = result.output
    assert "EqCvT C4 front" in text
    assert "CvT" in text
    assert f"wrote {out}" in text
    assert "EqCvT C4 front was trained on 36 of the 48 images of" in result.stderr
    assert "it is not known whether CvT was trained on images of" in result.stderr
    found = json.loads((out / "metrics.json").read_text())
    assert set(found["models"]) == {"EqCvT C4 front", "CvT"}
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["trained_on"] == {"EqCvT C4 front": 36, "CvT": None}
    for measured in found["models"].values():
        assert measured["n"] == 12
        assert sum(map(sum, measured["confusion"])) == 12
        assert len(measured["rotation"]["angles"]) == 8
    stems = {"roc", "reliability", "logits_vs_angle"} | {
        f"{what}_{name}"
        for what in ("confusion", "samples", "attention")
        for name in ("eqcvt_c4_front", "cvt")
    }
    assert {path.stem for path in out.glob("*.png")} == stems
    (out / "samples_night.png").touch()
    invoke("evaluate", tmp_path / "cvt", "--data", images, "--out", out, "--no-pictures")
    assert [path.name for path in out.glob("*.png")] == ["samples_night.png"]


def test_evaluation_takes_the_held_out_images_of_the_run(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    invoke("evaluate", run_folder, "--last", "--out", out, "--no-pictures")
    found = json.loads((out / "metrics.json").read_text())
    result = found["models"]["EqCvT C4 front"]
    history = json.loads((run_folder / "metrics.json").read_text())
    assert result["n"] == 12
    assert result["accuracy"] == pytest.approx(history[-1]["val_accuracy"])
    assert found["checkpoints"]["EqCvT C4 front"].endswith("last")
    assert not list(out.glob("*.png"))
    assert found["trained_on"] == {"EqCvT C4 front": 0}


def test_images_that_any_model_was_trained_on_are_left_out(
    images: Path, run_folder: Path, tmp_path: Path
) -> None:
    more, new, on = (tmp_path / name for name in ("more.npz", "new.npz", "on"))
    invoke("simulate", more, "--count", 50, "--size", SIZE, "--seed", 3, "--workers", 1)
    invoke("simulate", new, "--count", 24, "--size", SIZE, "--seed", 4, "--workers", 1)
    invoke(*TRAIN, "--epochs", 1, "--init", run_folder, "--data", new, "--out", on)
    for model, compared, counts in (
        (run_folder, (), [36]),
        (on / "last", (), [36]),  # by the run that it started from
        (on, ("--compare", run_folder), [36, 36]),
    ):
        given = ("--data", more, *compared, "--out", tmp_path / "out", "--no-pictures")
        invoke("evaluate", model, *given)
        found = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert list(found["trained_on"].values()) == counts
        assert {result["n"] for result in found["models"].values()} == {14}
    data = load(images)
    seen = np.isin(data.hashes, seen_images(run_folder / "best"))
    given = ("--data", saved(data.subset(seen), tmp_path / "seen.npz"), "--no-pictures")
    assert "on all 36 images" in invoke("evaluate", run_folder, *given, code=2).stderr


def test_a_run_that_does_not_say_what_it_was_trained_on_is_evaluated(
    images: Path, run_folder: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(run_folder, tmp_path / "old")
    (old / "trained_on.safetensors").unlink()
    out = ("--no-pictures", "--out", tmp_path / "out")
    assert "not known" not in invoke("evaluate", old, *out).stderr
    text = invoke("evaluate", old, "--data", images, *out).stderr
    assert "it is not known whether EqCvT C4 front was trained on images of" in text
    (old / "trained_on.safetensors").write_bytes(b"12345678")
    text = invoke("evaluate", old, "--data", images, *out, code=2).stderr
    assert "trained_on.safetensors is not a whole safetensors file" in text


def test_a_run_finds_its_images_from_any_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(images)
    data.subset(range(36)).save(tmp_path / "set.npz")
    data.subset(range(36, 48)).save(tmp_path / "val.npz")
    monkeypatch.chdir(tmp_path)
    given = (*TRAIN, "--data", "set.npz", "--val-data", "val.npz", "--epochs", 1)
    invoke(*given, "--out", "run")
    invoke("train", "--resume", "--out", "run", "--data", "set.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    invoke("evaluate", "../run", "--no-pictures")
    found = json.loads(Path("../run/evaluation/metrics.json").read_text())
    assert found["data"] == f"{tmp_path}/val.npz, held out in training"


def test_classes_in_another_order_are_refused_and_other_names_are_said(
    images: Path, run_folder: Path, tmp_path: Path
) -> None:
    data = load(images)
    turned = replace(data, labels=1 - data.labels, classes=data.classes[::-1], parameters={})
    given = ("--data", saved(turned, tmp_path / "turned.npz"), "--no-pictures")
    message = invoke("evaluate", run_folder, *given, code=2).stderr
    assert "has the classes no_sub, sub in this order, the data have sub, no_sub" in message
    renamed = replace(data, classes=("cdm", "[/red]"), parameters={})
    given = ("--data", saved(renamed, tmp_path / "renamed.npz"), "--no-pictures")
    text = invoke("evaluate", run_folder, *given, "--out", tmp_path / "out").output
    assert "was trained on the classes no_sub, sub; they are taken for cdm, [/red]" in text
    assert "as [/red]" in text


def test_results_are_written_where_they_cannot_be_printed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed() -> None:
        raise BrokenPipeError

    monkeypatch.setattr("eqcvt.cli.evaluate.console", closed)
    out = tmp_path / "results"
    invoke("evaluate", run_folder, "--out", out, "--angles", 4, "--samples", 2, code=1)
    assert json.loads((out / "metrics.json").read_text())["models"]
    assert (out / "reliability.png").is_file()


def test_a_split_without_data_is_refused(run_folder: Path) -> None:
    message = invoke("evaluate", run_folder, "--split", "test", code=2).stderr
    assert "--split test says which part of --data PATH" in message


def test_images_of_a_run_that_are_gone_or_others_are_not_taken_for_held_out(
    images: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "set.npz", tmp_path / "run"
    data.write_bytes(images.read_bytes())
    invoke(*TRAIN, "--data", data, "--out", run, "--epochs", 1)
    data.unlink()
    message = invoke("evaluate", run, "--no-pictures", code=2).stderr
    assert f"{data}, which {run / 'config.toml'} names" in message
    invoke("simulate", data, "--count", 50, "--size", SIZE, "--seed", 3, "--workers", 1)
    message = invoke("evaluate", run, "--no-pictures", code=2).stderr
    assert f"{data} has other images than {run} was trained and validated on" in message
