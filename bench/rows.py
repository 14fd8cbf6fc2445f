"""The rows of bench/results/<device>.csv: read, merged, written whole, and printed."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from filelock import FileLock

from bench.origin import slug
from eqcvt._files import replacing

KEY = ("case", "op", "implementation", "shape", "dtype", "threads")
COLUMNS = (
    *KEY,
    "median_ms",
    "iqr_ms",
    "images_per_s",
    "peak_mib",
    "floor_share",
    "rounds",
    "device",
    "versions",
    "commit",
    "date",
)
PRINTED = ("op", "case", "shape", "dtype", "implementation", *COLUMNS[len(KEY) : len(KEY) + 6])

Row = dict[str, str]


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Return all rows, sorted, a new one in the place of an old one of the same key."""
    table = {tuple(row[column] for column in KEY): row for row in [*old, *new]}
    return [table[key] for key in sorted(table)]


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save(folder: Path, rows: list[Row]) -> None:
    """Merge rows of one device into its file."""
    path = folder / f"{slug(rows[0]['device'])}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # another run may write at the same time
        table = merged(read(path), rows)
        with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator=os.linesep)
            writer.writeheader()
            writer.writerows(table)


def origins(rows: list[Row], column: str) -> str:
    """Return the versions or commits that rows were made with, each once."""
    return " / ".join(sorted({row[column] for row in rows}))


def lines(table: list[Row], columns: tuple[str, ...] = PRINTED) -> list[str]:
    """Return rows as lines of text, their columns one below the other."""
    cells = [columns, *([row[column] for column in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
