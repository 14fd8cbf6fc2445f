"""Contact sheets: a grid of images by class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eqcvt._check import integer
from eqcvt.data.files import LensingImages

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP, _BAND, _MARGIN = 6, 30, 14
_GAMMA = 0.6
_BACKGROUND, _INK, _FAINT = (16, 16, 20), (240, 240, 240), (150, 150, 160)


def contact_sheet(
    data: LensingImages, rows: int = 4, columns: int = 8, *, tile: int = 144, colours: str = "magma"
) -> Image:
    """Draw the first images of every class as a grid, class below class.

    Args:
        data: The set.
        rows: Rows in all, shared evenly among the classes (at least one each).
        columns: Images in a row.
        tile: Side of an image on the sheet in pixels.
        colours: Name of matplotlib's colour map for images of one channel (``gray`` for none).

    Returns:
        A PIL image (RGB); ``.save("sheet.png")`` writes it.

    Raises:
        ValueError: An empty set or an unknown colour map.
    """
    from PIL import Image, ImageDraw, ImageFont

    for name, number in (("rows", rows), ("columns", columns), ("tile", tile)):
        integer(name, number)
    present = [label for label in range(len(data.classes)) if (data.labels == label).any()]
    if not present:
        raise ValueError("there are no images to draw")
    table = _colour_table(colours)
    share = max(1, rows // len(present))
    blocks = []
    for label in present:
        places = np.flatnonzero(data.labels == label)
        shown = places[: share * columns]
        blocks.append((label, len(places), shown, -(-len(shown) // columns)))
    width = 2 * _MARGIN + columns * (tile + _GAP) - _GAP
    lines = sum(block[3] for block in blocks)
    height = 2 * _MARGIN + lines * (tile + _GAP) + len(blocks) * _BAND
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    top = _MARGIN
    for label, total, shown, used in blocks:
        name = data.classes[label]
        pen.text((_MARGIN, top + _BAND / 2), name, _INK, font, anchor="lm")
        right = width - _MARGIN
        pen.text((right, top + _BAND / 2), f"{len(shown)} of {total}", _FAINT, small, anchor="rm")
        top += _BAND
        for place, number in enumerate(shown):
            row, column = divmod(place, columns)
            picture = Image.fromarray(_paint(data.images[number], table))
            picture = picture.resize((tile, tile), Image.Resampling.BICUBIC)
            corner = (_MARGIN + column * (tile + _GAP), top + row * (tile + _GAP))
            sheet.paste(picture, corner)
        top += used * (tile + _GAP)
    return sheet


def _colour_table(name: str) -> npt.NDArray[np.uint8]:
    from matplotlib import colormaps

    from eqcvt._check import choice

    shades = colormaps[choice("colours", name, list(colormaps))](np.linspace(0, 1, 256))
    return np.asarray(np.rint(shades[:, :3] * 255), dtype=np.uint8)


def _paint(image: npt.NDArray[Any], table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return one image as colours [H, W, 3]."""
    low, high = float(image.min()), float(image.max())
    grey = (image.astype(np.float64) - low) / max(high - low, 1e-30)
    # Lifts the faint arcs beside the bright core of the lens galaxy.
    levels = np.rint(255 * grey**_GAMMA).astype(np.uint8)
    if levels.ndim == 3 and levels.shape[0] == 3:
        return np.moveaxis(levels, 0, 2)
    return np.asarray(table[levels if levels.ndim == 2 else levels[0]])
