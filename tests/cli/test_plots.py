"""Every picture has the axes it promises, labels with units, and the data it was given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import eqcvt
from eqcvt import plots

CLASSES = ("no_sub", "sub")


def written(figure: Figure, folder: Path) -> Figure:
    """Save a figure, and check that the file is a picture of more than one colour."""
    path = plots.save(figure, folder / "deep" / "picture.png")
    picture = np.asarray(Image.open(path).convert("L"))
    assert min(picture.shape) > 200
    assert picture.std() > 5
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]
    return figure


def test_training_curves(tmp_path: Path) -> None:
    history = [
        {"epoch": i, "train_loss": 1 / i, "val_loss": 2 / i, "val_accuracy": 1 - 0.5 / i}
        for i in (1, 2, 3)
    ]
    figure = written(plots.training_curves({"a": history, "b": history}), tmp_path)
    loss, accuracy = figure.axes
    assert (len(loss.lines), len(accuracy.lines)) == (4, 2)
    assert loss.get_ylabel() == "cross-entropy (nats)"
    assert accuracy.lines[0].get_ydata()[-1] == pytest.approx(100 * (1 - 0.5 / 3))


def test_roc_curves(tmp_path: Path) -> None:
    curve = {"fpr": [0, 0.5, 1], "tpr": [0, 0.9, 1]}
    two = {"classes": CLASSES, "roc": [curve] * 2, "auc": [0.7, 0.7]}
    three = {"classes": "abc", "roc": [curve] * 3, "auc": [0.7, None, 0.8]}
    (axes,) = written(plots.roc_curves({"x": two, "y": two}), tmp_path).axes
    assert len(axes.lines) == 3
    (axes,) = plots.roc_curves({"x": three}).axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["x, a: AUC 0.7000", "x, b: AUC undefined", "x, c: AUC 0.8000"]


def test_confusion_matrix(tmp_path: Path) -> None:
    figure = written(plots.confusion_matrix([[9, 1], [3, 7]], CLASSES), tmp_path)
    matrix = figure.axes[0]
    assert len(figure.axes) == 2
    assert [text.get_text() for text in matrix.texts][:2] == ["9\n90.0 %", "1\n10.0 %"]
    assert matrix.get_ylabel() == "true class"


def test_reliability_is_on_the_diagonal_for_a_calibrated_model(tmp_path: Path) -> None:
    confidence = np.array([0.75] * 8)
    labels = np.array([0] * 6 + [1] * 2)
    table = np.stack([confidence, 1 - confidence], axis=1)
    figure = written(plots.reliability({"model": table}, labels), tmp_path)
    line = figure.axes[0].lines[0]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (75, 75)
    assert line.get_label() == "model: error 0.0 %"


def test_logits_polar(tmp_path: Path) -> None:
    angles = [0.0, 90.0, 180.0, 270.0]
    still = torch.tensor([[[1.0, -1.0]]]).expand(4, 2, 2)
    moving = still + torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    logits: dict[str, Any] = {"still": still, "moving": moving}
    figure = written(plots.logits_polar(angles, logits, CLASSES, truth=CLASSES), tmp_path)
    assert len(figure.axes) == 4
    assert {axes.name for axes in figure.axes} == {"polar"}
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == ["still\nstandard deviation 0", "moving\nstandard deviation 1"]
    assert list(figure.axes[1].lines[0].get_ydata()) == [2, 0, 2, 0, 2]
    limits = {axes.get_ylim() for axes in figure.axes}
    assert len(limits) == 1


@pytest.mark.parametrize(("name", "axes"), [("eqcvt_c4", 2 * 4 + 2), ("cvt", 3 * 4 + 3)])
def test_attention_maps(name: str, axes: int, tmp_path: Path) -> None:
    model = eqcvt.create_model(name, in_channels=1, num_classes=2, image_size=33).eval()
    image = torch.rand(1, 1, 33, 33)
    maps = model.attention_maps(image)
    tokens = model.token_grids, model.token_places
    figure = plots.attention_maps(image[0], maps, *tokens, pixel_scale=0.06)
    written(figure, tmp_path)
    assert len(figure.axes) == axes
    assert any("arcsec" in a.get_xlabel() for a in figure.axes)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_is_drawn_where_its_keys_are(scale: float | None, tmp_path: Path) -> None:
    image = np.zeros((8, 8))
    image[2:5, 5:8] = 1
    tokens = [((2, 2), (3, 3))], [((2, 3), (0, 3))]
    figure = plots.attention_maps(image, [torch.ones(1, 4, 9) / 9], *tokens, pixel_scale=scale)
    axes = written(figure, tmp_path).axes[1]
    # Pixels from the upper left corner: keys on 0, 3 and 6 cover -1 to 8.
    covered = np.array([-1, 8, 8, -1])
    limits = np.array([0, 8, 8, 0])
    outline = axes.collections[0].get_paths()[0].vertices
    corner = np.array([5.5, 2.5]) - 0.7  # where the image reaches 0.3
    if scale:
        move = np.array([-4, -4, 4, 4])
        covered, limits = (scale * (edges * [1, 1, -1, -1] + move) for edges in (covered, limits))
        corner = scale * (corner * [1, -1] + [-4, 4])
    assert axes.images[0].get_extent() == pytest.approx(list(covered))
    assert [*axes.get_xlim(), *axes.get_ylim()] == pytest.approx(list(limits))
    assert outline[:, 0].min() == pytest.approx(corner[0])
    assert (outline[:, 1].max() if scale else outline[:, 1].min()) == pytest.approx(corner[1])


@pytest.mark.parametrize(("name", "size"), [("eqcvt_c4", 65), ("cvt", 65), ("cvt", 64)])
def test_tokens_are_where_the_model_says(name: str, size: int) -> None:
    model = eqcvt.create_model(name, in_channels=1, image_size=size).eval()
    x = torch.rand(1, 1, size, size, requires_grad=True)
    tokens = model.front(x)
    for stage, (rows, _), places in zip(
        model.stages, model.token_grids, model.token_places, strict=True
    ):
        tokens = stage.embed(tokens)
        row, column = rows[0] // 2, rows[1] // 2 - 1
        (slope,) = torch.autograd.grad(
            tokens[0, :, row, column].square().sum(), x, retain_graph=True
        )
        seen = slope[0, 0].nonzero().double()
        middle = (seen.amin(0) + seen.amax(0)) / 2
        (first, step), (first_key, key_step) = places
        assert middle.tolist() == [first + row * step, first + column * step]
        assert (first_key, key_step) == (first, 2 * step)


def test_attention_that_fits_no_grid_is_refused() -> None:
    tokens = [((2, 2), (3, 3))], [((2, 3), (0, 3))]
    with pytest.raises(ValueError, match="fits none of the token grids"):
        plots.attention_maps(np.eye(8), [torch.ones(1, 5, 9)], *tokens)


def test_attention_of_several_images_is_refused() -> None:
    tokens = [((2, 2), (3, 3))], [((2, 3), (0, 3))]
    with pytest.raises(ValueError, match=r"of 2 images: give \[m\[:1\] for m in maps\]"):
        plots.attention_maps(np.eye(8), [torch.ones(2, 1, 4, 9) / 9], *tokens)


def test_sample_grid(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((5, 3, 16, 16))
    sure = np.array([[0.9, 0.1]] * 5)
    labels = [0, 1, 0, 1, 0]
    grid = plots.sample_grid(images, labels, CLASSES, probabilities=sure, columns=3)
    figure = written(grid, tmp_path)
    assert len(figure.axes) == 6
    titles = [axes.get_title() for axes in figure.axes[:5]]
    assert titles[:2] == ["no_sub\n→ no_sub 90 %", "sub\n→ no_sub 90 %"]
    right, wrong = (axes.title.get_color() for axes in figure.axes[:2])
    assert right != wrong


def test_pyplot_is_not_touched(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    plots.save(plots.sample_grid(np.zeros((1, 8, 8)), [0], CLASSES), tmp_path / "a.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "picture.unknown"
    path.write_text("old")
    with pytest.raises(ValueError, match="not supported"):
        plots.save(plots.sample_grid(np.zeros((1, 8, 8)), [0], CLASSES), path)
    assert path.read_text() == "old"


def test_the_title_of_a_single_model_s_logits_fits_the_picture() -> None:
    figure = plots.logits_polar([0, 90, 180, 270], {"CvT": torch.rand(4, 1, 3)}, ("a", "b", "c"))
    FigureCanvasAgg(figure).draw()
    title = figure.get_suptitle()
    extent = next(t for t in figure.texts if t.get_text() == title).get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
