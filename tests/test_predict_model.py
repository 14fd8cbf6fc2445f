"""``eqcvt.predict.predict`` as Python calls it: the model's mode, the paths, the names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eqcvt
from eqcvt.predict import predict
from tests.train.rings import SIZE, TINY, rings


@pytest.fixture
def model() -> eqcvt.EqCvT:
    torch.manual_seed(0)
    return eqcvt.EqCvT(1, 2, SIZE, dropout=0.5, **TINY)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images in one file."""
    return rings(6).save(tmp_path / "set.npz")


def test_a_model_in_training_predicts_as_in_evaluation_and_stays_as_it_is(
    model: eqcvt.EqCvT, images: Path
) -> None:
    expected = list(predict(model.eval(), [images], batch_size=2))
    model.train()
    model.lift.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    predictions = []
    for prediction in predict(model, [images], batch_size=2):
        assert [module.training for module in model.modules()] == modes  # while it waits
        predictions.append(prediction)
    assert predictions == expected
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [str, Path])
def test_one_path_is_enough(model: eqcvt.EqCvT, images: Path, kind: type) -> None:
    names = [prediction.name for prediction in predict(model, kind(images))]
    assert names == [f"{images}[{i}]" for i in range(6)]


def test_a_loaded_model_names_its_classes(model: eqcvt.EqCvT, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model.save_pretrained(run / "best")
    (run / "classes.json").write_text('["small", "large"]')
    for loaded in (
        eqcvt.load_model(run / "best"),
        eqcvt.EqCvT.from_pretrained(run / "best"),
        eqcvt.fast.accelerate(eqcvt.load_model(run / "best")),
    ):
        assert loaded.classes == ("small", "large")
        loaded.save_pretrained(tmp_path / "saved")
        assert eqcvt.load_model(tmp_path / "saved").classes == ("small", "large")
        assert list(next(predict(loaded, images)).probabilities) == ["small", "large"]
    assert list(next(predict(loaded, images, classes="ab")).probabilities) == ["a", "b"]
    loaded.reset_classifier(2)
    assert list(next(predict(loaded, images)).probabilities) == ["class_0", "class_1"]
    model.save_pretrained(run / "other")  # not the run's
    assert eqcvt.load_model(run / "other").classes is model.classes is None
    (run / "classes.json").write_text('["small", "large", "huge"]')
    assert eqcvt.load_model(run / "best").classes is None
    for name in eqcvt.list_pretrained():
        assert eqcvt.load_pretrained(name).classes == ("no_sub", "sub")


def test_arrays_are_sent_to_the_model_itself(model: eqcvt.EqCvT) -> None:
    for array in (np.ones((2, 9, 9)), torch.ones(2, 9, 9)):
        with pytest.raises(TypeError, match=f"got {type(array).__name__}: a model takes arrays it"):
            predict(model, array)  # type: ignore[arg-type]


def test_an_array_is_told_what_the_same_file_is(model: eqcvt.EqCvT, images: Path) -> None:
    array = rings(6).images.astype(">f4")
    np.savez(images, images=array)
    with torch.no_grad():
        told = model.eval()(eqcvt.data.to_unit(array)).softmax(dim=1)
    for prediction, row in zip(predict(model, images), told, strict=True):
        assert list(prediction.probabilities.values()) == pytest.approx(row.tolist())


@pytest.mark.parametrize("given", [torch.nn.DataParallel, lambda _: torch.nn.Linear(1, 1), str])
def test_what_is_no_model_of_ours_is_refused(
    model: eqcvt.EqCvT, images: Path, given: Callable[[object], eqcvt.EqCvT]
) -> None:
    with pytest.raises(TypeError, match=r"EqCvT or CvT, got \w+: .* DataParallel holds it as .mod"):
        predict(given(model), images)


def test_a_compiled_model_predicts(model: eqcvt.EqCvT, images: Path) -> None:
    compiled = torch.compile(model, backend="eager")
    assert list(predict(compiled, images)) == list(predict(model, images))  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_names_that_are_not_the_model_s_are_refused(
    model: eqcvt.EqCvT, images: Path, names: list[str]
) -> None:
    with pytest.raises(ValueError, match=rf"has 2 classes, got {len(names)} names: \['a'"):
        predict(model, [images], classes=names)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match=r"no classes \(num_classes=0\): reset_classifier gives"):
        predict(model, [images])


def test_names_that_are_the_same_are_refused(model: eqcvt.EqCvT, images: Path) -> None:
    with pytest.raises(ValueError, match=r"must differ, got \['x', 'x'\]"):
        predict(model, images, classes=["x", "x"])


def test_what_is_given_is_checked_at_once(model: eqcvt.EqCvT, images: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"batch_size": 0},
        {"readers": 0},
        {"amp": "fp8"},
        {"fit": "cut"},
    ]
    for given in wrong:
        with pytest.raises(ValueError, match=next(iter(given))):
            predict(model, images, **given)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        predict(model, images / "none")
