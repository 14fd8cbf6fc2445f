"""``eqcvt predict`` and ``eqcvt merge``: class probabilities, from one image to a survey."""

from __future__ import annotations

import hashlib
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from eqcvt.cli.app import app, as_interrupt, console, note
from eqcvt.cli.checkpoints import Loaded, free, load
from eqcvt.cli.simulate import shard
from eqcvt.cli.use import DeviceOption, LastOption, ModelArgument

if TYPE_CHECKING:
    from eqcvt.predict import Images, Parts, Prediction

WARNINGS = 10
WIDE = 1 << 16  # columns where no terminal has an end


@app.command()
def predict(
    *,
    model: ModelArgument,
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Files or folders of png, jpg, npy, npz or fits: uint8 is divided by 255, any "
            "other image scaled from its own minimum to its maximum (clip hot pixels first)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write a .csv or .json file.")] = None,
    fit: Annotated[
        str, typer.Option(help="For images of another size: crop | pad | resize | refuse.")
    ] = "crop",
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Note an image that cannot be read, and go on."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    readers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 4,
    amp: Annotated[str, typer.Option(help="off | bf16 | fp16 (the last on a GPU only)")] = "off",
    rows: Annotated[int, typer.Option(min=0, help="Largest number of rows to print.")] = 50,
    part: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="i/n: do part i = 0..n-1 of the images, into OUT.parts; eqcvt merge joins all n.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, or do a finished part again.")
    ] = False,
    last: LastOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Print or write the class probabilities of images.

    Runs on several processes under torchrun: torchrun --nproc-per-node 2 -m eqcvt predict ...
    Each does its part of the images, and the first one joins the parts to OUT. The same command
    does only what is missing.
    """
    from eqcvt._check import choice
    from eqcvt.predict import ENDINGS_OF_TABLES, Images, Parts, class_names
    from eqcvt.predict import predict as run
    from eqcvt.predict.crew import Crew

    if out is not None:
        choice("the ending of --out", out.suffix, ENDINGS_OF_TABLES)
    index, number = (0, 1) if part is None else shard(part)
    crew = Crew()
    index, number = index * crew.size + crew.rank, number * crew.size
    alone = part is None and crew.size == 1
    if out is None and not alone:
        raise ValueError("a part is written to a file: say which with --out FILE")
    if out is not None:
        free(out, overwrite or not alone)  # merging compares what is there
    with as_interrupt(signal.SIGTERM), crew.work():
        found = load(model, last=last, device=device)
        names = class_names(found.model)
        everything = Images.find(images, skip_bad=skip_bad, readers=readers)
        mine = everything.part(index, number)
        predictions = run(
            found.model,
            mine,
            classes=names,
            fit=fit,
            batch_size=batch_size,
            amp=amp,
            readers=readers,
        )
        watched = _watched(predictions, len(mine), quiet=crew.rank > 0)
        if alone:
            _whole(watched, out, names, rows)
            return
        assert out is not None
        about = {
            "model": _fingerprint(found),
            "images": everything.fingerprint(),
            "classes": names,
            "fit": fit,
            "amp": amp,
            "skip_bad": skip_bad,
        }
        _part(watched, Parts(out), index, number, about, mine, overwrite, quiet=crew.rank > 0)
    if part is None and crew.rank == 0:
        crew.wait()
        _merge(Parts(out), number, overwrite=overwrite)


@app.command()
def merge(
    *,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The --out of the parts: a .csv or .json file.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an OUT that holds something else.")
    ] = False,
) -> None:
    """Join the parts that eqcvt predict --shard wrote; OUT is one process's, up to rounding."""
    from eqcvt.predict import Parts

    _merge(Parts(out), overwrite=overwrite)


def _merge(parts: Parts, number: int | None = None, *, overwrite: bool) -> None:
    """Join parts, and say so."""
    with as_interrupt(signal.SIGTERM):
        count, failed = parts.merge(number, overwrite=overwrite)
    console().print(f"wrote {parts.out}: {count:,} images", markup=False, soft_wrap=True)
    _say_failed(failed, count)


def _whole(
    predictions: Iterator[Prediction], out: Path | None, names: list[str], rows: int
) -> None:
    """Print the first predictions, and write all."""
    from eqcvt.predict import write_predictions

    shown: list[Prediction] = []
    count = failed = 0

    def seen() -> Iterator[Prediction]:
        nonlocal count, failed
        for p in predictions:
            count += 1
            failed += not p.label
            if len(shown) < rows:
                shown.append(p)
            yield p

    if out is None:
        deque(seen(), maxlen=0)
    else:
        write_predictions(seen(), out, names)
    # Names are no markup, and nothing of them is cut.
    table = Table()
    for name in ("image", "class"):
        table.add_column(name, overflow="fold")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for p in shown:
        values = (f"{v:.4f}" for v in p.probabilities.values())
        table.add_row(Text(p.name), Text(p.label), *values)
    if rows:
        screen = console()
        if not screen.is_terminal:
            screen.width = WIDE
        screen.print(table)
    if count > rows:
        console().print(f"{count} images, {rows} shown")
    if out is not None:
        console().print(f"wrote {out}", markup=False, soft_wrap=True)
    _say_failed(failed, count)


def _part(
    predictions: Iterator[Prediction],
    parts: Parts,
    index: int,
    number: int,
    about: dict[str, Any],
    images: Images,
    overwrite: bool,
    *,
    quiet: bool,
) -> None:
    """Write one part, unless it is there."""
    where = f"part {index} of {number}, {len(images):,} images"
    if parts.finished(index, number, about, overwrite=overwrite):
        text = f"{where}, is finished: {parts.path(index, number)}"
    else:
        failed = parts.write(index, number, about, images, predictions)
        text = f"{where}: wrote {parts.path(index, number)}"
        if not quiet:
            _say_failed(failed, len(images))
    if not quiet:
        console().print(text, markup=False, soft_wrap=True)


def _watched(predictions: Iterator[Prediction], total: int, *, quiet: bool) -> Iterator[Prediction]:
    """Pass predictions on, with a bar where there is a terminal, warnings, and the rate at last."""
    screen = console(stderr=True)
    bar = Progress(
        TextColumn("predicting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=screen,
        disable=quiet or not screen.is_terminal,
        transient=True,
    )
    begun = seen = time.perf_counter()
    warned: set[str] = set()
    count = 0
    with bar:
        task = bar.add_task("", total=total, rate="")
        for count, p in enumerate(predictions, 1):
            if p.note and p.note not in warned and len(warned) < WARNINGS and not quiet:
                warned.add(p.note)
                screen.print(f"warning: {p.name}: {p.note}", markup=False, soft_wrap=True)
                if len(warned) == WARNINGS:
                    screen.print("further warnings are in the notes of --out only")
            yield p
            now = time.perf_counter()
            if now - seen > 0.2:
                seen = now
                rate = f"{count / (now - begun):,.0f} images/s"
                bar.update(task, completed=count, rate=rate)
    taken = time.perf_counter() - begun
    if not quiet and taken > 2:
        note(f"{count:,} images in {taken:.0f} s ({count / taken:,.0f} images/s)")


def _say_failed(failed: int, count: int) -> None:
    """Say how many images have no prediction, if any."""
    if failed:
        note(f"warning: {failed:,} of {count:,} images could not be read; their notes say why")


def _fingerprint(found: Loaded) -> str:
    """Return a hash of a model's files."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update((found.folder / name).read_bytes())
    return digest.hexdigest()
