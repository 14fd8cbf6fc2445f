"""The demonstration and the quick start, at a small size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from eqcvt.demo import verdict
from tests.cli.conftest import invoke

SMALL = ("--size", 33, "--images", 40, "--test-images", 16, "--epochs", 1, "--device", "cpu")


def test_demo_makes_everything_and_a_second_one_reuses_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "demo"
    text = invoke("demo", "--out", out, *SMALL).output
    assert "chance 50" in text
    content = json.loads((out / "results.json").read_text())
    assert set(content["models"]) == {"EqCvT", "EqCvT exact", "CvT"}
    exact, front = content["models"]["EqCvT exact"], content["models"]["EqCvT"]
    assert exact["rotation"]["residual_group"] < 1e-4 < front["rotation"]["residual_group"]
    assert content["settings"]["images"] == 40
    assert all((out / path).stat().st_size > 1000 for path in content["pictures"])
    assert len(content["pictures"]) == 14
    files = [*out.rglob("best/*"), *out.rglob("evaluation.json")]
    made = {p: p.stat().st_mtime_ns for p in files}
    assert len(made) == 3 * 4
    made[out / "results.json"] = (out / "results.json").stat().st_mtime_ns
    text = invoke("demo", "--out", out, *SMALL).output
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert "all of it was finished before" in text
    request.getfixturevalue("undrawn")
    (out / "pictures" / "roc.png").unlink()
    text = invoke("demo", "--out", out, *SMALL).output
    assert "evaluating EqCvT" not in text
    assert (out / "pictures" / "roc.png").is_file()
    again = json.loads((out / "results.json").read_text())
    assert again["models"] == content["models"]

    # As an older version left it.
    del again["models"]["CvT"]["rotation"]["accuracy_22"]
    (out / "results.json").write_text(json.dumps(again))
    assert "all of it" not in invoke("demo", "--out", out, *SMALL).output
    assert json.loads((out / "results.json").read_text())["models"] == content["models"]


def test_other_sizes_do_not_mix_with_an_older_demo(tmp_path: Path) -> None:
    tiny = ("--size", 33, "--images", 40, "--test-images", 4, "--epochs", 1, "--device", "cpu")
    folder = tmp_path / "demo"
    folder.mkdir()
    invoke("simulate", folder / "train.npz", "--count", 2, "--size", 17, "--workers", 1)
    result = invoke("demo", "--out", folder, *tiny, code=2)
    assert "exists and holds something else" in result.stderr


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.9, "it learnt"),
        (0.74, "better than chance at 4.8 sigma"),
        (0.61, "better than chance at 2.2 sigma"),
        (0.55, "not clearly better than chance"),
    ],
)
def test_verdict(accuracy: float, words: str) -> None:
    result = {"n": 100, "accuracy": accuracy, "classes": ["no_sub", "sub"]}
    assert verdict({"EqCvT": result}).endswith(f"± 5.0 %: {words}")


def test_quickstart(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(tmp_path, images=40, epochs=1)
    assert 0 <= found["accuracy"] <= 1
    assert found["residual"] < 1e-4
    assert len(list(tmp_path.glob("*.png"))) == 3
