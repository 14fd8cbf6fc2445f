"""``eqcvt simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from eqcvt.cli.app import app, console
from eqcvt.data import LensingImages, load, to_unit
from eqcvt.data import simulate as run


def overrides(given: list[str]) -> dict[str, Any]:
    """Return ``FIELD=VALUE`` texts as a dictionary; VALUE is JSON, or a pair ``LOW:HIGH``.

    Raises:
        ValueError: a text of another form.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--set must be FIELD=VALUE, got {text!r}")
        parts = value.split(":") if not value.startswith(("[", '"')) else [value]
        try:
            numbers = [json.loads(part) for part in parts]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--set {name} must be a number, LOW:HIGH, true, false or JSON, got {value!r}"
            ) from error
        found[name] = numbers[0] if len(numbers) == 1 else numbers
    return found


def shard(text: str) -> tuple[int, int]:
    """Return ``i/n`` as two integers with 0 <= i < n.

    Raises:
        ValueError: a text of another form.
    """
    index, slash, number = text.partition("/")
    if not slash or not index.isdecimal() or not number.isdecimal() or int(index) >= int(number):
        raise ValueError(f"--shard must be i/n with 0 <= i < n, such as 0/8, got {text!r}")
    return int(index), int(number)


@app.command()
def simulate(
    *,
    out: Annotated[
        Path, typer.Argument(help="A .npz file, or a folder for shards.", metavar="OUT")
    ],
    preset: Annotated[str, typer.Option(help="deeplense | control | three_class")] = "deeplense",
    count: Annotated[int, typer.Option(help="Images in the whole set.")] = 1000,
    size: Annotated[
        int | None, typer.Option(help="Pixels a side; the patch of sky stays (default: 129).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the set.")] = 1337,
    part: Annotated[
        str | None,
        typer.Option("--shard", help="i/n: make part i = 0..n-1 of the set; all n make the set."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: up to one for each core).")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="uint8 grey values | float32 electrons per second")
    ] = "uint8",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE or FIELD=LOW:HIGH, such as halo.shear=0:0.1"),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Also draw a contact sheet beside the output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that holds something else.")
    ] = False,
) -> None:
    """Simulate strong-lensing images; the same command goes on where an earlier one stopped."""
    path = run(
        preset,
        count,
        seed=seed,
        out=out,
        shard=None if part is None else shard(part),
        size=size,
        overrides=overrides(changes or []),
        workers=workers,
        dtype=dtype,
        overwrite=overwrite,
    )
    screen = console()
    screen.print(f"wrote {path}", markup=False, soft_wrap=True)
    if preview:
        sheet = _draw(load(path), path.with_suffix(".png"))
        screen.print(f"wrote {sheet}", markup=False, soft_wrap=True)


def _draw(data: LensingImages, path: Path) -> Path:
    """Write a contact sheet of the first images of each class."""
    from eqcvt import plots, report

    columns, classes = 8, range(len(data.classes))
    each = columns * max(1, 4 // len(classes))
    part = data.subset(np.concatenate([np.flatnonzero(data.labels == k)[:each] for k in classes]))
    # The power lifts the faint arcs beside the bright core of the lens galaxy.
    shown = to_unit(torch.from_numpy(part.images)) ** 0.6
    scale = report.pixel_scale(data)
    grid = plots.sample_grid(shown, part.labels, part.classes, columns=columns, pixel_scale=scale)
    return plots.save(grid, path)
