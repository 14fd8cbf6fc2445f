"""Pictures of training, evaluation and equivariance, as matplotlib ``Figure`` objects.

Nothing here touches pyplot or its global state: a function returns a ``Figure``, and ``save``
writes it whole or not at all. Colours are Okabe and Ito's, told apart by every kind of colour
vision; lines also differ in dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from eqcvt._files import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


def save(figure: Figure, path: str | Path, *, dpi: int = 130) -> Path:
    """Write ``figure`` to ``path`` (its ending decides the format), whole or not at all."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    return path


def training_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss and held-out accuracy against the epoch, one colour for each run.

    Args:
        histories: for each run's name the per-epoch records of ``metrics.json`` (keys ``epoch``,
            ``train_loss``, ``val_loss``, ``val_accuracy``).

    Returns:
        A figure with two axes.
    """
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for i, (name, history) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in history]
        colour = COLOURS[i % len(COLOURS)]
        mark = "o" if len(epochs) < 25 else None
        for key, dash, what in (("train_loss", "-", "training"), ("val_loss", "--", "held out")):
            values = [row[key] for row in history]
            label = f"{name}, {what}" if len(histories) > 1 else what
            loss.plot(epochs, values, dash, color=colour, label=label, marker=mark, markersize=3)
        percent = [100 * row["val_accuracy"] for row in history]
        accuracy.plot(epochs, percent, color=colour, label=name, marker=mark, markersize=3)
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)", title="Held-out accuracy")
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def roc_curves(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """True- against false-positive rate for each model and class; of two classes for the second.

    The curves of two classes mirror each other.

    Args:
        results: for each model's name what ``eqcvt.train.evaluate`` returned.

    Returns:
        A figure with one axes.
    """
    figure = Figure(figsize=(5.4, 5.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, result) in enumerate(results.items()):
        classes = list(result["classes"])
        drawn = range(len(classes)) if len(classes) > 2 else [len(classes) - 1]
        for j in drawn:
            curve = result["roc"][j]
            what = f"{name}, {classes[j]}" if len(classes) > 2 else name
            axes.plot(
                [100 * v for v in curve["fpr"]],
                [100 * v for v in curve["tpr"]],
                DASHES[j % len(DASHES)] if len(classes) > 2 else DASHES[i % len(DASHES)],
                color=COLOURS[i % len(COLOURS)],
                label=f"{what}: AUC {_or_none(result['auc'][j], '.4f')}",
            )
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=0.8)
    axes.set(xlabel="false positives (%)", ylabel="true positives (%)", aspect="equal")
    axes.set(xlim=(-1, 101), ylim=(-1, 101), title="Receiver operating characteristic")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def confusion_matrix(counts: ArrayLike, classes: Sequence[str], *, title: str = "") -> Figure:
    """Counts of true (rows) against predicted (columns) classes, shaded by the share of the row.

    Args:
        counts: ``[K, K]``, row = true class.
        classes: the ``K`` names.
        title: text above the picture.

    Returns:
        A figure with two axes: the matrix and its colour bar.
    """
    table = np.asarray(counts, dtype=np.float64)
    share = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    size = 2.6 + 0.9 * len(classes)
    figure = Figure(figsize=(size + 0.9, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(table):
        axes.text(
            column,
            row,
            f"{value:.0f}\n{share[row, column]:.1f} %",
            ha="center",
            va="center",
            color="white" if share[row, column] < 55 else "black",
        )
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes, rotation=90, va="center")
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.85)
    return figure


def reliability(
    probabilities: Mapping[str, ArrayLike], labels: ArrayLike, *, bins: int = 15
) -> Figure:
    """Accuracy against confidence: on the diagonal a model is right as often as it says.

    Args:
        probabilities: for each model's name the softmax outputs ``[N, K]``.
        labels: true classes ``[N]``.
        bins: number of equal bins of the confidence from 0 to 1.

    Returns:
        A figure with two axes: the curve and the number of images per bin.
    """
    truth = np.asarray(labels)
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    curve, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    low = 100.0
    edges = np.linspace(0, 100, bins + 1)
    for i, (name, values) in enumerate(probabilities.items()):
        table = np.asarray(values, dtype=np.float64)
        low = min(low, 100 / table.shape[1])
        confidence = 100 * table.max(axis=1)
        right = table.argmax(axis=1) == truth
        which = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
        number = np.bincount(which, minlength=bins)
        filled = number > 0
        mean = np.bincount(which, confidence, minlength=bins)[filled] / number[filled]
        share = 100 * np.bincount(which, right, minlength=bins)[filled] / number[filled]
        error = float(np.sum(number[filled] * np.abs(mean - share)) / max(len(truth), 1))
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        curve.plot(
            mean, share, dash, marker="o", color=colour, label=f"{name}: error {error:.1f} %"
        )
        counts.stairs(number, edges, color=colour, linestyle=dash)
    curve.plot([low, 100], [low, 100], color="0.6", linewidth=0.8)
    curve.set(ylabel="accuracy (%)", ylim=(0, 103), title="Reliability")
    curve.legend(fontsize=8, loc="lower right")
    counts.set(xlabel="confidence (%)", ylabel="images", xlim=(low - 1, 101))
    for axes in (curve, counts):
        axes.grid(alpha=0.3)
    return figure


def logits_polar(
    angles: Sequence[float],
    logits: Mapping[str, Tensor | NDArray[Any]],
    classes: Sequence[str],
    *,
    truth: Sequence[str] = (),
) -> Figure:
    """Logits against the rotation angle of the input: models side by side, one row per image.

    An invariant model draws circles. Each panel's title gives the standard deviation over the
    angles, averaged over the logits.

    Args:
        angles: ``A`` angles in degrees, over the full turn.
        logits: for each model's name ``[A, B, K]``.
        classes: the ``K`` names.
        truth: true class name of each of the ``B`` images, written beside the row.

    Returns:
        A figure with ``B x len(logits)`` polar axes.
    """
    tables = {name: np.asarray(torch.as_tensor(v).float()) for name, v in logits.items()}
    rows = next(iter(tables.values())).shape[1]
    width = max(5.5, 3.5 * len(tables))  # one panel is narrower than the title
    figure = Figure(figsize=(width, 3.8 * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(rows, len(tables), squeeze=False, subplot_kw={"projection": "polar"})
    turn = np.radians([*angles, angles[0] + 360])
    lowest = min(float(t.min()) for t in tables.values())
    highest = max(float(t.max()) for t in tables.values())
    span = max(highest - lowest, 1e-3)
    rings = [r for r in MaxNLocator(5).tick_values(lowest, highest) if lowest <= r <= highest]
    for column, (name, table) in enumerate(tables.items()):
        for row in range(rows):
            axes = grid[row, column]
            assert isinstance(axes, PolarAxes)
            for k, label in enumerate(classes):
                radius = table[:, row, k]
                closed = np.append(radius, radius[0])
                axes.plot(
                    turn, closed, DASHES[k % len(DASHES)], color=COLOURS[k % len(COLOURS)],
                    label=label,
                )  # fmt: skip
            spread = float(table[:, row].std(axis=0).mean())
            axes.set_ylim(lowest - 0.35 * span, highest + 0.05 * span)
            axes.set_rlabel_position(67.5)
            axes.set_yticks(rings)
            axes.tick_params(labelsize=7)
            axes.set_title(f"{name}\nstandard deviation {spread:.3g}", fontsize=9, pad=8)
            if column == 0 and truth:
                axes.text(
                    -0.22, 0.5, f"true class: {truth[row]}", transform=axes.transAxes,
                    rotation=90, ha="center", va="center", fontsize=9,
                )  # fmt: skip
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, [f"logit of {n}" for n in names], loc="outside lower center",
        ncols=min(len(names), round(width / 1.8)), fontsize=8,
    )  # fmt: skip
    figure.suptitle("Logit (radius) against the rotation of the image (degrees)", fontsize=10)
    return figure


def attention_maps(
    image: Tensor | NDArray[Any],
    maps: Sequence[Tensor],
    token_grids: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    token_places: Sequence[tuple[tuple[float, int], tuple[float, int]]],
    *,
    pixel_scale: float | None = None,
    title: str = "",
) -> Figure:
    """Attention weights over one image: a row for each transformer block, a column for each head.

    They are averaged over all queries.

    Args:
        image: ``[H, W]`` or ``[C, H, W]``.
        maps: for each block ``[heads, N, M]`` (or ``[1, heads, N, M]``), rows summing to one.
        token_grids: for each stage ``((Hq, Wq), (Hk, Wk))`` with ``N = Hq Wq`` and ``M = Hk Wk``.
        token_places: for each stage the pixel of the first query and the pixels to the next, and
            the same of its keys, as the model's ``token_places``.
        pixel_scale: arc seconds per pixel; None labels the axes in pixels.
        title: text above the picture.

    Returns:
        A figure with ``len(maps) x (1 + most heads)`` axes and a colour bar for each row.

    Raises:
        ValueError: a block's map fits none of ``token_grids``, or is of several images.
    """
    for several in (len(m) for m in maps if m.ndim == 4 and len(m) != 1):
        raise ValueError(f"the attention maps are of {several} images: give [m[:1] for m in maps]")
    weights = [m.detach().float().reshape(-1, *m.shape[-2:]) for m in maps]
    columns = 1 + max(m.shape[0] for m in weights)
    figure = Figure(figsize=(2.5 * columns + 0.9, 2.5 * len(weights) + 0.6), layout="constrained")
    grid = figure.subplots(len(weights), columns, squeeze=False, sharex=True, sharey=True)
    picture, extent, unit = _picture(image, pixel_scale)
    left, right, bottom, top = extent
    height, width = (int(n) for n in picture.shape[:2])

    def x_at(pixels: float) -> float:  # from the left edge
        return left + pixels / width * (right - left)

    def y_at(pixels: float) -> float:  # from the upper edge
        return top + pixels / height * (bottom - top)

    for row, block in enumerate(weights):
        stage = _stage_of(block, token_grids)
        (_, (hk, wk)), (_, (first, step)) = token_grids[stage], token_places[stage]
        relative = (block.mean(dim=1) * (hk * wk)).reshape(-1, hk, wk).cpu().numpy()
        grid[row, 0].imshow(picture, cmap="gray", extent=extent)
        grid[row, 0].set_ylabel(f"block {row + 1}\ny ({unit})", fontsize=8)
        if row == 0:
            grid[row, 0].set_title("image", fontsize=9)
        edge = first + 0.5 - step / 2  # of the first key's square
        covered = (x_at(edge), x_at(edge + wk * step), y_at(edge + hk * step), y_at(edge))
        shown = None
        for head in range(columns - 1):
            axes = grid[row, head + 1]
            if head >= len(relative):
                axes.set_axis_off()
                continue
            shown = axes.imshow(
                relative[head], cmap="viridis", extent=covered, interpolation="nearest",
                vmin=0, vmax=float(relative.max()),
            )  # fmt: skip
            axes.contour(
                [x_at(column + 0.5) for column in range(width)],
                [y_at(line + 0.5) for line in range(height)],
                picture if picture.ndim == 2 else picture.mean(axis=-1),
                levels=[0.3 * float(picture.max())], colors="white", linewidths=0.6,
            )  # fmt: skip
            axes.set(xlim=(left, right), ylim=(bottom, top), facecolor="0.7")
            axes.set_title(f"head {head + 1}", fontsize=9)
        if shown is not None:
            bar = figure.colorbar(shown, ax=list(grid[row]), shrink=0.85, pad=0.01)
            bar.set_label("weight / uniform", fontsize=8)
            bar.ax.tick_params(labelsize=7)
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
    for axes in grid[-1]:
        axes.set_xlabel(f"x ({unit})", fontsize=8)
    what = "attention averaged over all queries"
    figure.suptitle(f"{title}: {what}" if title else what, fontsize=10)
    return figure


def sample_grid(
    images: Tensor | NDArray[Any],
    labels: ArrayLike,
    classes: Sequence[str],
    *,
    probabilities: ArrayLike | None = None,
    columns: int = 6,
    pixel_scale: float | None = None,
    title: str = "",
) -> Figure:
    """Images with their true class and, if given, what a model says and how surely.

    Args:
        images: ``[N, H, W]`` or ``[N, C, H, W]``, any range.
        labels: true classes ``[N]``.
        classes: names of the classes.
        probabilities: softmax outputs ``[N, K]``; wrong predictions get a coloured title and frame.
        columns: images in a row.
        pixel_scale: arc seconds per pixel; None labels the axes in pixels.
        title: text above the picture.

    Returns:
        A figure with ``N`` axes in full rows.
    """
    truth = np.asarray(labels).astype(int)
    said = None if probabilities is None else np.asarray(probabilities)
    columns = max(1, min(columns, len(truth)))
    rows = max(1, math.ceil(len(truth) / columns))
    figure = Figure(figsize=(1.75 * columns + 0.5, 2.05 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    unit = "pixels"
    for i, axes in enumerate(grid.flat):
        if i >= len(truth):
            axes.set_axis_off()
            continue
        picture, extent, unit = _picture(images[i], pixel_scale)
        axes.imshow(picture, cmap="gray", extent=extent)
        axes.tick_params(labelsize=7)
        text, colour = classes[truth[i]], "black"
        if said is not None:
            guess = int(said[i].argmax())
            text += f"\n→ {classes[guess]} {100 * said[i, guess]:.0f} %"
            if guess != truth[i]:
                colour = COLOURS[1]
                for spine in axes.spines.values():
                    spine.set(color=colour, linewidth=2)
        axes.set_title(text, fontsize=8, color=colour)
    for axes in grid[-1]:
        axes.set_xlabel(f"x ({unit})", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"y ({unit})", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _or_none(value: float | None, form: str) -> str:
    """Format a number that may be undefined."""
    return "undefined" if value is None else format(value, form)


def _picture(
    image: Tensor | NDArray[Any], pixel_scale: float | None
) -> tuple[NDArray[Any], tuple[float, float, float, float], str]:
    """Return the image as ``imshow`` wants it, its extent and the unit of that extent."""
    array = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if array.ndim == 3:
        array = array[0] if array.shape[0] != 3 else np.moveaxis(array, 0, -1)
    array = array.astype(np.float64)
    low, high = float(array.min()), float(array.max())
    array = (array - low) / max(high - low, 1e-12)
    height, width = array.shape[:2]
    if pixel_scale is None:
        return array, (0.0, float(width), float(height), 0.0), "pixels"
    x, y = width * pixel_scale / 2, height * pixel_scale / 2
    return array, (-x, x, -y, y), "arcsec"


def _stage_of(block: Tensor, token_grids: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> int:
    """Return the stage whose number of queries and keys are the block's."""
    for stage, (queries, keys) in enumerate(token_grids):
        if block.shape[-2:] == (math.prod(queries), math.prod(keys)):
            return stage
    raise ValueError(
        f"an attention map of {tuple(block.shape[-2:])} queries and keys fits none of the token "
        f"grids {list(token_grids)}"
    )
