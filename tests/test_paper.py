"""The script that makes the paper's table, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

import eqcvt
from bench import paper
from bench.paper import Paper
from eqcvt import demo
from eqcvt.data import load


def small(out: Path, **settings: object) -> Paper:
    """Return a table that takes seconds."""
    smallest = {"images": 40, "test_images": 8, "size": 33, "epochs": 1, "batch_size": 8}
    chosen = {"sets": ("control",), "models": ("eqcvt", "cvt"), "recipes": ("ours",), "seeds": 2}
    return Paper(out=out, device="cpu", **{**smallest, **chosen, **settings})  # type: ignore[arg-type]


def text_of(content: dict[str, object]) -> str:
    """Return the table as text."""
    screen = Console(width=200)
    with screen.capture() as captured:
        screen.print(paper.table(content))
    return captured.get()


def test_the_table_is_made_kept_and_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    content = paper.run(small(tmp_path / "out"), said.append)
    assert [(r["model"], r["seed"]) for r in content["rows"]] == [
        ("eqcvt", 0), ("cvt", 0), ("eqcvt", 1), ("cvt", 1),
    ]  # fmt: skip
    assert all((tmp_path / "out" / p).stat().st_size > 1000 for p in content["pictures"])
    assert "control/pictures/seeds.png" in content["pictures"]
    assert "roc" not in content["rows"][0]["test"]["best"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == content
    rows = [line for line in text_of(content).splitlines() if "control" in line]
    assert len(rows) == 2
    assert "64,810" in rows[0]
    assert rows[0].count("±") == len(paper.COLUMNS)

    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    measured = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("test.json")}
    assert len(measured) == 4
    again = paper.run(small(tmp_path / "out"), said.append)
    assert {p: p.stat().st_mtime_ns for p in [*weights, *measured]} == weights | measured
    assert again["rows"] == content["rows"]

    monkeypatch.setattr(paper, "PRETRAINED", tmp_path / "weights")
    folders = paper.ship(small(tmp_path / "out"), content)
    assert [f.name for f in folders] == ["eqcvt-control", "cvt-control"]
    eqcvt.load_model(folders[0])
    card = json.loads((folders[0] / "card.json").read_text())
    best = max(content["rows"][::2], key=lambda row: row["val_best"])
    assert card["trained"]["seed"] == best["seed"]
    assert card["test"]["accuracy"] == best["test"]["best"]["accuracy"]
    assert (card["image_seed"], card["test"]["image_seed"]) == (1, 2)
    assert (folders[0] / "classes.json").is_file()
    run = small(tmp_path / "out").folder("control", "eqcvt", "ours", best["seed"])
    seen = "trained_on.safetensors"
    assert (folders[0] / seen).read_bytes() == (run / seen).read_bytes()


def test_the_demonstration_asks_of_images_that_no_shipped_model_has_seen() -> None:
    # A lesson's images without subhalos are those of the set itself with its seed.
    assert demo.FRESH_SEED not in (paper.TRAIN_SEED, paper.TEST_SEED, paper.LESSON_SEED)


@pytest.mark.usefixtures("undrawn")
def test_other_settings_do_not_mix_with_an_older_table(tmp_path: Path) -> None:
    run = small(tmp_path, models=("cvt",), seeds=1)
    paper.run(run, lambda _: None)
    with pytest.raises(ValueError, match="epochs"):
        paper.run(small(tmp_path, models=("cvt",), seeds=1, epochs=2), lambda _: None)


def test_the_precision_is_that_of_our_recipe_alone(tmp_path: Path) -> None:
    run = small(tmp_path, amp="bf16")
    assert run.config("control", "cvt", "ours", 0).amp == "bf16"
    assert run.config("control", "cvt", "poster", 0).amp == "off"
    assert small(tmp_path).config("control", "cvt", "ours", 0).amp == "off"
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        small(tmp_path, amp="bf-16")


def test_our_recipe_alone_turns_images_as_asked(tmp_path: Path) -> None:
    runs = [("deeplense", "ours"), ("control", "ours"), ("control", "poster")]
    for asked, found in (
        (None, ["mixed", "dihedral", "rotate"]),
        ("none", ["none", "none", "rotate"]),
    ):
        run = small(tmp_path, augment=asked)
        assert [run.config(of, "cvt", recipe, 0).augment for of, recipe in runs] == found
    with pytest.raises(ValueError, match="did you mean 'mixed'"):
        small(tmp_path, augment="mix")


@pytest.mark.usefixtures("undrawn")
def test_rows_of_other_models_stay_in_the_table(tmp_path: Path) -> None:
    first = paper.run(small(tmp_path, models=("cvt",), seeds=1), lambda _: None)
    both = paper.run(small(tmp_path, models=("eqcvt",), seeds=1), lambda _: None)
    assert [row["model"] for row in both["rows"]] == ["cvt", "eqcvt"]
    assert (
        both["rows"][0]["test"]["best"]["accuracy"] == first["rows"][0]["test"]["best"]["accuracy"]
    )
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == both["rows"]
    with pytest.raises(ValueError, match=r"rows made with epochs=1, got 2.*another --out"):
        paper.run(small(tmp_path, models=("exact",), seeds=1, epochs=2), lambda _: None)


@pytest.mark.usefixtures("undrawn")
def test_what_is_too_faint_begins_with_heavier_subhalos(tmp_path: Path) -> None:
    run = small(tmp_path, models=("cvt",), seeds=1, epochs=2)
    (row,) = paper.run(run, lambda _: None)["rows"]
    assert [len(row["lesson"]), len(row["history"])] == [1, 2]
    assert row["seconds"] == sum(epoch["seconds"] for epoch in row["lesson"] + row["history"])
    fractions = load(tmp_path / "control" / "lesson.npz").parameters["subhalo_mass_fraction"]
    assert 0.25 <= fractions[1] <= 0.35
    config, lesson = (make("control", "cvt", "ours", 0) for make in (run.config, run.lesson))
    assert lesson is not None
    assert (config.init, lesson.init) == (lesson.out, None)
    assert (config.augment, lesson.augment) == ("dihedral", "dihedral")
    for other in (
        run.lesson("deeplense", "cvt", "ours", 0),
        run.lesson("control", "cvt", "poster", 0),
    ):
        assert other is None


@pytest.mark.usefixtures("undrawn")
def test_a_table_can_go_on_from_trained_weights(tmp_path: Path) -> None:
    first = small(tmp_path / "first", models=("cvt",), seeds=1)
    paper.run(first, lambda _: None)
    trained = first.folder("control", "cvt", "ours", 0) / "last"
    more = small(tmp_path / "more", models=("cvt",), seeds=1, init=str(trained))
    said = paper.run(more, lambda _: None)
    assert said["settings"]["init"] == str(trained)
    before, after = (
        eqcvt.load_model(run.folder("control", "cvt", "ours", 0) / "last").state_dict()
        for run in (first, more)
    )
    fresh = eqcvt.create_model("cvt", in_channels=1, image_size=33).state_dict()
    name = "stages.0.blocks.0.mlp.fc1.weight"
    assert (after[name] - before[name]).abs().max() < (fresh[name] - before[name]).abs().max() / 2
    with pytest.raises(ValueError, match="weights of one model, got eqcvt, cvt"):
        small(tmp_path, init=str(trained))


def test_a_name_that_does_not_exist_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="control"):
        small(tmp_path, sets=("contrl",))
