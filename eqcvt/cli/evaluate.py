"""``eqcvt evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from eqcvt._files import write_json
from eqcvt.cli.app import app, console, note
from eqcvt.cli.checkpoints import Loaded, distinct, help_text, load
from eqcvt.cli.use import DeviceOption, LastOption

if TYPE_CHECKING:
    from eqcvt.data import LensingImages


@app.command()
def evaluate(
    *,
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help=help_text("Run or checkpoint folders")),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images, as for train; without it those that the first run was validated on."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of a folder with train and val: train | val (default: both)."),
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another MODEL; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results (default: RUN/evaluation, or NAME-evaluation)."),
    ] = None,
    last: LastOption = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    angles: Annotated[int, typer.Option(min=4, help="Rotations in the polar plot.")] = 24,
    samples: Annotated[int, typer.Option(min=1, help="Images in the sample grid.")] = 12,
    pictures: Annotated[bool, typer.Option(help="Draw pictures.")] = True,
    device: DeviceOption = "auto",
) -> None:
    """Measure accuracy, AUC, calibration and what rotations do to the logits; draw pictures.

    Writes metrics.json and, besides the tables it prints, ROC, confusion, reliability, logits
    against angle for all models side by side, attention maps and samples; all in place of an
    earlier evaluation, be it of the best epoch or the last.

    Images that one of the models was trained on are left out.
    """
    from rich.markup import escape
    from rich.table import Table

    from eqcvt import report
    from eqcvt.data import load as load_images
    from eqcvt.train.folder import EVALUATION, METRICS, remove_pictures

    if split is not None and data is None:
        raise ValueError(f"--split {split} says which part of --data PATH: give both")
    found = distinct([load(p, last=last, device=device) for p in [*models, *(compare or [])]])
    first = next(iter(found.values()))
    if data is None:
        images, source = held_out(first)
    else:
        images, source = load_images(data, split=split), str(data)
    for name, item in found.items():
        if said := other_classes(name, item.model.classes, images.classes):
            note(f"note: {said}")
    images, trained_on = unseen(found, images, source, vouched=first if data is None else None)
    nets = {name: item.model for name, item in found.items()}
    where = first.device
    results = report.evaluate_models(
        nets, images, device=where, batch_size=batch_size, progress=note
    )
    beside = Path(f"{first.folder.name}-evaluation")  # nothing is written into the package
    folder = out or (beside if first.packaged else (first.run or first.folder) / EVALUATION)
    remove_pictures(folder)  # those of other images or models would stay beside new numbers
    write_json(
        folder / METRICS,
        {
            **report.origin(),
            "data": source,
            "checkpoints": {name: str(item.folder) for name, item in found.items()},
            "trained_on": trained_on,
            "models": results,
        },
    )
    if pictures:
        report.draw(
            nets, results, images, folder, device=where, batch_size=batch_size,
            angles=angles, samples=samples, progress=note,
        )  # fmt: skip
    # Last, as standard output may be closed, or unable to show a name.
    screen = console()
    screen.print(report.summary(results, title=f"{len(images)} images of {source}"))
    for name, result in results.items():
        table = Table("true class", title=f"{escape(name)}: confusion")
        for label in images.classes:
            table.add_column(f"as {escape(label)}", justify="right")
        table.add_column("AUC", justify="right")
        for label, row, auc in zip(images.classes, result["confusion"], result["auc"], strict=True):
            cells = map(str, row)
            table.add_row(escape(label), *cells, "undefined" if auc is None else f"{auc:.4f}")
        screen.print(table)
        for sentence in result["notes"]:
            screen.print(f"note: {sentence}", markup=False, soft_wrap=True)
    screen.print(f"wrote {folder}", markup=False, soft_wrap=True)


def held_out(first: Loaded) -> tuple[LensingImages, str]:
    """Return the validation images of the model's own run, and what to call them.

    Raises:
        FileNotFoundError: the images are not where they were.
        ValueError: the model belongs to no run, or the images are no longer those of the run.
    """
    from eqcvt.train.checkpoint import trained_on
    from eqcvt.train.config import TrainConfig
    from eqcvt.train.folder import CONFIG, LAST
    from eqcvt.train.setup import fingerprint, load_data

    if first.run is None or not (first.run / CONFIG).is_file():
        raise ValueError(f"{first.folder} belongs to no run: say which images with --data PATH")
    file = first.run / CONFIG
    config = TrainConfig.from_file(file)
    try:
        sets = load_data(config)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}, which {file} names: say where the images are with --data PATH"
        ) from error
    if trained_on(first.run / LAST) not in (None, fingerprint(*sets)):
        raise ValueError(
            f"{config.data} has other images than {first.run} was trained and validated on, so "
            "none are known to be held out: say which with --data PATH"
        )
    return sets[1], f"{config.val_data or config.data}, held out in training"


def unseen(
    found: dict[str, Loaded], images: LensingImages, source: str, *, vouched: Loaded | None
) -> tuple[LensingImages, dict[str, int | None]]:
    """Leave out the images that a model was trained on, and say so.

    Args:
        found: models by name.
        images: the images to evaluate.
        source: what to call them.
        vouched: the model that is known by other means not to have been trained on them.

    Returns:
        The others, and how many each model was trained on; None where that is not known.

    Raises:
        ValueError: no others are left.
    """
    from eqcvt.train.trained import seen_images

    fresh = np.ones(len(images), bool)
    counts: dict[str, int | None] = {}
    for name, item in found.items():
        if (seen := seen_images(item.folder)) is None:
            counts[name] = None
            if item is not vouched:
                note(f"warning: it is not known whether {name} was trained on images of {source}")
            continue
        known = np.isin(images.hashes, seen)
        fresh &= ~known
        if count := int(known.sum()):
            of = f"{count} of the {len(images)} images of {source}"
            note(f"warning: {name} was trained on {of}, which are left out")
        counts[name] = count
    if len(images) and not fresh.any():
        raise ValueError(
            f"models were trained on all {len(images)} images of {source}: give others with "
            "--data PATH; eqcvt.train.evaluate measures any images"
        )
    return images if fresh.all() else images.subset(fresh), counts


def other_classes(name: str, known: tuple[str, ...] | None, given: tuple[str, ...]) -> str | None:
    """Return what is to be said of a model whose classes have other names than the data's.

    Raises:
        ValueError: the same names in another order, by which every image would count as wrong.
    """
    if not known or known == given or len(known) != len(given):  # the latter is refused later
        return None
    theirs, ours = ", ".join(known), ", ".join(given)
    if sorted(known) == sorted(given):
        raise ValueError(
            f"{name} has the classes {theirs} in this order, the data have {ours}: number the "
            "labels of the data in the model's order"
        )
    return f"{name} was trained on the classes {theirs}; they are taken for {ours}, in this order"
