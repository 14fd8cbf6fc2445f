"""``eqcvt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eqcvt.cli.app import app, console


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("demo"),
    size: Annotated[int, typer.Option(help="Pixels a side.  [65]", show_default=False)] = 0,
    images: Annotated[int, typer.Option(help="Training images.  [1000]", show_default=False)] = 0,
    test_images: Annotated[
        int, typer.Option(help="Held-out images.  [300]", show_default=False)
    ] = 0,
    epochs: Annotated[int, typer.Option(help="Epochs of each model.  [8]", show_default=False)] = 0,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:i")] = "auto",
) -> None:
    """Simulate lenses, train EqCvT, its exact variant and CvT, evaluate and draw, in minutes.

    The same command again takes what is finished and goes on with what is not.
    """
    from eqcvt import report
    from eqcvt.demo import RESULTS, Demo, run, verdict

    asked = {"size": size, "images": images, "test_images": test_images, "epochs": epochs}
    chosen = Demo(out=out, device=device, **{k: v for k, v in asked.items() if v})
    screen = console()
    content = run(chosen, lambda text: screen.print(text, markup=False, soft_wrap=True))
    title = f"{chosen.test_images} held-out images; residual over quarter turns"
    screen.print(report.summary(content["models"], title=title, full=False))
    screen.print(verdict(content["models"]), markup=False, soft_wrap=True)
    if content["packaged"]:
        title = f"trained models that come with eqcvt, {chosen.test_images} fresh images"
        screen.print(report.summary(content["packaged"], title=title, full=False))
    screen.print(
        f"{content['seconds']:.0f} s; pictures in {out / 'pictures'}, numbers in {out / RESULTS}",
        markup=False,
        soft_wrap=True,
    )
