"""Predictions as files: written whole or not at all, in parts, and the parts joined."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any, TextIO

from eqcvt._check import choice
from eqcvt._files import replacing, write_json
from eqcvt.data.files import few
from eqcvt.predict.images import Images
from eqcvt.predict.model import Prediction

ENDINGS_OF_TABLES = (".csv", ".json")
OWN = ("file", "class", "note")  # columns beside those of the classes
_RECORD = ".run.json"


@contextmanager
def writing(path: str | Path, classes: Sequence[str]) -> Iterator[Callable[[Prediction], None]]:
    """Yield a function that adds a prediction to a table ``.csv`` or a list ``.json``.

    The file is there when the block has succeeded. Both have a line for each prediction. A class
    with the name of another column has ``probability of`` before it in a table.
    """
    path = Path(path)
    choice("the prediction file's ending", path.suffix, ENDINGS_OF_TABLES)
    with replacing(path) as new, _text(new) as file:
        if path.suffix == ".csv":
            table = csv.writer(file, lineterminator="\n")
            heads = [f"probability of {c}" if c in OWN else c for c in classes]
            table.writerow([*OWN[:2], *heads, OWN[2]])

            def write(p: Prediction) -> None:
                table.writerow(
                    [p.name, p.label, *(p.probabilities.get(c) for c in classes), p.note]
                )

            yield write
            return
        separator = "[\n"

        def write_line(p: Prediction) -> None:
            nonlocal separator
            file.write(separator + json.dumps(vars(p)))
            separator = ",\n"

        yield write_line
        file.write("\n]\n" if separator == ",\n" else "[\n]\n")


def write_predictions(
    predictions: Iterable[Prediction], path: str | Path, classes: Sequence[str]
) -> Path:
    """Write predictions as they come as a table ``.csv`` or a list ``.json``.

    Args:
        predictions: see ``predict``.
        path: the file, written whole or not at all.
        classes: the names of the classes (see ``class_names``).
    """
    with writing(path, classes) as write:
        for prediction in predictions:
            write(prediction)
    return Path(path)


@dataclass(frozen=True)
class Parts:
    """The parts of a prediction file, in a folder beside it.

    ``OUT.csv.parts/OUT-00003-of-00016.csv`` is a file like ``OUT.csv`` with the images of one part;
    ``OUT-00003-of-00016.csv.run.json`` says of which model, images and settings.
    """

    out: Path

    @property
    def folder(self) -> Path:
        """The folder that holds them."""
        return self.out.with_name(f"{self.out.name}.parts")

    def path(self, index: int, number: int) -> Path:
        """Return the file of part ``index`` of ``number``."""
        return self.folder / f"{self.out.stem}-{index:05d}-of-{number:05d}{self.out.suffix}"

    def finished(self, index: int, number: int, run: dict[str, Any], *, overwrite: bool) -> bool:
        """Return whether a part is done, and need not be done again.

        Args:
            index, number: the part.
            run: what it must have been made of.
            overwrite: do it again in any case.

        Raises:
            FileExistsError: it was made of something else, and ``overwrite`` is not given.
            ValueError: nor can it be said what it was made of, or it is not whole.
        """
        part = self.path(index, number)
        if overwrite or not part.exists():
            return False
        if _read_record(part)["run"] != run:
            raise FileExistsError(
                f"{part} is there and was made by another model, of other images or with other "
                f"options: take another --out, or --overwrite to replace it"
            )
        return True

    def write(
        self,
        index: int,
        number: int,
        run: dict[str, Any],
        images: Images,
        predictions: Iterable[Prediction],
    ) -> int:
        """Write a part and its record; return how many of its images could not be read."""
        part, failed = self.path(index, number), 0

        def counted() -> Iterator[Prediction]:
            nonlocal failed
            for prediction in predictions:
                failed += not prediction.label
                yield prediction

        with replacing(part) as new, replacing(_record(part)) as record:
            write_predictions(counted(), new, run["classes"])
            about = {"run": run, "range": [images.start, images.stop], "failed": failed}
            about["bytes"] = new.stat().st_size
            write_json(record, about)
            # Of an older part nothing stays beside the new record, which is put there first:
            # where both are there, both are of one run.
            part.unlink(missing_ok=True)
        return failed

    def merge(self, number: int | None = None, *, overwrite: bool = False) -> tuple[int, int]:
        """Join all parts to the whole file; return how many images it has, and how many failed.

        Args:
            number: of parts; needed where the folder holds parts of runs with several numbers.
            overwrite: replace a whole file that is there and holds something else.

        Raises:
            FileExistsError: such a file is there, and ``overwrite`` is not given.
            FileNotFoundError: parts are missing; they are named.
            ValueError: the parts do not belong together.
        """
        pattern = re.compile(
            rf"{re.escape(self.out.stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(self.out.suffix)}"
        )
        there = [pattern.fullmatch(p.name) for p in self.folder.glob("*")]
        numbers = {int(match[2]) for match in there if match}
        if not numbers:
            raise FileNotFoundError(f"{self.folder} holds no parts of {self.out.name}")
        if number is None and len(numbers) > 1:
            raise ValueError(
                f"{self.folder} holds parts of runs with {few(numbers)} parts: remove all but one"
            )
        number = number or numbers.pop()
        missing = set(range(number))
        missing -= {int(match[1]) for match in there if match and int(match[2]) == number}
        if missing:
            raise FileNotFoundError(
                f"{self.folder} lacks part {few(missing)} of {number}; once it is there, eqcvt "
                f"merge {self.out} joins them"
            )
        paths = [self.path(index, number) for index in range(number)]
        records = [_read_record(path) for path in paths]
        for path, record in zip(paths, records, strict=True):
            if record["run"] != records[0]["run"]:
                raise ValueError(f"{path} and {paths[0]} are not of one run")
        with replacing(self.out) as new:
            with new.open("wb") as file:
                (_join_csv if self.out.suffix == ".csv" else _join_json)(paths, file)
            if self.out.exists() and not overwrite and not cmp(new, self.out, shallow=False):
                raise FileExistsError(
                    f"{self.out} exists and is not what the parts in {self.folder} give: move it, "
                    f"or eqcvt merge {self.out} --overwrite replaces it"
                )
        return records[-1]["range"][1], sum(record["failed"] for record in records)


def _text(path: Path) -> TextIO:
    # Names of files need not be UTF-8; their bytes are kept.
    return path.open("w", newline="", encoding="utf-8", errors="surrogateescape")


def _record(part: Path) -> Path:
    return part.with_name(part.name + _RECORD)


def _read_record(part: Path) -> dict[str, Any]:
    """Return what a part was made of.

    Raises:
        ValueError: it is not there, or damaged, or the part is not as long as it was.
    """
    path = _record(part)
    again = "eqcvt predict --overwrite does that part again"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        about = {key: record[key] for key in ("run", "range", "failed")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, which says what {part.name} was made of, cannot be read ({error!r}): {again}"
        ) from error
    size = part.stat().st_size
    written = record.get("bytes", size)  # older records do not say it
    if size != written:
        raise ValueError(f"{part} has {size} bytes, and had {written} once written: {again}")
    return about


def _join_csv(paths: Sequence[Path], file: Any) -> None:
    for place, path in enumerate(paths):
        with path.open("rb") as part:
            head = part.readline()
            if place == 0:
                file.write(head)
            shutil.copyfileobj(part, file)


def _join_json(paths: Sequence[Path], file: Any) -> None:
    separator = b"[\n"
    for path in paths:
        with path.open("rb") as part:
            for line in part:
                if line not in (b"[\n", b"]\n"):
                    file.write(separator + line.rstrip(b",\n"))
                    separator = b",\n"
    file.write(b"\n]\n" if separator == b",\n" else b"[\n]\n")
