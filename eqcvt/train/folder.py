"""The run folder: what of it is ours, who may write into it, and what a killed run left there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from eqcvt._files import take_back
from eqcvt.models._base import CLASSES
from eqcvt.train.trained import SEEN

log = logging.getLogger("eqcvt")
LOCK = "train.lock"
CONFIG, METRICS, BEST, LAST = "config.toml", "metrics.json", "best", "last"
TENSORBOARD, CURVES, EVALUATION = "tensorboard", "curves.png", "evaluation"
OURS = (CONFIG, CLASSES, SEEN, METRICS, BEST, LAST, TENSORBOARD)
# The pictures of an evaluation, and those of each of its models.
OF_ALL = ("roc.png", "logits_vs_angle.png", "reliability.png")
OF_ONE = ("confusion_{}.png", "samples_{}.png", "attention_{}.png")


def parts(folder: Path) -> list[Path]:
    """What there is of a run in a folder; all else in it is not ours."""
    return [path for name in OURS if (path := folder / name).exists()]


def claim(folder: Path, *, may_hold_a_run: bool) -> None:
    """Refuse a file, and a folder that holds a run unless it may."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the run folder {folder} is a file")
    present = [] if may_hold_a_run else parts(folder)
    if present:
        raise FileExistsError(
            f"{folder} already holds a run ({', '.join(p.name for p in present)}): choose another "
            "folder (out), go on with it (resume) or replace it (overwrite)"
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system frees it when the process ends, however it does.

    What a killed run left half renamed is put back. A folder made for a run that did not start is
    removed again.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"another process is training into {folder}: choose another folder (out), or wait "
            "until it has ended"
        ) from None
    except (NotImplementedError, OSError) as error:  # some clusters' file systems know no locks
        log.info("%s is not locked: %s", folder, error)
    try:
        if lock.is_locked:
            for name in (*OURS, CURVES):
                take_back(folder / name)
        yield
    finally:
        lock.release()
        if new and folder.is_dir() and os.listdir(folder) == [LOCK]:
            shutil.rmtree(folder)


def remove(folder: Path) -> None:
    """Remove a run, and the pictures and numbers of its models."""
    for path in parts(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / CURVES).unlink(missing_ok=True)
    evaluation = folder / EVALUATION
    if remove_pictures(evaluation):
        (evaluation / METRICS).unlink()
        if not any(evaluation.iterdir()):
            evaluation.rmdir()


def remove_pictures(folder: Path) -> bool:
    """Remove the pictures of the evaluation in a folder; return whether there is one."""
    try:
        models = json.loads((folder / METRICS).read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    of_one = [picture.format(stem(model)) for model in models for picture in OF_ONE]
    for name in (*OF_ALL, *of_one):
        (folder / name).unlink(missing_ok=True)
    return True


def stem(name: str) -> str:
    """Return a model's name as part of a file's."""
    return "".join(c if c.isalnum() else "_" for c in name.lower())
