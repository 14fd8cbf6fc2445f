"""The evaluation of one or several models on one set of images: numbers as JSON, and pictures."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.markup import escape
from rich.table import Table

import eqcvt
from eqcvt import plots
from eqcvt.data import LensingImages, to_unit
from eqcvt.models import VisionModel
from eqcvt.train import evaluate, logits_over_angles, predict_logits
from eqcvt.train.evaluate import check_fit
from eqcvt.train.folder import OF_ALL, OF_ONE, stem

Progress = Callable[[str], None]


def evaluate_models(
    models: Mapping[str, VisionModel],
    data: LensingImages,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    progress: Progress = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Return for each model's name its parameters and what ``eqcvt.train.evaluate`` measures.

    Raises:
        ValueError: a model that does not fit the images; the message names the model.
    """
    results = {}
    for name, model in models.items():
        check_fit(model, data, name)
        progress(f"evaluating {name} on {len(data)} images")
        found = evaluate(model, data, device=device, batch_size=batch_size, rotations=True)
        results[name] = {"parameters": sum(p.numel() for p in model.parameters()), **found}
    return results


def origin() -> dict[str, Any]:
    """Return what makes a recorded number again: command, versions, platform, threads."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {
            "eqcvt": eqcvt.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def pixel_scale(data: LensingImages) -> float | None:
    """Return arc seconds per pixel of simulated images, or None where they are not known."""
    scale = data.config.get("camera", {}).get("pixel_scale") if data.config else None
    return None if scale is None else float(scale)


def one_of_each(data: LensingImages) -> list[int]:
    """Return the index of the first image of every class."""
    return [int(np.flatnonzero(data.labels == k)[0]) for k in np.unique(data.labels)]


def draw(
    models: Mapping[str, VisionModel],
    results: Mapping[str, Mapping[str, Any]],
    data: LensingImages,
    out: Path,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    angles: int = 24,
    samples: int = 12,
    progress: Progress = lambda _: None,
) -> list[Path]:
    """Write the pictures of an evaluation into the folder ``out``.

    Args:
        models: by name, on ``device``.
        results: what ``evaluate_models`` returned for them.
        data: the images they were evaluated on.
        out: the folder.
        device: where the models are.
        batch_size: images per forward pass.
        angles: number of rotations over the full turn in the polar plot.
        samples: images in the sample grid.
        progress: is told what is being drawn.

    Returns:
        The files: ROC, reliability, logits against angle, and for each model a confusion matrix,
        attention maps and a grid of images with predictions.
    """
    scale = pixel_scale(data)
    chosen = one_of_each(data)
    images = torch.from_numpy(data.subset(chosen).images).to(device)
    roc, turned, reliable = (out / name for name in OF_ALL)
    files = [plots.save(plots.roc_curves(results), roc)]

    progress("drawing logits against angle")
    turn = [360 * i / angles for i in range(angles)]
    logits = {
        name: logits_over_angles(model, images, turn).detach().cpu()
        for name, model in models.items()
    }
    truth = [data.classes[int(data.labels[i])] for i in chosen]
    polar = plots.logits_polar(turn, logits, data.classes, truth=truth)
    files.append(plots.save(polar, turned))

    probabilities = {}
    shown = np.linspace(0, len(data) - 1, min(samples, len(data))).round().astype(int)
    for name, model in models.items():
        progress(f"drawing {name}")
        table = predict_logits(model, data, device=device, batch_size=batch_size)
        probabilities[name] = table.double().softmax(dim=-1).cpu().numpy()
        confused, sampled, attended = (out / picture.format(stem(name)) for picture in OF_ONE)
        accuracy = 100 * float(results[name]["accuracy"])
        title = f"{name}: accuracy {accuracy:.1f} %"
        confusion = plots.confusion_matrix(results[name]["confusion"], data.classes, title=title)
        files.append(plots.save(confusion, confused))
        part = data.subset(shown.tolist())
        grid = plots.sample_grid(
            part.images,
            part.labels,
            data.classes,
            probabilities=probabilities[name][shown],
            pixel_scale=scale,
            title=f"{name}: true class → prediction",
        )
        files.append(plots.save(grid, sampled))
        files.append(attended)
        _draw_attention(name, model, data, attended, device)
    rely = plots.reliability(probabilities, data.labels)
    files.append(plots.save(rely, reliable))
    return files


def _draw_attention(
    name: str,
    model: VisionModel,
    data: LensingImages,
    path: Path,
    device: str | torch.device,
) -> None:
    """Draw the attention of one image of the last class."""
    index = one_of_each(data)[-1]
    image = to_unit(torch.from_numpy(data.subset([index]).images)).to(device)
    with torch.no_grad():
        maps = model.attention_maps(image)
    figure = plots.attention_maps(
        image[0],
        maps,
        model.token_grids,
        model.token_places,
        pixel_scale=pixel_scale(data),
        title=name,
    )
    plots.save(figure, path)


def whole(result: Mapping[str, Any]) -> bool:
    """Return whether an evaluation that was kept has all that one has today."""
    return "accuracy_22" in result["rotation"]


def summary(
    results: Mapping[str, Mapping[str, Any]], *, title: str = "", full: bool = True
) -> Table:
    """Return the table of an evaluation, a row for each model.

    Args:
        results: what ``evaluate_models`` returned, perhaps with the training's ``seconds``.
        title: text above the table.
        full: show calibration and the spread over the model's group too.
    """

    def turned(name: str, form: Callable[[float], str]) -> Callable[[Mapping[str, Any]], str]:
        """Return what shows a number that evaluations of an older version lack."""
        return lambda r: form(r["rotation"][name]) if name in r["rotation"] else "-"

    timed = any("seconds" in r for r in results.values())
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "para-\nmeters": lambda r: f"{r['parameters']:,}",
        "accu-\nracy": lambda r: f"{100 * r['accuracy']:.1f} %",
        "accu-\nracy\n+22.5°": turned("accuracy_22", lambda share: f"{100 * share:.1f} %"),
        "AUC": lambda r: "-" if None in r["auc"] else f"{float(np.mean(r['auc'])):.3f}",
        "cal.\nerror": lambda r: f"{100 * r['ece']:.1f} %",
        "std of\nlogits\n8x45°": lambda r: f"{r['rotation']['std_45']:.3f}",
        "the\nsame\n+22.5°": turned("std_22", lambda spread: f"{spread:.3f}"),
        "std of\nlogits\ngroup": lambda r: f"{r['rotation']['std_group']:.2g}",
        "resi-\ndual\ngroup": lambda r: f"{r['rotation']['residual_group']:.2g}",
        "train-\ning, s": lambda r: f"{r['seconds']:.0f}" if "seconds" in r else "-",
    }
    left_out = set() if full else {"cal.\nerror", "std of\nlogits\ngroup"}
    left_out |= set() if timed else {"train-\ning, s"}
    shown = {head: cell for head, cell in columns.items() if head not in left_out}
    table = Table(title=escape(title) or None, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("model", overflow="fold", min_width=12)
    for head in shown:
        table.add_column(head, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(escape(name), *(cell(result) for cell in shown.values()))
    return table
