"""What examples/many_gpus.md says is so: its commands run at tiny sizes, or are parsed."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.run import parse_args
from typer.main import get_command

from eqcvt.cli import app
from eqcvt.data import load
from eqcvt.train import TrainConfig
from tests.cli.conftest import invoke
from tests.torchrun import ROOT, torchrun
from tests.train.rings import rings

GUIDE = (ROOT / "examples" / "many_gpus.md").read_text(encoding="utf-8")
SHARDS = 2
# Added to the guide's commands, where the last option of a name wins.
SMALLER = {
    "simulate": ["--count", "16", "--size", "33", "--workers", "1"],
    "train": ["--batch-size", "4", "--augment", "none", "--device", "cpu"],
    "predict": ["--batch-size", "4", "--device", "cpu"],
    "merge": [],
}
SMALLER["train"] += ["--schedule", "constant"]
for argument in ("fields=2", 'stages=[{"dim": 8, "head_dim": 8}]', "head_hidden=8"):
    SMALLER["train"] += ["--model-arg", argument]


def lines(language: str) -> list[list[str]]:
    """Return the guide's commands as words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def arguments(words: list[str]) -> list[str]:
    """Return what ``eqcvt`` is given, by torchrun or at once."""
    if words[0] == "eqcvt":
        return words[1:]
    assert words[0] == "torchrun"
    launch = parse_args(words[1:])
    assert (launch.module, launch.training_script) == (True, "eqcvt")
    return list(launch.training_script_args)


def main(file: str) -> None:
    """What each of two processes does: one command after the other."""
    torch.set_num_threads(1)
    for given in json.loads(Path(file).read_text()):
        get_command(app)(given, standalone_mode=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's commands have run, in its order."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "survey" / "deep").mkdir(parents=True)
    rings(9).save(folder / "survey" / "deep" / "a.npz")
    np.save(folder / "survey" / "b.npy", rings(1).images[0])
    (folder / "survey" / "c.png").write_bytes(b"no picture")
    together: list[list[str]] = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in lines("sh"):
            given = arguments(words)
            given += SMALLER[given[0]]
            if given[0] == "train":
                given += ["--epochs", "2" if "--resume" in given else "1"]
            if given[0] == "simulate":
                assert given[given.index("--shard") + 1] == "3/16"
                for i in range(SHARDS):
                    invoke(*given, "--shard", f"{i}/{SHARDS}")
            elif words[0] == "torchrun":
                together.append(given)
            else:
                launch(together)
                together = []
                invoke(*given, *(["--skip-bad"] if given[0] == "predict" else []))
    finally:
        os.chdir(before)
    assert not together
    return folder


def launch(commands: list[list[str]]) -> None:
    """Run commands in two processes under torchrun."""
    if not commands:
        return
    Path("commands.json").write_text(json.dumps(commands))
    Path("output").write_text("".join(torchrun("tests.test_guide", "commands.json")))


@pytest.mark.needs("caustics")
def test_training_ran_on_the_shards_and_was_resumed(done: Path) -> None:
    assert len(load(done / "sky")) == 16
    assert len(json.loads((done / "runs" / "c4" / "metrics.json").read_text())) == 2
    output = (done / "output").read_text()
    assert (output.count("epoch 1/1"), output.count("epoch 2/2")) == (1, 1)


@pytest.mark.needs("caustics")
def test_the_survey_was_classified_by_two_processes(done: Path) -> None:
    parts = sorted(path.name for path in (done / "survey.csv.parts").glob("*.csv"))
    assert parts == ["survey-00000-of-00002.csv", "survey-00001-of-00002.csv"]
    tables = []
    for name in ("survey.csv", "parts.csv"):
        with (done / name).open() as file:
            tables.append(list(csv.DictReader(file)))
    for row, other in zip(*tables, strict=True):
        assert row["file"] == other["file"]
    names = [f"survey/deep/a.npz[{i}]" for i in range(9)]
    names = sorted([*names, "survey/b.npy", "survey/c.png"])
    assert [row["file"] for row in tables[0]] == names
    assert [row["file"] for row in tables[0] if not row["class"]] == ["survey/c.png"]
    assert "1 of 11 images could not be read" in (done / "output").read_text()


def test_the_batch_script_is_sound() -> None:
    (script,) = re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (words,) = [words for words in lines("bash") if "torchrun" in words]
    launched = words[words.index("torchrun") :]
    launch = parse_args([word.replace("$", "") for word in launched[1:]])
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_backend) == ("2", "8", "c10d")
    nodes, processes = int(launch.nnodes), int(launch.nproc_per_node)
    assert f"#SBATCH --nodes {nodes}\n" in script
    assert f"#SBATCH --gpus-per-node {processes}\n" in script
    parsed = parse(arguments(launched))
    assert parsed["batch_size"] % (nodes * processes) == 0
    (copy,) = [words for words in lines("bash") if "rsync" in words]
    assert parsed["data"] == copy[-1].rstrip("/")
    assert "SLURM" not in copy[-1]  # another path would be another survey


def parse(given: list[str]) -> dict[str, object]:
    """Return the options of a command of ours as it would be given them."""
    command = get_command(app).commands[given[0]]  # type: ignore[attr-defined]
    return dict(command.make_context(given[0], given[1:]).params)


def test_options_and_defaults_that_the_text_names() -> None:
    flags = {
        flag
        for command in get_command(app).commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for flag in parameter.opts
    }
    assert set(re.findall(r"`(--[a-z-]+)", GUIDE)) <= flags
    first = next(arguments(words) for words in lines("sh") if "train" in words)
    assert "here 64 images for each of 8 processes" in GUIDE
    assert parse(first)["batch_size"] == 64 * 8
    assert "The default 1e-3 goes with the default batch of 64" in GUIDE
    assert (TrainConfig.lr, TrainConfig.batch_size) == (1e-3, 64)
    assert "`--readers` threads (4)" in GUIDE
    assert parse(["predict", "model", "images"])["readers"] == 4


if __name__ == "__main__":
    main(*sys.argv[1:])
