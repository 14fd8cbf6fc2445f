"""What the README says is so: its snippets run, its commands exist, its numbers were recorded."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from bench import must, rows
from bench.paper import MODELS, spread
from eqcvt import list_pretrained, pretrained_folder
from eqcvt.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "bench" / "results" / "demo" / "results.json"
SMALL = ROOT / "bench" / "results" / "paper" / "small.json"
SHIPPED = ROOT / "bench" / "results" / "paper" / "shipped.json"
GPU = ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3.csv"
PARTS = ROOT / "bench" / "results" / "nvidia-h200.csv"
CASE = ("EqCvT", "4x1x129x129")
BENCHES = {
    "Intel": ("intel-r-xeon-r-processor-family-6-model-167.csv", "float32"),
    "Intel, bfloat16": ("intel-r-xeon-r-processor-family-6-model-167.csv", "bfloat16"),
    "AMD": ("amd-epyc-family-25-model-17.csv", "float32"),
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(i, marks=pytest.mark.needs("onnxruntime")) if "onnxruntime" in block else i
        for i, block in enumerate(_blocks("python"))
    ],
)
def test_python_snippets_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        exec(_blocks("python")[index], {})


def test_commands_and_targets_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"^eqcvt (\w+)", "\n".join(_blocks("sh")), re.MULTILINE))
    assert named
    assert named <= set(commands)
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_linked_files_exist() -> None:
    prose = re.sub(r"`[^`]*`", "", README)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (ROOT / link).is_file(), link


def _table(head: str) -> list[list[str]]:
    lines = README.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_goals_on_a_gpu_are_judged_from_the_recorded_rows() -> None:
    recorded = rows.read(GPU)
    columns = ("what", "held against", "ours", "reached", "required")
    goals = [goal for goal in must.table(recorded) if goal["verdict"] != "missing"]
    assert _table("| one H100 |") == [[goal[column] for column in columns] for goal in goals]
    commits = {(row["op"] == "lift", row["commit"]) for row in recorded}
    assert commits == {(True, "84d43cd+changes"), (False, "1dfcd31+changes")}
    later = json.loads(GPU.with_name(f"{GPU.stem}-84d43cd.json").read_text())
    step = later["cases"]["EqCvT, training"]
    attention = sum(ms for name, (_, ms) in step["kernels"].items() if "_attend_" in name)
    assert f"took {step['graph_ms']:.2f} ms as a graph" in README
    assert f"{attention:.1f} of them in attention" in README
    times = {
        (row["case"], row["implementation"]): float(row["median_ms"])
        for row in recorded
        if (row["op"], row["dtype"]) == ("EqCvT", "bfloat16")
    }
    launched, compiled = times["training", "triton"], times["training", "compile"]
    assert (
        f"takes {launched:.1f} ms, as long as the compiled plain model's {compiled:.1f}" in README
    )
    assert f"as a graph takes {times['step', 'triton-graph']:.3f} ms" in README


def test_the_parts_on_a_gpu_are_the_recorded_ones() -> None:
    record = json.loads(PARTS.with_suffix(".json").read_text())
    table = _table("| Triton, H200 |")
    assert len(table) == 8
    for name, ms, mib in table:
        case = record["cases"][name]
        assert (ms, mib) == (f"{case['graph_ms']:.2f}", f"{case['peak_mib']:.0f}")
    ours, theirs = (
        next(row["median_ms"] for row in rows.read(PARTS) if row["implementation"] == name)
        for name in ("triton", "cudnn-64")
    )
    ratio = float(theirs) / float(ours)
    sentence = f"core took {ours} ms both ways and cuDNN's {theirs}"
    assert sentence in README
    assert f"{ratio:.2f} times as long where 1.9 is asked" in README
    whole = json.loads(GPU.with_suffix(".json").read_text())
    assert record["commit"] in README
    assert whole["commit"] in README
    wrong = [check["reason"] for check in whole["checks"].values() if not check["passed"]]
    error, allowed = re.findall(r"[\d.]+e-\d+", wrong[0])
    assert len(wrong) == 1
    assert f"{float(error) / float(allowed):.2f} times as wrong as allowed" in README


def test_the_table_of_the_demo_is_the_recorded_one() -> None:
    models = json.loads(DEMO.read_text())["models"]
    for name, result in models.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        rotation = result["rotation"]
        assert cells == [
            f"{result['parameters']:,}",
            f"{100 * result['accuracy']:.1f} %",
            f"{result['auc'][-1]:.3f}",
            f"{rotation['std_45']:.2f}",
            f"{rotation['std_22']:.2f}",
            f"{rotation['residual_group']:.1e}",
            f"{result['seconds']:.0f}",
        ]


def test_what_the_shipped_models_reach_in_the_demo_is_recorded() -> None:
    found = json.loads(DEMO.read_text())["packaged"]
    for name, said in (
        ("eqcvt-deeplense", "EqCvT gets {:.1f} % right, and {:.1f} % turned"),
        ("cvt-deeplense", "CvT {:.1f} and {:.1f} %"),
        ("eqcvt-exact-deeplense", "not trained so yet, {:.1f} and {:.1f} %"),
        ("eqcvt-control", "On `control`, {:.1f} and {:.1f} %"),
    ):
        right = (found[name]["accuracy"], found[name]["rotation"]["accuracy_22"])
        assert said.format(*(100 * share for share in right)) in " ".join(README.split())


def _epochs(card: dict[str, Any]) -> str:
    """Return a model's epochs, behind those of the one it started from."""
    init, own = card["config"]["init"] or {}, card["trained"]["epochs"]
    before = init.get("trained", init).get("epochs")
    return f"{before} + {own}" if before else f"{own}"


def test_what_the_shipped_models_reach_is_on_their_cards() -> None:
    found = json.loads(SHIPPED.read_text())
    evaluated = {
        found["checkpoints"][model]: measured["rotation"]
        for model, measured in found["models"].items()
    }
    spread = {}
    for name in list_pretrained():
        card = json.loads((pretrained_folder(name) / "card.json").read_text())
        test = {**evaluated.get(name, {}), **card["test"]}  # older cards have fewer numbers
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
            _epochs(card),
            f"{100 * test['accuracy']:.1f} %",
            f"{100 * test['accuracy_22']:.1f} %" if "accuracy_22" in test else "-",
            f"{test['auc'][-1]:.3f}",
            f"{test['std_45']:.2f}",
            f"{test['std_22']:.2f}",
            f"{test['residual_group']:.1e}",
        ]
        spread[name] = test["std_group"]
    cvt, eqcvt = (spread[f"{name}-deeplense"] for name in ("cvt", "eqcvt"))
    said = f"{cvt:.2f} over quarter turns, {cvt / eqcvt:.1f} times EqCvT's {eqcvt:.2f}"
    assert said in " ".join(README.split())


def test_what_few_images_teach_is_the_recorded_table() -> None:
    rows = json.loads(SMALL.read_text())["rows"]
    table = README.partition("### Learning from few images")[2].splitlines()
    for model, (name, *_) in MODELS.items():
        mine = [row for row in rows if row["model"] == model]
        assert [row["seed"] for row in mine] == [0, 1, 2]
        best, last = ([row["test"][which] for row in mine] for which in ("best", "last"))
        line = next(text for text in table if text.startswith(f"| {name} |"))
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
            spread([100 * t["accuracy"] for t in last], ".1f") + " %",
            spread([100 * t["accuracy"] for t in best], ".1f") + " %",
            spread([t["auc"][-1] for t in best], ".3f"),
            spread([t["rotation"]["std_45"] for t in best], ".2f"),
            f"{statistics.fmean(t['rotation']['std_group'] for t in best):.1e}",
        ]


@pytest.mark.parametrize("device", BENCHES)
def test_times_and_memory_are_the_recorded_ones(device: str) -> None:
    name, dtype = BENCHES[device]
    of = rows.read(ROOT / "bench" / "results" / name)
    mine = [r for r in of if (r["op"], r["shape"], r["dtype"]) == (*CASE, dtype)]
    recorded = {(row["case"], row["implementation"]): row for row in mine}
    for case, start, column, per, form in (
        ("training", "forward + backward", "median_ms", 4, ".0f"),
        ("inference", "forward, eval", "median_ms", 4, ".0f"),
        ("training", "memory of a training step", "peak_mib", 1, ".0f"),
        ("first training", "time to the first training step", "median_ms", 1e3, ".1f"),
    ):
        if case == "first training" and dtype == "bfloat16":
            continue  # the time of a first step is that of the compiler
        lines = README.splitlines()
        row = next(line for line in lines if line.startswith(f"| {device}: {start}"))
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        columns = ("escnn", "eager", "compile", "native")
        assert cells == [f"{float(recorded[case, n][column]) / per:{form}}" for n in columns]
