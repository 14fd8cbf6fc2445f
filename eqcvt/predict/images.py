"""The images of files and folders: found, counted and divided into parts."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eqcvt._check import choice, integer
from eqcvt.data.folders import ENDINGS as SINGLE
from eqcvt.data.folders import SYSTEM
from eqcvt.predict.ahead import ahead
from eqcvt.predict.read import FITS, Chunk, Item, Reader, count_images

ENDINGS = (*SINGLE, ".npz")
FILES = 8  # pictures that a thread reads before it takes the next ones


@dataclass(frozen=True)
class Images:
    """All images of some files, in the order of the files, or a part of them; not in memory.

    Attributes:
        files: see ``find_images``.
        ends: for each file, the number of images up to its end, int64.
        start, stop: the part: images ``start`` to ``stop - 1`` of all.
        skip_bad: an image that cannot be read is passed over instead of ending everything.
    """

    files: list[Path]
    ends: NDArray[np.int64]
    start: int
    stop: int
    skip_bad: bool = False

    @classmethod
    def find(
        cls, paths: Iterable[str | Path], *, skip_bad: bool = False, readers: int = 4
    ) -> Images:
        """Find files and count their images; of each ``.npz`` file the header is read.

        Raises:
            FileNotFoundError, ValueError: as ``find_images``, a header that cannot be read, or
                no readers.
        """
        integer("readers", readers)
        files = find_images(paths)

        def counts(group: list[Path]) -> Generator[int, None, None]:
            for path in group:
                try:
                    yield count_images(path)
                except ValueError:
                    if not skip_bad:
                        raise
                    yield 1  # read later, when what is wrong is noted

        groups = (files[i : i + 64] for i in range(0, len(files), 64))
        numbers = ahead(map(counts, groups), threads=readers, depth=64)
        ends = np.cumsum(np.fromiter(numbers, np.int64, len(files)))
        return cls(files, ends, 0, int(ends[-1]), skip_bad)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, index: int, number: int) -> Images:
        """Return part ``index`` of ``number``: images ``[index * n // number, ...)`` of these.

        The parts follow each other and are together all ``n`` images; they differ by at most one
        image in size.

        Raises:
            ValueError: no such part.
        """
        integer("number", number)
        if integer("index", index, 0) >= number:
            raise ValueError(f"index must lie in 0..{number - 1} for {number} parts, got {index}")
        start = self.start + index * len(self) // number
        return replace(self, start=start, stop=self.start + (index + 1) * len(self) // number)

    def fingerprint(self) -> str:
        """Return a hash of each file's name, number of images, size and time of last change."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ends, dtype="<i8").tobytes())
        for path in self.files:
            digest.update(f"{path}\0{_version(path)}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def chunks(self, channels: int, size: int, fit: str, *, readers: int = 4) -> Iterator[Chunk]:
        """Yield the images of this part in order, read by threads.

        Args:
            channels, size: C and S that the images are made to have.
            fit: what to do with images of another size (see ``fit_image``).
            readers: threads.

        Raises:
            ValueError: an image that cannot be read or fitted, unless ``skip_bad``.
        """
        choice("fit", fit, FITS)
        into = Reader(channels, size, fit, self.skip_bad)
        groups = (into.read(group) for group in self._groups())
        return ahead(groups, threads=integer("readers", readers))

    def _groups(self) -> Iterator[list[Item]]:
        """Yield what one thread reads after the other: one archive, or a few single images."""
        group: list[Item] = []
        place = int(np.searchsorted(self.ends, self.start, side="right"))
        end = self.start
        while end < self.stop:
            first, end = (int(self.ends[place - 1]) if place else 0), int(self.ends[place])
            start, stop = max(self.start - first, 0), min(self.stop, end) - first
            item = (self.files[place], end - first, start, stop)
            place += 1
            if group and (stop - start > 1 or len(group) == FILES):
                yield group
                group = []
            group.append(item)
            if stop - start > 1:
                yield group
                group = []
        if group:
            yield group


def _version(path: Path) -> str:
    """Return the size of a file and when it was last changed, in nanoseconds."""
    try:
        found = path.stat()
    except OSError:  # it is gone: reading it says so
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _files(top: Path) -> Iterator[Path]:
    """Yield the files at any depth in a folder, but for what is hidden; each folder's once."""
    seen: set[Path] = set()
    waiting = [top]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0)):
            here = Path(place).resolve()
            if here in seen:  # reached over another link
                folders.clear()
                continue
            seen.add(here)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            # Links come last, so that a folder has the name of its own place.
            waiting += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
            yield from (Path(place, name) for name in names if not name.startswith("."))


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files given, and for each folder the image files at any depth in it, sorted.

    Linked folders are searched too. What begins with a dot in a folder, such as the chunks of an
    interrupted simulation, is passed over; of other files that are no images a warning tells.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no image.
        TypeError: what is no path, such as an array.
        ValueError: a file that is not one of ``ENDINGS``.
    """
    found: list[Path] = []
    paths = list(paths)
    for given in paths:
        if not isinstance(given, (str, Path)):
            raise TypeError(
                f"images are files or folders, got {type(given).__name__}: a model takes arrays "
                "itself, as model(eqcvt.data.to_unit(array))"
            )
    for path in map(Path, paths):
        if path.is_dir():
            there = sorted(p for p in _files(path) if p.name.lower() not in SYSTEM)
            inside = [p for p in there if p.name.lower().endswith(ENDINGS)]
            if not inside:
                raise FileNotFoundError(f"{path} holds no image ({', '.join(ENDINGS)})")
            if len(inside) < len(there):
                other = next(p for p in there if not p.name.lower().endswith(ENDINGS))
                warnings.warn(
                    f"{path}: {len(there) - len(inside)} of its {len(there)} files are not read, "
                    f"such as {other.relative_to(path)}; images are {', '.join(ENDINGS)} files",
                    stacklevel=2,
                )
            found += inside
        elif not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        elif not path.name.lower().endswith(ENDINGS):
            raise ValueError(f"{path} is not an image: its ending must be one of {ENDINGS}")
        else:
            found.append(path)
    if not found:
        raise FileNotFoundError("there are no images: give files or folders")
    return found
