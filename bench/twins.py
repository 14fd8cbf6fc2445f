"""The picture of what is to be found: lenses, their twins with subhalos, and the difference.

``python -m bench.twins`` draws images of both simulated sets. A twin has the lens, source and noise
of its image and differs by the subhalos alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure

from eqcvt import plots
from eqcvt.data import Renderer, resolve
from eqcvt.data.render import one_thread

SETS = ("deeplense", "control")
ROWS = ("no substructure", "with subhalos", "difference / noise")


def twins(seed: int, indices: tuple[int, ...]) -> Figure:
    """Return a figure: a column for each image of each set, with its twin and what differs."""
    figure = Figure(figsize=(2 * len(SETS) * len(indices), 6.2), layout="constrained")
    axes = figure.subplots(len(ROWS), len(SETS) * len(indices), sharex=True, sharey=True)
    for name, part in zip(SETS, np.split(axes, len(SETS), axis=1), strict=True):
        renderer = Renderer(resolve(name))
        camera = renderer.config.camera
        half = camera.size * camera.pixel_scale / 2
        place = {"extent": (-half, half, -half, half)}
        for column, index in zip(part.T, indices, strict=True):
            with one_thread():
                smooth, clumpy = (renderer.render(renderer.scene(seed, index, k)) for k in (0, 1))
            for axis, image in zip(column, (smooth, clumpy), strict=False):
                seen = renderer.observe(image, seed, index).clip(0)
                axis.imshow(np.sqrt(seen), cmap="inferno", **place)  # arcs beside the bright core
            noise = np.sqrt((smooth + camera.sky) / camera.exposure)
            drawn = column[2].imshow(
                (clumpy - smooth) / noise, cmap="RdBu_r", vmin=-5, vmax=5, **place
            )
            column[0].set_title(f"{name}, {index}", fontsize=9)
            column[2].set_xlabel("arcsec", fontsize=8)
    for axis, label in zip(axes[:, 0], ROWS, strict=True):
        axis.set_ylabel(label, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=(-3, 0, 3), yticks=(-3, 0, 3))
        axis.tick_params(labelsize=7)
    figure.colorbar(drawn, ax=axes[2].tolist(), extend="both").ax.tick_params(labelsize=7)
    return figure


def main(
    out: Annotated[Path, typer.Argument()] = Path("bench/results/paper/twins.jpg"),
    seed: Annotated[int, typer.Option(help="Seed of the set.")] = 1,
    index: Annotated[list[int] | None, typer.Option(help="Image; several times.")] = None,
) -> None:
    """Draw twins of both sets."""
    print(f"wrote {plots.save(twins(seed, tuple(index or (2, 4, 5))), out, dpi=90)}")


if __name__ == "__main__":
    typer.run(main)
