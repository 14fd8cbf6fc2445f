"""``eqcvt export`` and ``eqcvt convert``, and the options that commands on a model share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eqcvt.cli.app import app, console
from eqcvt.cli.checkpoints import free, help_text, load

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help=help_text("A run folder or a checkpoint folder"))
]
LastOption = Annotated[
    bool, typer.Option("--last", help="Of a run take the last epoch, not the best.")
]
DeviceOption = Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:i")]


@app.command()
def export(
    *,
    model: ModelArgument,
    out: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files ending in .pt2 or .onnx.")
    ],
    last: LastOption = False,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a logit that is allowed.")
    ] = 1e-4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Write a model for torch.export (.pt2) or ONNX (.onnx), checked against the model."""
    from eqcvt._check import choice
    from eqcvt.export import FORMATS
    from eqcvt.export import export as write

    for path in out:
        choice(f"the ending of {path}", path.suffix, FORMATS)
        free(path, overwrite)
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
        int | None, typer.Option(help="Pixels a side, where the file does not tell (default: 129).")
    ] = None,
    heads: PerStage = None,
    head_dim: Annotated[
        int | None,
        typer.Option(help="Channels of a head (default: 64, or the width over --heads)."),
    ] = None,
    embed_stride: PerStage = None,
    kv_stride: PerStage = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert the published e2cnn weights of EqCvT or CvT to a checkpoint folder of ours.

    Keys and shapes in FILE tell the model; the options are for models with other settings than
    the published ones.
    """
    from eqcvt._files import replacing_folder
    from eqcvt.convert import load_published

    free(out, overwrite, folder=True)
    step = _one_or_all(kv_stride)
    model = load_published(
        file,
        image_size=image_size,
        heads=_one_or_all(heads),
        head_dim=head_dim,
        embed_stride=_one_or_all(embed_stride),
        kv_stride=2 if step is None else step,
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
