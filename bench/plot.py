"""Draws bench/results/<device>.csv: python -m bench.plot bench/results/amd-epyc.csv"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eqcvt._files import replacing

COLOURS = {
    "escnn": "#b5b5b5",
    "eager": "#7f9ec9",
    "compile": "#4d6fa3",
    "native": "#d1603d",
    "triton": "#3d8f6d",
}
PANELS = (
    ("EqCvT", "training", "EqCvT, training step"),
    ("EqCvT", "inference", "EqCvT, inference"),
    ("lift", "training", "steerable block, training step"),
    ("conv_attention", "eqcvt training", "attention block, training step"),
)


def draw(path: Path) -> Path:
    """Draw the median times of the largest greyscale case of each panel, and return the picture."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.2), layout="constrained")
    for axis, (op, case, title) in zip(axes, PANELS, strict=True):
        mine = [row for row in rows if (row["op"], row["case"]) == (op, case)]
        shapes = {row["shape"] for row in mine if op == "conv_attention" or "x1x" in row["shape"]}
        if not shapes:
            axis.set_axis_off()
            continue
        shape = max(shapes, key=lambda s: [int(n) for n in s.split("x")])
        times = {
            row["implementation"]: float(row["median_ms"]) for row in mine if row["shape"] == shape
        }
        names = [name for name in COLOURS if name in times]
        bars = axis.barh(names, [times[n] for n in names], color=[COLOURS[n] for n in names])
        labels = [f"{times[n]:.0f}" if times[n] >= 100 else f"{times[n]:.3g}" for n in names]
        axis.bar_label(bars, labels, padding=3)
        axis.invert_yaxis()
        axis.set(title=f"{title}\n{shape}", xlabel="ms")
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, {rows[0]['versions']}", fontsize=8)
    picture = path.with_suffix(".png")
    with replacing(picture) as new:
        figure.savefig(new, dpi=110, format="png")
    plt.close(figure)
    return picture


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
