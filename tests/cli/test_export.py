"""Exported programs and graphs give the model's logits, for any batch size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import eqcvt
from eqcvt.export import export

MODELS = ("eqcvt_c4", "eqcvt_d4_exact", "cvt")


def trained(name: str, channels: int = 1) -> nn.Module:
    """A model whose batch norms have statistics of their own."""
    model = eqcvt.create_model(name, in_channels=channels, num_classes=2, image_size=33)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, channels, 33, 33))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.classes = ("no_sub", "sub")
    written = export(model, tmp_path / "model.pt2")
    assert model.training
    assert written.difference <= 1e-5 * max(1.0, written.scale)
    x = torch.rand(7, 1, 33, 33)
    extra = {"config.json": "", "classes.json": "", "input.txt": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert json.loads(extra["config.json"])["architecture"] == type(model).__name__
    assert json.loads(extra["classes.json"]) == ["no_sub", "sub"]
    assert "grey values in [0, 1]: bytes divided by 255" in extra["input.txt"]
    assert "eqcvt." not in str(program.graph)


def test_a_compiled_model_is_exported_and_a_wrapped_one_refused(tmp_path: Path) -> None:
    model = eqcvt.create_model("eqcvt_c4", in_channels=1, image_size=33)
    assert export(torch.compile(model), tmp_path / "compiled.pt2").path.is_file()
    with pytest.raises(TypeError, match=r"got DataParallel: .* holds it as \.module"):
        export(nn.DataParallel(model), tmp_path / "wrapped.pt2")
    assert not (tmp_path / "wrapped.pt2").exists()


@pytest.mark.needs("onnxruntime")
def test_onnx(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = trained("eqcvt_c4_exact", channels=3)
    model.classes = ("no_sub", "sub")
    written = export(model, tmp_path / "model.onnx")
    assert written.difference <= 1e-4 * max(1.0, written.scale)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 33, 33]
    x = torch.rand(7, 3, 33, 33)
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)
    held = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(held["eqcvt"])["invariance"] == "exact"
    assert json.loads(held["classes"]) == ["no_sub", "sub"]
    assert "grey values in [0, 1]: bytes divided by 255" in held["input"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("cvt")
    path = tmp_path / "model.pt2"
    path.write_text("the old file")
    load = torch.export.load

    def changed(*args: object, **kwargs: object) -> torch.export.ExportedProgram:
        program = load(*args, **kwargs)
        for weight in program.state_dict.values():
            if weight.is_floating_point():
                weight.data.add_(0.1)
        return program

    monkeypatch.setattr(torch.export, "load", changed)
    with pytest.raises(RuntimeError, match=r"gives logits .* from the model's, allowed 0.0001 \("):
        export(model, path)
    assert path.read_text() == "the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("whose", "value"), [("model", float("nan")), ("torch.export file", float("inf"))]
)
def test_logits_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str, value: float
) -> None:
    model = trained("cvt")
    load = torch.export.load

    def changed(*args: object, **kwargs: object) -> torch.export.ExportedProgram:
        program = load(*args, **kwargs)
        program.state_dict["head.classifier.bias"].data.fill_(value)
        return program

    if whose == "model":
        model.head.classifier.bias.data.fill_(value)
    else:
        monkeypatch.setattr(torch.export, "load", changed)
    with pytest.raises(RuntimeError, match=f"the {whose} gives logits that are not finite"):
        export(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "eqcvt\[export\]"'):
        export(trained("cvt"), tmp_path / "model.onnx")
