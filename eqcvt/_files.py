"""Files and folders that are written whole or not at all, and locks."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: naming the file. safetensors' own way to write raises what is no OSError, and
            makes files that nobody else can read, whatever the umask.
    """
    content = safetensors.torch.save(tensors, metadata)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; a ValueError names one that is damaged."""
    try:
        return safetensors.torch.load_file(path, device=device)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a ValueError names one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of UTF-8 too
        raise ValueError(f"{path} is not valid JSON: {error}") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block succeeds.

    The block creates the file. On an exception the temporary file goes and an older ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new empty folder; put it in the place of ``path`` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = outer / "new", outer / "old"
    new.mkdir()
    try:
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        # If interrupted between the two renames, put the older folder back.
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(outer, ignore_errors=True)


@contextmanager
def locked(
    path: Path, say: Callable[[str], None], why: str, *, patience: float = -1
) -> Iterator[None]:
    """Hold the lock file ``path``; if another process does, ``say`` why we wait, and wait for that.

    Raises:
        Timeout: filelock's, after ``patience`` seconds; -1 waits for ever.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        held = lock.acquire(timeout=1)
    except Timeout:
        say(why)
        held = lock.acquire(timeout=patience)
    with held:
        yield


def take_back(path: Path) -> None:
    """Put back what a killed ``replacing_folder`` moved away, and remove what else it left.

    Only for a ``path`` that no living process replaces. ``replacing`` leaves nothing to put back.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        if not left.is_dir() or not {p.name for p in left.iterdir()} <= {"new", "old", path.name}:
            continue  # not ours
        new, old = left / "new", left / "old"
        if old.exists() and not path.exists():  # then ``new`` was whole
            os.replace(new if new.exists() else old, path)
        shutil.rmtree(left, ignore_errors=True)
