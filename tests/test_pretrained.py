"""Trained models that come with the package: found by name, in Python and on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import eqcvt
from eqcvt import fast
from eqcvt.cli.checkpoints import help_text
from eqcvt.models import _base, registry
from eqcvt.train.trained import SEEN
from tests.cli.conftest import invoke
from tests.train.rings import SIZE, TINY, rings

FILES = {"model.safetensors", "config.json", "classes.json", "card.json"}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packaged models: two untrained ones, in the place of the package's own."""
    folder = tmp_path / "weights"
    for architecture in ("eqcvt_c4", "cvt"):
        extra = {"fields": 2} if architecture == "eqcvt_c4" else {}
        kwargs = {k: v for k, v in TINY.items() if k != "fields"}
        model = eqcvt.create_model(architecture, in_channels=1, image_size=SIZE, **kwargs, **extra)
        place = folder / f"{architecture.removesuffix('_c4')}-rings"
        model.save_pretrained(place)
        (place / "classes.json").write_text('["small", "large"]\n')
        (place / "card.json").write_text('{"name": "rings"}\n')
    monkeypatch.setattr(registry, "PRETRAINED", folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without models."""
    monkeypatch.setattr(registry, "PRETRAINED", tmp_path / "weights")


def test_models_are_loaded_by_name(shipped: Path) -> None:
    assert eqcvt.list_pretrained() == ["cvt-rings", "eqcvt-rings"]
    model = eqcvt.load_pretrained("eqcvt-rings")
    assert type(model) is eqcvt.EqCvT
    assert not model.training
    folder = eqcvt.pretrained_folder("eqcvt-rings")
    assert {path.name for path in folder.iterdir()} == FILES
    quick = fast.EqCvT.from_pretrained(folder)
    x = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(quick(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [eqcvt.EqCvT, fast.EqCvT])
def test_a_class_takes_a_name_without_asking_the_hub(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, cls: type[eqcvt.EqCvT]
) -> None:
    monkeypatch.setattr(_base, "hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    model = cls.from_pretrained("eqcvt-rings")
    assert type(model) is cls
    for name, value in eqcvt.load_pretrained("eqcvt-rings").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    with pytest.raises(ValueError, match="holds the architecture CvT, not EqCvT"):
        cls.from_pretrained("cvt-rings")
    with pytest.raises(
        FileNotFoundError, match=r"no folder eqcvt-ring .*are cvt-rings, eqcvt-rings"
    ):
        cls.from_pretrained("eqcvt-ring")
    eqcvt.EqCvT(2, image_size=SIZE).save_pretrained("eqcvt-rings")
    assert cls.from_pretrained("eqcvt-rings").config["in_channels"] == 2


def test_a_wrong_name_is_told_the_nearest(shipped: Path) -> None:
    with pytest.raises(ValueError, match=r"'cvt-rings', 'eqcvt-rings', .*mean 'eqcvt-rings'\?"):
        eqcvt.load_pretrained("eqcvt_rings")


def test_a_package_without_models_says_so(nothing: None) -> None:
    assert eqcvt.list_pretrained() == []
    message = "no trained model 'eqcvt-deeplense': this installation of eqcvt carries none"
    with pytest.raises(ValueError, match=message):
        eqcvt.load_pretrained("eqcvt-deeplense")
    assert help_text("A folder") == "A folder."
    error = invoke("predict", "eqcvt-deeplense", "x.png", code=2).stderr
    assert "no folder eqcvt-deeplense: give a run folder or a checkpoint folder" in error


def test_commands_take_a_name(shipped: Path) -> None:
    assert help_text("A folder").endswith("comes with eqcvt: cvt-rings, eqcvt-rings.")
    np.save("ring.npy", rings(1).images[0])
    assert "small" in invoke("predict", "eqcvt-rings", "ring.npy").output
    rings(12).save("set.npz")
    text = invoke("evaluate", "eqcvt-rings", "--data", "set.npz", "--no-pictures").output
    assert "wrote eqcvt-rings-evaluation" in text
    results = json.loads(Path("eqcvt-rings-evaluation", "metrics.json").read_text())
    assert results["models"]["EqCvT C4 front"]["n"] == 12
    assert {path.name for path in (shipped / "eqcvt-rings").iterdir()} == FILES


def test_commands_tell_the_nearest_name(shipped: Path) -> None:
    error = invoke("export", "eqcvt-ring", "model.pt2", code=2).stderr
    assert "no folder eqcvt-ring, and a trained model must be one of 'cvt-rings', " in error
    assert "did you mean 'eqcvt-rings'?" in error
    error = invoke("evaluate", "eqcvt-rings", code=2).stderr
    assert "belongs to no run: say which images with --data PATH" in error


def test_a_folder_of_that_name_wins(shipped: Path) -> None:
    np.save("ring.npy", rings(1).images[0])
    model = eqcvt.load_pretrained("cvt-rings")
    model.classes = ("round", "flat")
    model.save_pretrained("eqcvt-rings")
    text = invoke("predict", "eqcvt-rings", "ring.npy").output
    assert "round" in text
    assert "small" not in text


@pytest.mark.parametrize("name", eqcvt.list_pretrained())
def test_what_the_package_carries(name: str) -> None:
    folder = eqcvt.pretrained_folder(name)
    assert {path.name for path in folder.iterdir()} == FILES | {SEEN}
    model = eqcvt.load_pretrained(name)
    classes = json.loads((folder / "classes.json").read_text())
    assert len(classes) == model.num_classes
    card = json.loads((folder / "card.json").read_text())
    assert (card["name"], card["image_seed"], card["test"]["image_seed"]) == (name, 1, 2)
    assert card["command"]
    assert card["versions"]["torch"]
    assert 1 / len(classes) < card["test"]["accuracy"] <= 1
    size, channels = model.config["image_size"], model.config["in_channels"]
    with torch.no_grad():
        assert model(torch.rand(1, channels, size, size)).isfinite().all()


def test_the_images_that_the_package_s_models_were_trained_on_are_left_out(tmp_path: Path) -> None:
    presets = {name.rpartition("-")[2] for name in eqcvt.list_pretrained()}
    for preset in sorted(presets):
        names = [name for name in eqcvt.list_pretrained() if name.endswith(preset)]
        images, out = tmp_path / f"{preset}.npz", ("--out", tmp_path / preset, "--no-pictures")
        simulated = ("--preset", preset, "--count", 12, "--seed", 1, "--workers", 1)
        invoke("simulate", images, *simulated)
        text = invoke("evaluate", *names, "--data", images, *out).stderr
        counts = re.findall(r"was trained on (\d+) of the 12 images of", text)
        assert len(counts) == len(names)
        assert min(map(int, counts)) > 5


def test_load_model_knows_the_names_that_are_shipped() -> None:
    with pytest.raises(FileNotFoundError, match=r"eqcvt\.load_pretrained\('cvt-deeplense'\)"):
        eqcvt.load_model("cvt-deeplense")
