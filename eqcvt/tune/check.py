"""Whether a backend's kernels of an op are as right as plain PyTorch in one precision.

``python -m eqcvt.tune.check`` makes the check of some calls in a process of its own: a kernel that
breaks the device, or the process, spoils no other check, and several compile at a time.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqcvt.ops import CannotServe, _backend, _proof, use_backend
from eqcvt.ops._tolerance import compare
from eqcvt.tune import cases

# Activations of the kernels, whether float32 products may be TF32, and what the reference computes
# in. TF32 has the mantissa of float16, and PyTorch may do without it: float16 is its measure.
_PRECISIONS = {
    "float32": (torch.float32, False, torch.float32),
    "tf32": (torch.float32, True, torch.float16),
    "bfloat16": (torch.bfloat16, False, torch.bfloat16),
    "float16": (torch.float16, False, torch.float16),
}


# Draws of every call that are judged together. A ReLU or a maximum takes another branch where
# rounding decides, now in the kernels, now in the reference: one small call has too few of those.
DRAWS = 4
# Seconds after which a check is given up.
LIMIT = 1800
# How a kernel can end a process; other signals come from outside.
_CRASHES = {
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")
    if hasattr(signal, name)
}


class Unchecked(RuntimeError):
    """A check could not be made, which says nothing of the kernels."""


class Verdict(NamedTuple):
    """Whether all results passed; the largest error over the one allowed; what was wrong.

    ``served`` is whether the backend took any of the calls; where it took none, none passed.
    """

    passed: bool
    error: float
    reason: str | None
    served: bool = True


UNSERVED = Verdict(False, math.inf, "it serves none of the calls", served=False)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on all calls from those on some of them each: the first that is wrong."""
    served = [verdict for verdict in verdicts if verdict.served]
    wrong = next((verdict for verdict in served if not verdict.passed), None)
    if wrong is not None or not served:
        return wrong or UNSERVED
    return Verdict(True, max(verdict.error for verdict in served), None)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 products, or forbid them, until the block ends."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Draw(NamedTuple):
    """One draw of a call: its function and inputs, the exact and the reference's results."""

    call: cases.Call
    inputs: list[Tensor]
    exact: cases.Results
    reference: cases.Results


class Judge:
    """The exact and the reference's results of an op's calls, which kernels are compared with.

    Args:
        op: name of the op.
        precision: ``"float32"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"``.
        device: where the calls run.
        calls: names of calls in ``cases.CHECKED``, by default all of the op's.
    """

    def __init__(
        self, op: str, precision: str, device: str, calls: Sequence[str] | None = None
    ) -> None:
        dtype, self._tf32, measure = _PRECISIONS[precision]
        self._calls: dict[str, list[Draw]] = {}
        with use_backend("reference"), tf32(False):
            for name in cases.CHECKED[op] if calls is None else calls:
                options = cases.CHECKED[op][name]
                for training in (True, False):
                    label = f"{name}, {'training' if training else 'evaluation'}"
                    for seed in range(1, DRAWS + 1):
                        torch.manual_seed(seed)
                        with torch.device(device):
                            call, inputs = cases.CALLS[op](training, **options)
                        inputs = cases.activations(op, inputs, dtype)
                        exact = cases.results(call, [t.double() for t in inputs])
                        reference = cases.results(call, [t.to(measure) for t in inputs])
                        draw = Draw(call, inputs, exact, reference)
                        self._calls.setdefault(label, []).append(draw)

    def verdict(self, backend: str) -> Verdict:
        """Run every call that a backend serves twice by its kernels, and compare.

        Raises:
            Unchecked: if the device has no room for them now.
        """
        worst, served = 0.0, False
        with use_backend(backend), tf32(self._tf32):
            for label, draws in self._calls.items():
                try:
                    runs = [[cases.results(d.call, d.inputs) for d in draws] for _ in range(2)]
                except CannotServe:  # the automatic choice goes on to the next
                    continue
                except Exception as error:  # whatever a compiler or a driver raises
                    if "out of memory" in str(error).lower():
                        raise Unchecked(first_line(error)) from error
                    return Verdict(False, math.inf, f"{label}: {first_line(error)}")
                served = True
                exact, reference = [d.exact for d in draws], [d.reference for d in draws]
                for part, name in enumerate(("result", "gradient")):
                    rows = zip(
                        *(_stacked(found, part) for found in (*runs, exact, reference)), strict=True
                    )
                    for index, (mine, same, true, theirs) in enumerate(rows):
                        where = f"{label}: {name} {index}"
                        if not torch.equal(mine, same):
                            return Verdict(False, math.inf, f"{where} differs from run to run")
                        # Parameters and statistics of kernels are wider than the reference's.
                        found = compare(mine.to(theirs.dtype), true, theirs, backward=part == 1)
                        if not found.as_good:
                            wrong = f"error {found.error:.3g} exceeds {found.allowed:.3g}"
                            return Verdict(False, math.inf, f"{where}: {wrong}")
                        if found.allowed > 0:
                            worst = max(worst, found.error / found.allowed)
        return Verdict(True, worst, None) if served else UNSERVED


def _stacked(draws: list[cases.Results], part: int) -> list[Tensor]:
    """Return results, or gradients, of several draws side by side."""
    return [torch.stack(same) for same in zip(*(draw[part] for draw in draws), strict=True)]


def first_line(error: Any) -> str:
    """Return the type of an exception and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def apart(
    op: str,
    precision: str,
    backend: str,
    device: str,
    launches: dict[str, dict[str, int]],
    calls: Sequence[str],
) -> Verdict:
    """Return the verdict on kernels with these launches in some calls, found by another process.

    A crash of that process is a verdict too: the kernels are wrong.

    Raises:
        Unchecked: if the check itself failed, as where the device has no room for it, or there is
            no compiler.
    """
    what = f"{op} by {backend} in {precision}"
    try:
        run = subprocess.run(
            [sys.executable, "-m", "eqcvt.tune.check", op, precision, backend, device, *calls],
            input=json.dumps(launches),
            env={**os.environ, _proof.VARIABLE: "none"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise Unchecked(f"{what} had not been checked after {LIMIT} s") from None
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines() or [""]
    if run.returncode == 0:
        passed, error, reason, served = json.loads(lines[-1])
        return Verdict(passed, math.inf if error is None else error, reason, served)
    if -run.returncode in _CRASHES:
        return Verdict(False, math.inf, f"its process died of signal {-run.returncode}")
    why = lines[-1] or f"its process ended with {run.returncode}"
    raise Unchecked(f"{what} could not be checked: {why}")


def _main(op: str, precision: str, backend: str, device: str, *calls: str) -> None:
    from eqcvt.kernels import launches

    if why := _backend._unavailable(backend, device):
        raise RuntimeError(f"{backend} cannot serve {op} on {device}: {why}")
    if backend == "triton" and device == "cuda":
        from triton.runtime import driver

        driver.active.get_current_target()  # compiled by the C compiler, where there is one
    launches.install(json.load(sys.stdin))
    passed, error, reason, served = Judge(op, precision, device, calls or None).verdict(backend)
    print(json.dumps([passed, error if passed else None, reason, served]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
