"""The check of GPU kernels where they are first wanted, see :mod:`eqcvt.ops._proof`."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import time

import torch
from filelock import FileLock

from eqcvt.ops import _proof

log = logging.getLogger("eqcvt")

_tried: dict[tuple[_proof.Device, str, tuple[str, ...]], str] = {}


@functools.cache
def why_not(op: str, backend: str, dtype: torch.dtype) -> str | None:
    """Return why a backend's kernels of an op are not proven on the GPUs here, or None.

    Those without a verdict are checked first, which takes minutes, once per machine.

    Raises:
        FileNotFoundError: if EQCVT_TUNED names a file that is not there.
        ValueError: if it names one that ``eqcvt tune`` did not write.
    """
    precisions = _proof.PRECISIONS_OF.get(dtype)
    if precisions is None:
        return f"GPU kernels are checked in {', '.join(_proof.PRECISIONS)}, not in {dtype}"
    for device in _proof.devices():
        gap = _proof.gap(device, op, backend, precisions)
        advice = "`eqcvt tune` checks them"
        if gap is not None and gap.unchecked:
            problem = _check(device, op, backend, precisions)
            gap = _proof.gap(device, op, backend, precisions)
            if gap is not None and gap.unchecked:
                advice = f"the check could not be made: {problem}"
        if gap is not None:
            return f"{gap.reason}; {advice}"
    return None


def _check(device: _proof.Device, op: str, backend: str, precisions: tuple[str, ...]) -> str:
    """Check a backend's kernels of every op, or wait for the process that does.

    Tried once in a process. Returns the last that the check said.
    """
    tried = (device, backend, precisions)
    if tried not in _tried:
        path = _proof.user_file(device)
        _tried[tried] = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                _proof.found.cache_clear()
                gap = _proof.gap(device, op, backend, precisions)
                if gap is not None and gap.unchecked:
                    _tried[tried] = _run(device, backend, precisions)
        except OSError as error:
            _tried[tried] = str(error)
        _proof.found.cache_clear()
    return _tried[tried]


def _run(device: _proof.Device, backend: str, precisions: tuple[str, ...]) -> str:
    """Run ``eqcvt tune --check-only`` on a GPU of this kind, and return the last that it said."""
    what = f"{backend} kernels on {device.name} in {' and '.join(precisions)}"
    log.warning(
        "checking the %s, once for this machine and these versions; it may take minutes "
        "(EQCVT_TUNED=none: no check, plain PyTorch)",
        what,
    )
    start = time.monotonic()
    command = [sys.executable, "-m", "eqcvt", "tune", "--check-only", "--backend", backend]
    command += ["--jobs", str(min(8, os.cpu_count() or 1))]
    command += [part for each in precisions for part in ("--precision", each)]
    # This package and no other in the current folder, and the GPU that is meant.
    paths = [str(_proof.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "CUDA_VISIBLE_DEVICES": _visible(device),
    }
    said = ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        for line in filter(None, map(str.strip, run.stderr)):
            said = line
            log.warning("%s", line)
    outcome = "all are right" if run.returncode == 0 else "not all of them were found right"
    log.warning("checked the %s in %.0f s: %s", what, time.monotonic() - start, outcome)
    return said or f"its process ended with {run.returncode}"


def _visible(device: _proof.Device) -> str:
    """Return CUDA_VISIBLE_DEVICES of a process that is to see one GPU of this kind."""
    order = [torch.cuda.current_device(), *range(torch.cuda.device_count())]
    index = next(i for i in order if _proof.kind(i) == device)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index].strip() if named else str(index)
