"""The check of GPU kernels where they are first wanted, see :mod:`eqcvt.ops._proof`."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from eqcvt._files import locked
from eqcvt._machine import usable_cores
from eqcvt.ops import _proof

log = logging.getLogger("eqcvt")

# Seconds after which the process that checks is no longer waited for.
PATIENCE = 3600
# Processes that compile and check at a time, and bytes of the GPU's memory that each may want.
JOBS = 8
ROOM = 2 << 30

_tried: dict[tuple[_proof.Device, str, tuple[str, ...]], str] = {}


@functools.cache
def why_not(device: _proof.Device, op: str, backend: str, precision: str) -> str | None:
    """Return why a backend's kernels of an op are not proven on a kind of GPU, or None.

    Those without a verdict are checked first, which may take minutes, once per machine. For float32
    that is TF32 and IEEE, as one step may use both.

    Raises:
        FileNotFoundError: if EQCVT_TUNED names a file that is not there.
        ValueError: if it names one that ``eqcvt tune`` did not write.
    """
    gap = _proof.gap(device, op, backend, precision)
    advice = "`eqcvt tune` checks them"
    if gap is not None and gap.unchecked:
        problem = _check(device, op, backend, precision)
        gap = _proof.gap(device, op, backend, precision)
        if gap is not None and gap.unchecked:
            advice = f"the check could not be made: {problem}"
    return None if gap is None else f"{gap.reason}; {advice}"


def _check(device: _proof.Device, op: str, backend: str, precision: str) -> str:
    """Check a backend's kernels of every op, or wait for the process or thread that does.

    Tried once in a process, unless it was interrupted. Returns the last that the check said.
    """
    precisions = next(each for each in _proof.PRECISIONS_OF.values() if precision in each)
    tried = (device, backend, precisions)
    if tried in _tried:
        return _tried[tried]
    said = ""
    try:
        path = _proof.user_file(device)
        lock = path.with_suffix(".first-use.lock")
        why = f"waiting for the process that checks the GPU kernels, {lock}"
        with locked(lock, log.warning, why, patience=PATIENCE):
            _proof.found.cache_clear()
            gap = _proof.gap(device, op, backend, precision)
            if gap is not None and gap.unchecked:
                said = _run(path, device, backend, precisions)
    except Exception as error:  # a file system without locks, a system without processes, ...
        said = f"{type(error).__name__}: {error}"
    _proof.found.cache_clear()
    _tried[tried] = said
    return said


def _run(path: Path, device: _proof.Device, backend: str, precisions: tuple[str, ...]) -> str:
    """Run ``eqcvt tune --check-only`` on a GPU of this kind, and return the last that it said."""
    what = f"{backend} kernels on {device.name} in {' and '.join(precisions)}"
    log.warning(
        "checking the %s, once for this machine and these versions; it may take minutes "
        "(EQCVT_TUNED=none: no check, plain PyTorch)",
        what,
    )
    start = time.monotonic()
    command = [sys.executable, "-m", "eqcvt", "tune", "--check-only", "--backend", backend]
    command += [part for each in precisions for part in ("--precision", each)]
    command += ["--jobs", str(_jobs(device)), "--out", str(path)]
    said = ""
    run = subprocess.Popen(
        command,
        env=_environment(device),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        assert run.stderr is not None
        for line in filter(None, map(str.strip, run.stderr)):
            said = line
            log.warning("%s", line)
        code = run.wait()
    except BaseException:
        run.terminate()
        raise
    outcome = {0: "all are right", 1: "not all are right"}.get(code, "not all could be checked")
    log.warning("checked the %s in %.0f s: %s", what, time.monotonic() - start, outcome)
    return said or f"its process ended with {code}"


def _environment(device: _proof.Device) -> dict[str, str]:
    """Return the environment of a process of this package that sees one GPU of this kind.

    It must not begin a check of its own, and its lines are read by a program.
    """
    ours = {
        "CUDA_VISIBLE_DEVICES": _visible(device),
        "PYTHONPATH": os.pathsep.join(
            [str(_proof.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONSAFEPATH": "1",
        _proof.VARIABLE: "none",
    }
    left_out = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    return {k: v for k, v in os.environ.items() if k not in left_out} | ours


def _jobs(device: _proof.Device) -> int:
    """Return how many processes may check at a time: by the cores, and the memory that is free."""
    free, _ = torch.cuda.mem_get_info(_index(device))
    return max(1, min(JOBS, usable_cores(), free // ROOM))


def _index(device: _proof.Device) -> int:
    """Return the number of a GPU of this kind: the current one, if it is."""
    order: list[int] = [torch.cuda.current_device(), *range(torch.cuda.device_count())]
    return next(i for i in order if _proof.kind(i) == device)


def _visible(device: _proof.Device) -> str:
    """Return CUDA_VISIBLE_DEVICES of a process that is to see one GPU of this kind."""
    index = _index(device)
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    # Set after torch had looked at it, the list is not the one that torch counts by.
    return named[index] if index < len(named) and named[index] else str(index)
