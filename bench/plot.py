"""Draws bench/results/<device>.csv: python -m bench.plot bench/results/<device>.csv

Two pictures, ``<device>.png`` with the times of each kind at the shape that most were timed at, of
several the largest, and, where a model was timed at several numbers of images or sizes,
``<device>-scaling.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.rows import Row, origins, read
from eqcvt._files import replacing

COLOURS = {
    "escnn": "#b5b5b5",
    "escnn-compile": "#8c8c8c",
    "eager": "#a9c0df",
    "compile": "#7f9ec9",
    "compile-max": "#4d6fa3",
    "flash-64": "#a9c0df",
    "cudnn-64": "#7f9ec9",
    "flex-64": "#4d6fa3",
    "flash-32": "#d3d3d3",
    "cudnn-32": "#b5b5b5",
    "native": "#d1603d",
    "native-compile": "#b0472a",
    "native-graph": "#7d2f1a",
    "triton": "#3d8f6d",
    "triton-compile": "#2c6e53",
    "triton-graph": "#1c4a37",
    "auto": "#c79a2b",
    "auto-compile": "#9a7518",
    "auto-graph": "#6b500d",
}
PANELS = (
    ("EqCvT", "training", "EqCvT, training"),
    ("EqCvT", "inference", "EqCvT, inference"),
    ("EqCvT", "step", "EqCvT, whole step"),
    ("lift", "training", "steerable block, training"),
    ("lift", "inference", "steerable block, inference"),
    ("conv_attention", "core training", "attention core, both ways"),
    ("conv_attention", "eqcvt training", "attention block, training"),
    ("mlp_block", "eqcvt training", "MLP block, training"),
)
COLUMNS = 4
# Channels of the images that the bars show, where there are some.
CHANNELS = {"bfloat16": "x3x", "float32": "x1x"}
# Both axes are logarithmic; these are the marks.
MEASURES = {"images in a batch": 0, "side of the image in pixels": 3}


def numbers(shape: str) -> list[int]:
    """Return a shape's sizes."""
    return [int(n) for n in shape.split("x")]


def of_interest(rows: list[Row]) -> list[Row]:
    """Return the rows of one dtype: bfloat16 where there is any, else float32."""
    found = {row["dtype"] for row in rows}
    return [
        row for row in rows if row["dtype"] == ("bfloat16" if "bfloat16" in found else "float32")
    ]


def shown(number: float) -> str:
    """Return three digits of a number, or all before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def bars(rows: list[Row]) -> Any:
    """Return a figure of the median times of each panel."""
    panels = [
        (title, mine)
        for op, case, title in PANELS
        if (mine := [row for row in rows if (row["op"], row["case"]) == (op, case)])
    ]
    lines = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(13, 3.2 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, mine) in zip(axes.flat, panels, strict=False):
        standard = [row for row in mine if "129x129" in row["shape"]] or mine
        channels = CHANNELS[rows[0]["dtype"]]
        common = [row for row in standard if channels in row["shape"]] or standard
        shapes = [row["shape"] for row in common]
        shape = max(shapes, key=lambda shape: (shapes.count(shape), numbers(shape)))
        times = {r["implementation"]: float(r["median_ms"]) for r in mine if r["shape"] == shape}
        names = [name for name in COLOURS if name in times]
        drawn = axis.barh(names, [times[n] for n in names], color=[COLOURS[n] for n in names])
        axis.bar_label(drawn, [shown(times[n]) for n in names], padding=3)
        axis.invert_yaxis()
        axis.set(title=f"{title}\n{shape}", xlabel="ms")
        axis.margins(x=0.18)
    return figure


def scaling(rows: list[Row]) -> Any:
    """Return a figure of images per second against batch and size, or None with nothing to show."""
    panels = []
    for label, axis_of_shape in MEASURES.items():
        for case in ("training", "inference"):
            mine = [row for row in rows if (row["op"], row["case"]) == ("EqCvT", case)]
            if (chosen := _series(mine, axis_of_shape)) is not None:
                panels.append((label, case, *chosen))
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    names = [name for name in COLOURS if any(name in lines for *_, lines in panels)]
    for axis, (label, case, fixed, lines) in zip(axes.flat, panels, strict=True):
        for name in names:
            points = sorted(lines.get(name, {}).items())
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name)
        ticks = sorted({x for points in lines.values() for x in points})
        axis.set(xscale="log", yscale="log", title=f"EqCvT, {case}\n{fixed}", xlabel=label)
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.minorticks_off()
    axes[0, 0].set_ylabel("images per second")
    figure.legend(names, loc="outside right center", frameon=False)
    return figure


def _series(rows: list[Row], axis: int) -> tuple[str, dict[str, dict[int, float]]] | None:
    """Return what stays fixed and each implementation's points, of the most points there are."""
    families: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        sizes = numbers(row["shape"])
        free = (axis,) if axis == 0 else (2, 3)
        fixed = "x".join("n" if i in free else str(size) for i, size in enumerate(sizes))
        lines = families.setdefault(fixed, {})
        lines.setdefault(row["implementation"], {})[sizes[axis]] = float(row["images_per_s"])
    best = max(families.items(), key=lambda item: _width(item[1]), default=None)
    return best if best is not None and _width(best[1]) > 1 else None


def _width(lines: dict[str, dict[int, float]]) -> int:
    return max(len(points) for points in lines.values())


def draw(path: Path) -> list[Path]:
    """Draw the pictures of a file's rows beside it, and return them."""
    rows = of_interest(read(path))
    pictures = []
    for suffix, figure in (("", bars(rows)), ("-scaling", scaling(rows))):
        if figure is None:
            continue
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        about = f"{rows[0]['device']}, {rows[0]['dtype']}, {origins(rows, 'versions')}"
        figure.suptitle(about, fontsize=8)
        picture = path.with_name(f"{path.stem}{suffix}.png")
        with replacing(picture) as new:
            figure.savefig(new, dpi=110, format="png")
        plt.close(figure)
        pictures.append(picture)
    return pictures


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*draw(Path(name)), sep="\n")
