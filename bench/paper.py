"""The paper's table from nothing: simulate, train, evaluate, draw. ``make paper`` on a GPU.

Every model is trained with every recipe and seed on each simulated set, and measured on a test
split that no training saw. Each part is kept in the output folder, so the same command goes on
where an earlier one stopped::

    python -m bench.paper                              # all of it, which asks for a GPU
    python -m bench.paper --set deeplense --model eqcvt --model cvt --recipe ours --seeds 1 \\
        --epochs 6 --batch-size 16                     # hours on two CPU cores
    python -m bench.paper ... --ship                   # and put the best models into eqcvt/weights
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from bench.origin import commit, device_name
from eqcvt import demo, load_model, plots, report
from eqcvt._check import AMP, choice
from eqcvt._files import read_json, replacing_folder, write_json
from eqcvt.data import MODES, load, simulate
from eqcvt.models import VisionModel
from eqcvt.models.registry import PRETRAINED
from eqcvt.nn import set_backend
from eqcvt.train import TrainConfig, TrainResult, train
from eqcvt.train.config import RECIPES
from eqcvt.train.distributed import resolve_device
from eqcvt.train.trained import SEEN

SETS = ("deeplense", "control")
# Name, registry name, peak learning rate of our recipe; the demonstration's where it has them.
MODELS = {
    "eqcvt": ("EqCvT", *demo.MODELS["EqCvT"]),
    "exact": ("EqCvT exact", *demo.MODELS["EqCvT exact"]),
    "d4": ("EqCvT D4", "eqcvt_d4", demo.MODELS["EqCvT"][1]),
    "cvt": ("CvT", *demo.MODELS["CvT"]),
}
TRAIN_SEED, TEST_SEED, LESSON_SEED = 1, 2, 3
# Sets that our recipe begins with a lesson: an eighth of the epochs on the same sky with heavier
# subhalos (a curriculum, Bengio et al., ICML 2009). Without it EqCvT, at 65x65, had learned nothing
# of control after 11 epochs.
LESSONS: dict[str, dict[str, Any]] = {"control": {"subhalos.mass_fraction": (0.25, 0.35)}}
# What our recipe changes for a set: the marks that subhalos leave on control's arcs are as faint as
# the noise, which quarter turns and mirrors keep as it is in images that are judged.
OURS: dict[str, dict[str, Any]] = {"control": {"augment": "dihedral"}}
SHIPPED = {"eqcvt": "eqcvt", "exact": "eqcvt-exact", "cvt": "cvt"}  # and the first part of its name
ON_CARDS = ("std_", "accuracy_", "residual_")  # so begin the numbers of turned images there
ORIGIN = ("command", "commit", "device", "threads", "versions")
SELECTION = ("sets", "models", "recipes", "seeds")
RUN = ("set", "model", "recipe", "seed")


@dataclass(frozen=True)
class Paper:
    """What is run; the defaults are the whole table.

    Attributes:
        out: folder for data, runs, pictures and ``results.json``.
        sets, models, recipes: names from ``SETS``, ``MODELS`` and ``RECIPES``.
        seeds: runs of each, with the seeds 0, 1, ...
        images: simulated for training, a tenth of them for validation.
        test_images: simulated with another seed, for the final numbers.
        size: pixels a side.
        epochs, batch_size: the same for every run; the poster's recipe has 40 epochs.
        device: ``auto`` | ``cpu`` | ``cuda``; on a GPU our recipe's steps are graphed.
        amp: ``off`` | ``bf16`` | ``fp16`` | ``auto``, bfloat16 on a GPU: our recipe's precision.
        augment: how our recipe turns training images, by default as the set wants it.
        init: trained weights that every run starts from, by default none; of one model only.
    """

    out: Path = Path("paper")
    sets: tuple[str, ...] = SETS
    models: tuple[str, ...] = tuple(MODELS)
    recipes: tuple[str, ...] = ("ours", "poster")
    seeds: int = 3
    images: int = 10_000
    test_images: int = 2000
    size: int = 129
    epochs: int = 40
    batch_size: int = 64
    device: str = "auto"
    amp: str = "auto"
    augment: str | None = None
    init: str | None = None

    def __post_init__(self) -> None:
        for what, given, allowed in (
            ("set", self.sets, SETS),
            ("model", self.models, tuple(MODELS)),
            ("recipe", self.recipes, tuple(RECIPES)),
            ("amp", (self.amp,), ("auto", *AMP)),
            ("augmentation", (self.augment,) if self.augment else (), MODES),
        ):
            for name in given:
                choice(what, name, allowed)
        if self.init is not None and len(self.models) > 1:
            raise ValueError(
                f"init={self.init!r} has weights of one model, got {', '.join(self.models)}: "
                "give one --model"
            )

    def settings(self) -> dict[str, Any]:
        """Return what the numbers depend on, as JSON."""
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k != "out"}
        return json.loads(json.dumps(kept))

    def runs(self) -> Iterator[tuple[str, str, int]]:
        """Yield model, recipe and seed of every run on a set, the first seed of all first."""
        for seed in range(self.seeds):
            for recipe in self.recipes:
                for model in self.models:
                    yield model, recipe, seed

    def folder(self, of: str, model: str, recipe: str, seed: int) -> Path:
        """Return a run's folder."""
        return self.out / of / "runs" / f"{model}-{recipe}-{seed}"

    def config(self, of: str, model: str, recipe: str, seed: int) -> TrainConfig:
        """Return a run's settings."""
        gpu = resolve_device(self.device).type == "cuda"
        _, name, lr = MODELS[model]
        amp = ("bf16" if gpu else "off") if self.amp == "auto" else self.amp
        ours = {"lr": lr, "ema": 0.99, "amp": amp, "cuda_graph": gpu, **OURS.get(of, {})}
        ours |= {"augment": self.augment} if self.augment else {}
        folder = str(self.folder(of, model, recipe, seed))
        return TrainConfig.from_dict(
            {
                "data": str(self.out / of / "train.npz"),
                "out": folder,
                "model": name,
                "batch_size": self.batch_size,
                "seed": seed,
                "device": self.device,
                "init": f"{folder}-lesson" if self.has_lesson(of, recipe) else self.init,
                **RECIPES[recipe],
                "epochs": self.epochs,
                **(ours if recipe == "ours" else {}),
            }
        )

    def lesson(self, of: str, model: str, recipe: str, seed: int) -> TrainConfig | None:
        """Return the settings of the run whose weights a run starts from, if it has a lesson."""
        config = self.config(of, model, recipe, seed)
        if not self.has_lesson(of, recipe):
            return None
        return dataclasses.replace(
            config,
            data=str(self.out / of / "lesson.npz"),
            out=str(config.init),
            init=None,
            epochs=math.ceil(self.epochs / 8),
        )

    def has_lesson(self, of: str, recipe: str) -> bool:
        """Return whether runs on a set with a recipe begin with a lesson."""
        return of in LESSONS and recipe == "ours" and self.init is None


def run(paper: Paper, say: Callable[[str], None]) -> dict[str, Any]:
    """Do all parts that are not done yet, and write ``results.json`` after each run.

    Rows of runs that were made by an earlier call, and that this one does not name, stay.

    Returns:
        The content of ``results.json``: origin, settings, ``rows`` with what each run reached, and
        the paths of the pictures relative to the folder.

    Raises:
        ValueError: the folder has rows of other runs that were made with other settings.
    """
    rows, pictures = _others(paper)
    kind = resolve_device(paper.device).type
    content: dict[str, Any] = {
        **report.origin(),
        "device": device_name(kind),
        "commit": commit(),
        "settings": paper.settings(),
    }
    for of in paper.sets:
        parts: dict[str, tuple[int, int, dict[str, Any]]] = {
            "train": (paper.images, TRAIN_SEED, {}),
            "test": (paper.test_images, TEST_SEED, {}),
        }
        if any(paper.has_lesson(of, recipe) for recipe in paper.recipes):
            parts["lesson"] = (paper.images, LESSON_SEED, LESSONS[of])
        for part, (count, seed, changes) in parts.items():
            say(f"{of}: {count} images for the {part} split")
            path = paper.out / of / f"{part}.npz"
            simulate(of, count, seed=seed, size=paper.size, overrides=changes, out=path)
        for model, recipe, seed in paper.runs():
            say(f"{of}: {MODELS[model][0]}, recipe {recipe}, seed {seed}")
            rows.append(_row(paper, of, model, recipe, seed))
            content["rows"] = [_without_curves(row) for row in rows]
            write_json(paper.out / "results.json", content)
        pictures += _draw(paper, of, rows)
    content["pictures"] = [str(p.relative_to(paper.out)) for p in pictures]
    write_json(paper.out / "results.json", content)
    return content


def _others(paper: Paper) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return what ``results.json`` has of runs that this call does not name: rows and pictures."""
    path = paper.out / "results.json"
    if not path.is_file():
        return [], []
    before = read_json(path)
    named = {(of, *run) for of in paper.sets for run in paper.runs()}
    rows = [r for r in before["rows"] if tuple(r[name] for name in RUN) not in named]
    for name, now in paper.settings().items() if rows else ():
        then = before["settings"].get(name, getattr(Paper, name))  # an older table lacks the newest
        if name not in SELECTION and then != now:
            raise ValueError(
                f"{path} has rows made with {name}={then!r}, got {now!r}: one "
                "table has one setting, so give another --out"
            )
    for row in rows:
        measured = paper.folder(*(row[name] for name in RUN)) / "test.json"
        if measured.is_file():  # with the curves
            row["test"] = read_json(measured)
    pictures = [p for p in map(Path, before.get("pictures", ())) if p.parts[0] not in paper.sets]
    return rows, [paper.out / p for p in pictures]


def _row(paper: Paper, of: str, model: str, recipe: str, seed: int) -> dict[str, Any]:
    """Train a model or find it trained, measure its best and last epoch on the test split."""
    folder = paper.folder(of, model, recipe, seed)
    state, kept = folder / "last" / "training_state.json", folder / "test.json"
    test = paper.out / of / "test.npz"
    measured: dict[str, Any] = {}
    lesson = paper.lesson(of, model, recipe, seed)
    learned = _trained(lesson).history if lesson else []
    trained = _trained(paper.config(of, model, recipe, seed))
    made_of = max(p.stat().st_mtime for p in (state, test))
    if kept.is_file() and kept.stat().st_mtime >= made_of:
        measured = read_json(kept)
    if not measured or not all(map(report.whole, measured.values())):
        device = resolve_device(paper.device)
        models = {which: _model(folder / which, device) for which in ("best", "last")}
        measured = report.evaluate_models(models, load(test), device=device)
        write_json(kept, measured)
    return {
        "set": of,
        "model": model,
        "recipe": recipe,
        "seed": seed,
        "epochs": len(trained.history),
        "best_epoch": trained.best_epoch,
        "val_best": trained.best_accuracy,
        "val_last": trained.last_accuracy,
        "seconds": sum(row["seconds"] for row in [*learned, *trained.history]),
        "lesson": learned,
        "history": trained.history,
        "test": measured,
    }


def _trained(config: TrainConfig) -> TrainResult:
    """Train, go on training, or find it done."""
    begun = (Path(config.out) / "last" / "training_state.json").is_file()
    return train(config, resume=begun, overwrite=Path(config.out).exists() and not begun)


def _without_curves(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for the record; the ROC curves, long, stay in the run's ``test.json``."""
    test = {
        which: {key: value for key, value in measured.items() if key != "roc"}
        for which, measured in row["test"].items()
    }
    return {**row, "test": test}


def _model(folder: Path, device: Any) -> VisionModel:
    model = load_model(folder).to(device)
    set_backend(model, None)
    return model


def _draw(paper: Paper, of: str, rows: list[dict[str, Any]]) -> list[Path]:
    """Draw the curves of all runs on a set, and the evaluation of seed 0 of our recipe."""
    mine = [row for row in rows if row["set"] == of]
    folder = paper.out / of / "pictures"
    curves = {f"{MODELS[r['model']][0]} {r['recipe']} {r['seed']}": r["history"] for r in mine}
    files = [plots.save(plots.training_curves(curves), folder / "training.png")]
    ours = [row for row in mine if row["recipe"] == paper.recipes[0]]
    if any(row["seed"] for row in ours):
        files.append(plots.save(over_seeds(ours), folder / "seeds.png"))
    shown = [row for row in ours if row["seed"] == 0 and "roc" in row["test"]["best"]]
    device = resolve_device(paper.device)
    names = {
        MODELS[r["model"]][0]: _model(paper.folder(*(r[name] for name in RUN)) / "best", device)
        for r in shown
    }
    results = {MODELS[r["model"]][0]: r["test"]["best"] for r in shown}
    test = load(paper.out / of / "test.npz")
    return [*files, *report.draw(names, results, test, folder, device=device)]


def over_seeds(rows: list[dict[str, Any]]) -> Figure:
    """Return a figure of validation accuracy against the epoch: each model's mean and range."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        runs = [row["history"] for row in rows if row["model"] == model]
        percent = np.array([[100 * epoch["val_accuracy"] for epoch in run] for run in runs])
        epochs, colour = np.arange(1, percent.shape[1] + 1), plots.COLOURS[i]
        axes.fill_between(epochs, percent.min(0), percent.max(0), color=colour, alpha=0.15, lw=0)
        axes.plot(epochs, percent.mean(0), "o-", color=colour, markersize=3, label=MODELS[model][0])
    count = len({row["seed"] for row in rows})
    axes.set(
        xlabel="epoch", ylabel="validation accuracy (%)", title=f"mean and range, {count} seeds"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _turned(row: Mapping[str, Any], name: str) -> float:
    """Return a number that rows of an older version lack."""
    return float(row["test"]["best"]["rotation"].get(name, math.nan))


# Column, its number from a row, its form.
COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], float], str], ...] = (
    ("val acc.\nbest, %", lambda r: 100 * r["val_best"], ".1f"),
    ("val acc.\nlast, %", lambda r: 100 * r["val_last"], ".1f"),
    ("test acc.\nbest, %", lambda r: 100 * r["test"]["best"]["accuracy"], ".1f"),
    ("test acc.\nlast, %", lambda r: 100 * r["test"]["last"]["accuracy"], ".1f"),
    ("acc. turned\n+ 22.5°, %", lambda r: 100 * _turned(r, "accuracy_22"), ".1f"),
    ("AUC", lambda r: r["test"]["best"]["auc"][-1], ".4f"),
    ("calibr.\nerror, %", lambda r: 100 * r["test"]["best"]["ece"], ".1f"),
    ("std of logits\n8 x 45°", lambda r: r["test"]["best"]["rotation"]["std_45"], ".3f"),
    ("the same\n+ 22.5°", lambda r: _turned(r, "std_22"), ".3f"),
    ("std of logits\ngroup", lambda r: r["test"]["best"]["rotation"]["std_group"], ".2g"),
    ("training\ns", lambda r: r["seconds"], ".0f"),
)


def table(content: Mapping[str, Any]) -> Table:
    """Return the table: a row for each set, model and recipe, mean and deviation over seeds."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for head in ("set", "model", "recipe", "para-\nmeters", *(c[0] for c in COLUMNS)):
        shown.add_column(head, justify="left" if head in ("set", "model", "recipe") else "right")
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["set"], row["model"], row["recipe"]), []).append(row)
    for (of, model, recipe), rows in groups.items():
        parameters = f"{rows[0]['test']['best']['parameters']:,}"
        cells = [spread([number(r) for r in rows], form) for _, number, form in COLUMNS]
        shown.add_row(of, MODELS[model][0], recipe, parameters, *cells)
    return shown


def spread(values: list[float], form: str) -> str:
    """Return the mean, with the standard deviation of several."""
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def ship(paper: Paper, content: Mapping[str, Any]) -> list[Path]:
    """Copy the models with the best validation accuracy into the package, each with its card."""
    written = []
    for of in paper.sets:
        for model, name in SHIPPED.items():
            rows = [r for r in content["rows"] if (r["set"], r["model"]) == (of, model)]
            if not rows:
                continue
            best = max(rows, key=lambda row: row["val_best"])
            trained = paper.folder(*(best[name] for name in RUN))
            target = PRETRAINED / f"{name}-{of}"
            with replacing_folder(target) as folder:
                load_model(trained / "best").save_pretrained(folder)
                if (seen := trained / SEEN).is_file():  # not after an --init that did not know
                    shutil.copyfile(seen, folder / SEEN)
                card = {"name": target.name, **_card(paper, content, best)}
                write_json(folder / "card.json", card)
            written.append(target)
    return written


def _card(paper: Paper, content: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model was trained on, how, and what it reached on the test split."""
    config = paper.config(row["set"], row["model"], row["recipe"], row["seed"]).to_dict()
    if row.get("lesson"):  # in place of its folder's name
        config["init"] = {"epochs": len(row["lesson"]), "changed": LESSONS[row["set"]]}
    elif paper.init and (before := PRETRAINED / paper.init / "card.json").is_file():
        known = read_json(before)  # of the model that this one may be about to replace
        config["init"] = {"name": paper.init, **{k: known[k] for k in ("trained", "commit")}}
    test = row["test"]["best"]
    return {
        "trained": {k: row[k] for k in ("set", "recipe", "seed", "epochs", "best_epoch")},
        "images": paper.images,
        "image_seed": TRAIN_SEED,
        "config": {k: v for k, v in config.items() if k not in ("data", "out")},
        "seconds": row["seconds"],
        "validation": {"accuracy": row["val_best"]},
        "test": {
            "images": test["n"],
            "image_seed": TEST_SEED,
            **{k: test[k] for k in ("accuracy", "auc", "ece", "loss")},
            **{k: v for k, v in test["rotation"].items() if k.startswith(ON_CARDS)},
        },
        **{k: content[k] for k in ORIGIN},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _each(names: Iterable[str]) -> str:
    return f"{' | '.join(names)}; may be given several times (default: all)."


def main(
    *,
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Paper.out,
    sets: Annotated[list[str] | None, typer.Option("--set", help=_each(SETS))] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help=_each(MODELS))] = None,
    recipes: Annotated[list[str] | None, typer.Option("--recipe", help=_each(RECIPES))] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = Paper.seeds,
    images: Annotated[int, typer.Option(min=20, help="Training images.")] = Paper.images,
    test_images: Annotated[int, typer.Option(min=2, help="Test images.")] = Paper.test_images,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = Paper.size,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = Paper.epochs,
    batch_size: Annotated[int, typer.Option(min=2, help="Images a step.")] = Paper.batch_size,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:i")] = Paper.device,
    amp: Annotated[str, typer.Option(help=f"auto | {' | '.join(AMP)}")] = Paper.amp,
    augment: Annotated[str | None, typer.Option(help=" | ".join(MODES))] = Paper.augment,
    init: Annotated[str | None, typer.Option(help="Go on from a trained model.")] = Paper.init,
    put: Annotated[bool, typer.Option("--ship", help="Put the best into eqcvt/weights.")] = False,
) -> None:
    """Make the paper's table, or go on making it."""
    named = {"sets": sets, "models": models, "recipes": recipes}
    paper = Paper(
        out=out,
        **{name: tuple(given) for name, given in named.items() if given},
        seeds=seeds,
        images=images,
        test_images=test_images,
        size=size,
        epochs=epochs,
        batch_size=batch_size,
        device=device,
        amp=amp,
        augment=augment,
        init=init,
    )
    screen = Console(width=None if Console().is_terminal else 160)
    content = run(paper, lambda text: screen.print(text, markup=False, soft_wrap=True))
    screen.print(table(content))
    for folder in ship(paper, content) if put else []:
        screen.print(f"wrote {folder}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
