"""Going on from a trained model: which files a name means, and what of the weights is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eqcvt
from eqcvt.data import load
from eqcvt.train import TrainConfig, train
from eqcvt.train.trained import class_names, model_folder, seen_images, start_from
from tests.train.rings import TINY, config

CLASSES = ("no_sub", "sub")


def _model(seed: int = 0, **changes: Any) -> eqcvt.EqCvT:
    torch.manual_seed(seed)
    values = {"in_channels": 1, "num_classes": 2, "image_size": 33, **TINY}
    return eqcvt.EqCvT(**{**values, **changes})


def _saved(folder: Path, classes: str | None = '["no_sub", "sub"]', **changes: Any) -> eqcvt.EqCvT:
    model = _model(1, **changes)
    model.save_pretrained(folder)
    if classes is not None:
        (folder / "classes.json").write_text(classes)
    return model


def _same(one: eqcvt.EqCvT, other: eqcvt.EqCvT) -> dict[str, bool]:
    ours, theirs = one.state_dict(), other.state_dict()
    return {n: ours[n].shape == theirs[n].shape and torch.equal(ours[n], theirs[n]) for n in ours}


@pytest.mark.parametrize("classes", ['["no_sub", "sub"]', None])
def test_all_weights_are_taken_where_the_classes_are_the_same(
    tmp_path: Path, classes: str | None
) -> None:
    trained, model = _saved(tmp_path / "m", classes), _model(image_size=41, dropout=0.3)
    assert not all(_same(model, trained).values())
    assert start_from(model, str(tmp_path / "m"), CLASSES) == f"starts from {tmp_path / 'm'}"
    assert all(_same(model, trained).values())


@pytest.mark.parametrize("classes", [("a", "b"), ("no_sub", "sub", "vortex")])
def test_other_classes_get_a_new_classifier(tmp_path: Path, classes: tuple[str, ...]) -> None:
    trained, model = _saved(tmp_path / "m"), _model(num_classes=len(classes))
    before = model.get_classifier().weight.clone()
    said = start_from(model, str(tmp_path / "m"), classes)
    assert said.endswith("the classifier is new, as its classes were no_sub, sub")
    assert torch.equal(model.get_classifier().weight, before)
    kept = {n: s for n, s in _same(model, trained).items() if "classifier" not in n}
    assert all(kept.values())


def test_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    _saved(tmp_path / "m")
    with pytest.raises(ValueError, match=r"fields is 2 there and 3 here; group is 'C4' there and"):
        start_from(_model(fields=3, group="D4"), str(tmp_path / "m"), CLASSES)
    with pytest.raises(ValueError, match="in_channels is 1 there and 3 here"):
        start_from(_model(in_channels=3), str(tmp_path / "m"), CLASSES)
    with pytest.raises(ValueError, match="architecture is 'EqCvT' there and 'CvT' here"):
        start_from(eqcvt.CvT(in_channels=1), str(tmp_path / "m"), CLASSES)


def test_a_run_goes_on_from_another_run(tmp_path: Path) -> None:
    first = train(config(tmp_path, epochs=6, batch_size=4, lr=0.01), quiet=True)
    steps = {"lr": 1e-9, "epochs": 1, "recalibrate": 0}
    still = config(tmp_path, out=tmp_path / "on", init=str(first.folder), **steps)
    assert train(still, quiet=True).best_accuracy == first.best_accuracy
    assert TrainConfig.from_file(tmp_path / "on" / "config.toml") == still
    # It is the checkpoint that a resumed run goes on from; the first run may be gone.
    (first.folder / "best").rename(tmp_path / "elsewhere")
    assert train(still, resume=True, quiet=True).history


def test_what_a_run_was_trained_on_is_not_known_after_a_start_from_who_knows_what(
    tmp_path: Path,
) -> None:
    run = config(tmp_path, epochs=1)
    best = train(run, quiet=True).folder / "best"
    seen, data = seen_images(best), load(run.data)
    assert seen is not None
    assert sorted(seen) == sorted(data.hashes)
    _saved(tmp_path / "m")
    train(replace(run, init=str(tmp_path / "m")), overwrite=True, quiet=True)
    assert seen_images(best) is None


def test_a_run_from_a_shipped_model_knows_the_images_of_both(tmp_path: Path) -> None:
    run = config(tmp_path, epochs=1, init="eqcvt-deeplense", model_kwargs={})
    seen = seen_images(train(run, quiet=True).folder / "last")
    before = seen_images(eqcvt.pretrained_folder("eqcvt-deeplense"))
    assert before is not None
    assert len(before) == 9000
    assert seen is not None
    assert set(seen) == {*before, *load(run.data).hashes}


def test_names(tmp_path: Path) -> None:
    name = eqcvt.list_pretrained()[0]
    assert model_folder(Path(name)) == eqcvt.pretrained_folder(name)
    assert class_names(model_folder(Path(name))) == CLASSES
    with pytest.raises(ValueError, match=r"did you mean 'eqcvt-deeplense'"):
        model_folder(Path("eqcvt-deeplens"))
    with pytest.raises(FileNotFoundError, match="give a run folder or a checkpoint folder"):
        model_folder(tmp_path / "no" / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no model"):
        model_folder(tmp_path / "empty")
    assert class_names(tmp_path / "empty") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not valid JSON: Expecting value"),
        (b"\xff", "is not valid JSON: .*codec"),
        ('{"a": 1}', "must hold a list of class names, got {'a': 1}"),
    ],
)
def test_a_broken_file_of_classes_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "classes.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/classes.json {message}"):
        class_names(tmp_path / "best")


def test_a_shipped_model_takes_images_of_another_size() -> None:
    model = eqcvt.create_model("eqcvt_c4", in_channels=1, image_size=33)
    assert start_from(model, "eqcvt-deeplense", CLASSES) == "starts from eqcvt-deeplense"
    trained = eqcvt.load_pretrained("eqcvt-deeplense")
    assert torch.equal(model.head.classifier.weight, trained.head.classifier.weight)
