"""``eqcvt predict``, ``eqcvt export`` and ``eqcvt convert``: trained models put to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from eqcvt.cli.app import app, console, note
from eqcvt.cli.checkpoints import load

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run folder or a checkpoint folder.")
]
LastOption = Annotated[
    bool, typer.Option("--last", help="Of a run take the last epoch, not the best.")
]
DeviceOption = Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:i")]


@app.command()
def predict(
    *,
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(help="Files or folders of png, jpg, npy or npz.")],
    out: Annotated[Path | None, typer.Option(help="Write a .csv or .json file.")] = None,
    fit: Annotated[
        str, typer.Option(help="For images of another size: crop | pad | resize | refuse.")
    ] = "crop",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    rows: Annotated[int, typer.Option(min=0, help="Largest number of rows to print.")] = 50,
    last: LastOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Print the class probabilities of images."""
    from eqcvt._check import choice
    from eqcvt.predict import predict as run
    from eqcvt.predict import write_predictions

    if out is not None:
        choice("the ending of --out", out.suffix, (".csv", ".json"))
    found = load(model, last=last, device=device)
    predictions = []
    warned: set[str] = set()
    for p in run(
        found.model,
        images,
        classes=found.classes,
        fit=fit,
        batch_size=batch_size,
        device=found.device,
    ):
        predictions.append(p)
        if p.note and p.note not in warned:
            warned.add(p.note)
            note(f"warning: {p.name}: {p.note}")
    table = Table("image", "class")
    for name in predictions[0].probabilities:
        table.add_column(name, justify="right")
    for p in predictions[:rows]:
        table.add_row(p.name, p.label, *(f"{v:.4f}" for v in p.probabilities.values()))
    if rows:
        console().print(table)
    if len(predictions) > rows:
        console().print(f"{len(predictions)} images, {rows} shown")
    if out is not None:
        console().print(f"wrote {write_predictions(predictions, out)}", soft_wrap=True)


@app.command()
def export(
    *,
    model: ModelArgument,
    out: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files ending in .pt2 or .onnx.")
    ],
    last: LastOption = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference allowed, relative to the largest logit.")
    ] = 1e-4,
) -> None:
    """Write a model for torch.export (.pt2) or ONNX (.onnx), checked against the model."""
    from eqcvt._check import choice
    from eqcvt.export import FORMATS
    from eqcvt.export import export as write

    for path in out:
        choice(f"the ending of {path}", path.suffix, FORMATS)
    found = load(model, last=last, device="cpu")
    for path in out:
        written = write(found.model, path, tolerance=tolerance)
        console().print(
            f"wrote {written.path} ({written.format}): largest difference from the model "
            f"{written.difference:.3g}, largest logit {written.scale:.3g}",
            markup=False,
            soft_wrap=True,
        )


PerStage = Annotated[list[int] | None, typer.Option(help="Once, or once for each stage.")]


@app.command()
def convert(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published state dict.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side, where the file does not tell.  [129]")
    ] = None,
    heads: PerStage = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a head.  [64]")] = None,
    embed_stride: PerStage = None,
    kv_stride: PerStage = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert the published e2cnn weights of EqCvT or CvT to a checkpoint folder of ours.

    Keys and shapes in FILE tell the model; the options are for models with other settings than
    the published ones.
    """
    from eqcvt._files import replacing_folder
    from eqcvt.cli.checkpoints import free
    from eqcvt.convert import load_published

    free(out, overwrite)
    model = load_published(
        file,
        image_size=image_size,
        heads=_one_or_all(heads),
        head_dim=head_dim,
        embed_stride=_one_or_all(embed_stride),
        kv_stride=_one_or_all(kv_stride) or 2,
    )
    with replacing_folder(out) as folder:
        model.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    architecture = model.config["architecture"]
    fit = (
        f", relative residual of the steerable filters {model.conversion_residual:.3g}"
        if architecture == "EqCvT"
        else ""
    )
    console().print(
        f"wrote {out}: {architecture}, {parameters:,} parameters{fit}",
        markup=False,
        soft_wrap=True,
    )


def _one_or_all(given: list[int] | None) -> int | list[int] | None:
    """Return one number for one, a list for several, None for none."""
    if not given:
        return None
    return given[0] if len(given) == 1 else given
