"""Simulating whole sets: in parallel, in shards, resumable."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from eqcvt._check import choice, integer
from eqcvt._files import write_text
from eqcvt._machine import usable_cores
from eqcvt.data.config import SimulationConfig, resolve
from eqcvt.data.files import LensingImages, join, load
from eqcvt.data.render import caustics, generate

CHUNK = 64
DTYPES = ("uint8", "float32")
# To be raised when a configuration gives other images or columns than before.
RENDERER = 2
START_METHODS = ("spawn", "forkserver", "fork")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        # A short task ends before a speed is known.
        speed = task.finished_speed or task.speed or task.completed / max(task.elapsed or 0, 1e-3)
        return Text(f"{speed:.1f} img/s", style="cyan")


def simulate(
    preset: str | SimulationConfig,
    count: int,
    *,
    seed: int = 1337,
    out: str | Path,
    shard: tuple[int, int] | None = None,
    size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    dtype: str = "uint8",
    start_method: str = "spawn",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Simulate a set of ``count`` images, or one shard of it, into a compressed ``.npz`` file.

    Image i depends on (configuration, seed, i) alone and has label i mod number of classes, so
    shards made anywhere join to the set that one run makes, whatever the workers. (Machines
    whose vector units round exp and pow differently may differ in the last bit before rounding.)
    Work is done in chunks of 64 images, each kept in a hidden folder beside the output until the
    file is complete: an interrupted run continues where it stopped when it is called again.

    Args:
        preset: ``deeplense``, ``control``, ``three_class``, or a configuration.
        count: Images in the whole set.
        seed: Seed of the set.
        out: A ``.npz`` file; with ``shard`` (or without a suffix) a folder, into which
            ``NAME-00000-of-00004.npz`` goes.
        shard: (i, n): make only images [i * count // n, (i + 1) * count // n).
        size: Image size in pixels, if not the configuration's 129; the patch of sky stays and the
            pixel scale grows (see ``SimulationConfig.with_size``).
        overrides: Changed fields by dotted name, e.g. ``{"subhalos.mass_fraction": 0.01}``.
        workers: Processes; None takes one per available core, each for 512 images or more.
            More than one needs the caller's script to be guarded by
            ``if __name__ == "__main__"``.
        dtype: ``uint8``: grey values, each image from its minimum to its maximum; ``float32``:
            electrons per second.
        start_method: How processes start: ``spawn``, ``forkserver`` or ``fork``.
        overwrite: Replace an output that holds something else.
        progress: Show a progress bar with images/s on stderr.

    Returns:
        The file written (or found complete).

    Raises:
        ImportError: Without caustics.
        FileExistsError: The output holds another set and ``overwrite`` is not given.
        ValueError, TypeError: Bad arguments.
    """
    config = resolve(preset, size=size, overrides=overrides)
    integer("count", count)
    integer("seed", seed, 0)
    choice("dtype", dtype, DTYPES)
    choice("start_method", start_method, START_METHODS)
    if workers is not None:
        integer("workers", workers)
    number, shards = _check_shard(shard, count)
    target = _target(Path(out), config.name, shard)
    start, stop = number * count // shards, (number + 1) * count // shards
    run = {"config": config.to_dict(), "seed": seed, "dtype": dtype, "range": [start, stop]}
    run["renderer"] = RENDERER  # whose chunks fit together
    if target.exists():
        if _holds(target, run):
            return target
        if not overwrite:
            raise FileExistsError(
                f"{target} exists and holds something else: remove it, take another output, or ask "
                "simulate to overwrite it"
            )
    caustics()
    parts = target.parent / f".{target.name}.parts"
    _prepare(parts, run)
    chunks = {
        parts / f"{first:012d}.npz": range(first, min(first + CHUNK, stop))
        for first in range(start, stop, CHUNK)
    }
    todo = {path: chunk for path, chunk in chunks.items() if not _complete(path, chunk)}
    if workers is None:
        # A process takes seconds to start.
        workers = min(usable_cores(), len(todo) // 8)
    with Progress(
        TextColumn("simulating {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    ) as bar:
        left = sum(len(chunk) for chunk in todo.values())
        # Chunks found on disk are no part of the bar, so that its rate is that of this run.
        task = bar.add_task(config.name, total=left)
        jobs = ((config, chunk, seed, dtype, path) for path, chunk in todo.items())
        for done in _run(jobs, min(workers, len(todo)), start_method):
            bar.advance(task, done)
    join([load(path) for path in chunks], [str(path) for path in chunks]).save(target)
    shutil.rmtree(parts, ignore_errors=True)
    return target


_Job = tuple[SimulationConfig, range, int, str, Path]


def _chunk(config: SimulationConfig, chunk: range, seed: int, dtype: str, path: Path) -> int:
    """Simulate one chunk into its file."""
    generate(config, chunk, seed=seed, dtype=dtype).save(path, compressed=False)
    return len(chunk)


def _run(jobs: Iterator[_Job], workers: int, start_method: str) -> Iterator[int]:
    """Do the jobs and yield the number of images of each as it is finished."""
    if workers <= 1:
        for job in jobs:
            yield _chunk(*job)
        return
    context = multiprocessing.get_context(start_method)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    running: set[Future[int]] = set()
    try:
        for job in jobs:
            # One spare job per pool keeps every worker busy and leaves little to wait for when
            # the run is interrupted.
            if len(running) > workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
            running.add(pool.submit(_chunk, *job))
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died: out of memory, or the calling script is not guarded by "
            'if __name__ == "__main__"; finished chunks are kept, so the same call continues'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Let Ctrl-C reach the parent alone, which lets a worker finish its chunk; end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone, killed by a signal that it could not handle."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_shard(shard: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if shard is None:
        return 0, 1
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise TypeError(f"shard must be a pair (i, n), got {shard!r}")
    number, shards = integer("shard's i", shard[0], 0), integer("shard's n", shard[1])
    if number >= shards:
        raise ValueError(f"shard's i must lie in 0..{shards - 1} for n = {shards}, got {number}")
    if shards > count:
        raise ValueError(f"{count} images cannot be divided into {shards} shards")
    return number, shards


def _target(out: Path, name: str, shard: tuple[int, int] | None) -> Path:
    if shard is None and out.suffix == ".npz":
        return out
    if out.suffix == ".npz" or (out.suffix and not out.is_dir()):
        what, ending = "shards go into a folder", ""
        if shard is None:
            what, ending = "a set is a .npz file or a folder", ".npz"
        raise ValueError(
            f"{what}, whose name has no ending, got {str(out)!r}; "
            f"take {str(out.with_suffix(ending))!r}"
        )
    number, shards = shard or (0, 1)
    return out / f"{name}-{number:05d}-of-{shards:05d}.npz"


def _holds(target: Path, run: dict[str, Any]) -> bool:
    """Whether a file is what a run would make."""
    with suppress(ValueError, TypeError):
        data = load(target)
        start, stop = run["range"]
        return (
            data.config == run["config"]
            and data.seed == run["seed"]
            and data.images.dtype == run["dtype"]
            and data.index is not None
            and np.array_equal(data.index, np.arange(start, stop))
        )
    return False


def _prepare(parts: Path, run: dict[str, Any]) -> None:
    """Keep the chunks of an interrupted run of the same kind, clear away others."""
    note = parts / "run.json"
    text = json.dumps(run, sort_keys=True)
    if note.exists() and note.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(parts, ignore_errors=True)
    write_text(note, text)


def _complete(path: Path, chunk: range) -> bool:
    """Whether a chunk's file is there and whole."""
    if not path.exists():
        return False
    with suppress(ValueError, TypeError):
        part: LensingImages = load(path)
        return part.index is not None and part.index.tolist() == list(chunk)
    return False
