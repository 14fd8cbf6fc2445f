"""Models in folders: saved whole or not at all, loaded again, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import hub_mixin

import eqcvt
from eqcvt import CvT, EqCvT, fast
from eqcvt.nn import Stage

SMALL = Stage(dim=8, depth=1, heads=2, head_dim=4, mlp_ratio=2)


def test_a_model_that_cannot_be_saved_leaves_the_one_before(tmp_path: Path) -> None:
    EqCvT(1, image_size=33).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = EqCvT(1, image_size=33)
    model.config["note"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path)
    model = fast.EqCvT(1, image_size=33)
    model.stages[0].blocks[0].attention.q_conv.norm.eps = 0.1
    changed = r"got stages\.0\.blocks\.0\.attention\.q_conv\.norm\.eps=0\.1, which"
    with pytest.raises(ValueError, match=changed):
        model.save_pretrained(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.stages[0].blocks[0].attention.q_conv.norm.eps = 1e-5
    model.head.norm.momentum = None  # of which only training knows
    model.save_pretrained(tmp_path)


class Smoother(EqCvT):
    """A model whose constructor changes a norm, so that loading does too."""

    def __init__(self, in_channels: int, image_size: int) -> None:
        super().__init__(in_channels, image_size=image_size)
        self.head.norm.eps = 0.1


def test_a_norm_that_a_derived_constructor_changes_is_saved(tmp_path: Path) -> None:
    model, x = Smoother(1, 33).eval(), torch.rand(2, 1, 33, 33)
    model.save_pretrained(tmp_path)
    assert torch.equal(Smoother.from_pretrained(tmp_path)(x), model(x))


def test_saved_models_load_again(tmp_path: Path) -> None:
    x = torch.rand(2, 1, 33, 33)
    for model in (
        EqCvT(1, 3, 33, "D4", invariance="exact", stages=[SMALL]).eval(),
        CvT(1, image_size=33).eval(),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
        for loaded in (type(model).from_pretrained(folder), eqcvt.load_model(folder)):
            assert not loaded.training
            assert loaded.config == model.config
            assert torch.equal(loaded(x), model(x))
        quick = getattr(fast, type(model).__name__).from_pretrained(folder)
        torch.testing.assert_close(quick(x), model(x))


def test_a_folder_never_has_the_class_names_of_an_older_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tmp_path / "classes.json"
    replace, beside = os.replace, []

    def watched(source: Path, target: Path) -> None:
        replace(source, target)
        beside.append((target.name, names.exists()))

    monkeypatch.setattr(os, "replace", watched)
    model = EqCvT(1, image_size=33)
    model.classes = ("no_sub", "sub")
    model.save_pretrained(tmp_path)
    model.reset_classifier(2)
    model.save_pretrained(tmp_path)
    assert beside[-2:] == [("model.safetensors", False), ("config.json", False)]
    assert eqcvt.load_model(tmp_path).classes is model.classes is None


def test_models_of_the_hub_have_their_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--me--lens"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    model = EqCvT(1, image_size=33)
    for names in (None, ("no_sub", "sub")):
        model.classes = names
        model.save_pretrained(repository / "snapshots" / ("0" * 40))
        loaded = EqCvT.from_pretrained("me/lens", cache_dir=tmp_path, local_files_only=True)
        assert loaded.classes == names
    api = MagicMock()
    api.return_value.create_repo.return_value.repo_id = "me/lens"
    monkeypatch.setattr(hub_mixin, "HfApi", api)
    # Names that this model brings, or that it has and the caller does not upload, are not deleted.
    for names, deleted in ((("no_sub", "sub"), None), (None, "classes.json")):
        model.classes = names
        model.push_to_hub("me/lens")
        assert api.return_value.upload_folder.call_args.kwargs["delete_patterns"] == deleted


def test_a_model_is_loaded_to_a_device_or_its_name(tmp_path: Path) -> None:
    EqCvT(1, image_size=33).save_pretrained(tmp_path)
    for device in ("cpu", torch.device("cpu")):
        assert EqCvT.from_pretrained(tmp_path, map_location=device).head.classifier.bias.is_cpu


def _damage(folder: Path, what: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = json.loads(config.read_text())
    if what == "no config":
        config.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "not json":
        config.write_text("{")
    elif what == "no architecture":
        config.write_text("{}")
    elif what == "other architecture":
        config.write_text(json.dumps({**content, "architecture": "EqCvt"}))
    elif what == "unknown argument":
        config.write_text(json.dumps({**content, "field": 10}))
    elif what == "other size":
        config.write_text(json.dumps({**content, "fields": 12}))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no config", FileNotFoundError, "model is not a saved model: it has no config.json"),
        ("no weights", FileNotFoundError, "it has no model.safetensors"),
        ("truncated", ValueError, "model.safetensors is not a whole safetensors file"),
        ("not json", ValueError, "config.json is not valid JSON"),
        ("no architecture", ValueError, "config.json is not a model configuration"),
        ("other architecture", ValueError, "'EqCvt'; did you mean 'EqCvT'"),
        ("unknown argument", ValueError, "does not fit EqCvT of this version.*'field'"),
        ("other size", ValueError, "does not fit EqCvT of this version.*size mismatch"),
    ],
)
def test_damaged_folders_are_named(
    tmp_path: Path, what: str, error: type[Exception], message: str
) -> None:
    EqCvT(1, image_size=33).save_pretrained(tmp_path / "model")
    _damage(tmp_path / "model", what)
    with pytest.raises(error, match=f"(?s){message}"):
        eqcvt.load_model(tmp_path / "model")


def test_a_run_folder_names_its_models(tmp_path: Path) -> None:
    run = tmp_path / "run"
    EqCvT(1, image_size=33).save_pretrained(run / "last")
    for load in (eqcvt.load_model, EqCvT.from_pretrained):
        with pytest.raises(FileNotFoundError, match=f"{run} is a run: load {run}/last$"):
            load(run)
    EqCvT(1, image_size=33).save_pretrained(run / "best")
    with pytest.raises(FileNotFoundError, match=f"is a run: load {run}/best or {run}/last$"):
        eqcvt.load_model(run)


@pytest.mark.parametrize("name", ["./none", "/none/here", "a/b/c", "none", Path("a/b")])
def test_a_missing_folder_is_named(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}"):
        EqCvT.from_pretrained(name)


def test_the_wrong_class_is_named(tmp_path: Path) -> None:
    CvT(1, image_size=33).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the architecture CvT, not EqCvT; eqcvt\.load_model"):
        EqCvT.from_pretrained(tmp_path)
