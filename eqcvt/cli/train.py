"""``eqcvt train``: a flag for every field of ``TrainConfig``, over a TOML or YAML file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from eqcvt.cli.app import app, console
from eqcvt.train.config import RECIPES, TrainConfig
from eqcvt.train.folder import CONFIG, CURVES

EXTRA_HELP = {
    "seed": "of the weights, the order of the images, dropout and augmentation",
    "tensorboard": "also write TensorBoard's files",
    "step_gamma": "factor of the step schedule",
    "val_fraction": "share of every class that is held out where there are no validation images",
    "betas": "of Adam",
    "weight_decay": "of the optimizer",
    "label_smoothing": "of the loss, 0 for none",
}


def _helps() -> dict[str, str]:
    """Return each setting's description, as the Args of ``TrainConfig`` give it."""
    text = inspect.cleandoc(TrainConfig.__doc__ or "")
    body = textwrap.dedent(text.partition("Args:\n")[2].partition("\n\nRaises")[0])
    found = dict(EXTRA_HELP)
    for entry in re.split(r"\n(?=\w)", body):
        names, _, meaning = entry.partition(": ")
        for name in names.split(", "):
            found.setdefault(name, " ".join(meaning.replace("``", "").split()))
    return found


def _flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(config, resume, overwrite, settings)`` one option for each setting."""
    helps, hints = _helps(), get_type_hints(TrainConfig)
    parameters = []
    for item in dataclasses.fields(TrainConfig):
        flag = "--" + item.name.replace("_", "-")
        kind: Any = hints[item.name]
        if item.name == "model_kwargs":
            flag, kind = "--model-arg", list[str]
        elif kind is bool:
            flag += f"/--no-{flag[2:]}"
        option = typer.Option(flag, help=helps.get(item.name, ""), show_default=False)
        if item.name == "model_kwargs":
            option.help = "NAME=VALUE: an argument of the model, VALUE in JSON or plain text"
        elif kind is not bool and item.default not in (dataclasses.MISSING, None):
            option.help = f"{option.help} (default: {_plain(item.default)})"
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    own = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def run(**given: Any) -> None:
        command(**given)

    run.__signature__ = inspect.Signature(own + parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own + parameters}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _plain(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def model_arguments(given: list[str]) -> dict[str, Any]:
    """Return ``NAME=VALUE`` texts as a dictionary; a VALUE that is not JSON stays text.

    Raises:
        ValueError: a text without ``=``.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--model-arg must be NAME=VALUE, got {text!r}")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = value
    return found


def configuration(
    file: Path | None, recipe: str | None, given: dict[str, Any], *, resume: bool = False
) -> TrainConfig:
    """Return the settings of ``file`` (or of a recipe), overridden by the flags that were given.

    Without either, a run to resume has the settings in its own folder.
    """
    flags = {name: value for name, value in given.items() if value not in (None, [])}
    own = Path(os.path.expanduser(flags.get("out", TrainConfig.out))) / CONFIG
    if resume and file is None and recipe is None and own.is_file():
        file = own
        flags["out"] = str(own.parent)  # wherever the folder was when it was written
    values = {} if file is None else TrainConfig.from_file(file).to_dict()
    if recipe is not None:
        if file is not None:
            raise ValueError("--recipe goes into the file: give either --recipe or --config")
        values["recipe"] = recipe
    if "model_kwargs" in flags:
        flags["model_kwargs"] = {
            **values.get("model_kwargs", {}),
            **model_arguments(flags["model_kwargs"]),
        }
    merged = {**values, **flags}
    if "data" not in merged:
        if resume and recipe is None:
            raise FileNotFoundError(f"nothing to resume: no {own}; --out names the run's folder")
        raise ValueError("no training images: give --data PATH, or a --config file with data")
    return TrainConfig.from_dict(merged)


@app.command()
@_flags
def train(
    *,
    config: Annotated[
        Path | None, typer.Option(help="A .toml or .yaml file; flags override it.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"Start from a named set: {' | '.join(RECIPES)}.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its settings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
    **settings: Any,
) -> None:
    """Train a model; channels, image size and classes come from the images.

    Runs on several processes under torchrun: torchrun --nproc-per-node 2 -m eqcvt train ...
    """
    from eqcvt import plots
    from eqcvt.train import train as run

    chosen = configuration(config, recipe, settings, resume=resume)
    folder, first = Path(chosen.out), os.environ.get("RANK", "0") == "0"
    result = run(chosen, resume=resume, overwrite=overwrite)
    if not first:
        return
    plots.save(plots.training_curves({chosen.model: result.history}), folder / CURVES)
    console().print(
        f"best accuracy {100 * result.best_accuracy:.2f} % (epoch {result.best_epoch}), "
        f"last {100 * result.last_accuracy:.2f} %; model, metrics and curves in {folder}",
        markup=False,
        soft_wrap=True,
    )
