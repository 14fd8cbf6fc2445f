"""``eqcvt.predict.predict`` as Python calls it: the model's mode, the paths, the names."""

from __future__ import annotations

from pathlib import Path

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
            next(predict(model, array))  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_names_that_are_not_the_model_s_are_refused(
    model: eqcvt.EqCvT, images: Path, names: list[str]
) -> None:
    with pytest.raises(ValueError, match=rf"has 2 classes, got {len(names)} names: \['a'"):
        next(predict(model, [images], classes=names))
    model.reset_classifier(0)
    with pytest.raises(ValueError, match=r"no classes \(num_classes=0\): reset_classifier gives"):
        next(predict(model, [images]))
