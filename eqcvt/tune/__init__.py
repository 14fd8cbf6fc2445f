"""Checks the GPU kernels of this machine and finds their fastest launches: ``eqcvt tune``.

First every backend's kernels of every op are compared with float64 in each precision, at the
model's shapes and at odd ones, results and every gradient, under the project's one tolerance rule,
and two runs bit by bit. Then, for each Triton kernel, launches beside the one in force are timed in
a training step of the model; one that is faster is taken if the op is still as right. The file is
written whole after each step, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from eqcvt import _check
from eqcvt._files import locked
from eqcvt.kernels import launches
from eqcvt.ops import _backend, _proof, use_backend
from eqcvt.tune import cases
from eqcvt.tune.check import Judge, Unchecked, Verdict, apart, tf32, together
from eqcvt.tune.record import Record
from eqcvt.tune.search import CudaTimer, Timer, decided, descend, entries_used

BACKENDS = ("triton", "native")
# Calls that one process checks: it starts in seconds, and compiles their kernels for longer.
_CALLS = 2
# Launches are by bits: one dtype of each is timed, and all are checked.
_TIMED = {torch.bfloat16: ("bfloat16", "float16"), torch.float32: ("float32", "tf32")}


class Watcher:
    """Is told what happens; this one ignores it."""

    def note(self, text: str) -> None:
        """Take a line for the reader."""

    def begin(self, what: str, steps: int) -> None:
        """Take the name of the next part and the number of its steps."""

    def checked(self, backend: str, op: str, precision: str, verdict: Verdict) -> None:
        """Take the outcome of a check."""

    def timed(self, key: str, entry: dict[str, Any]) -> None:
        """Take the outcome of a search: ``before_ms``, ``after_ms``, ``launch``, ``refused``."""


def available(backends: Sequence[str], device: str) -> dict[str, str | None]:
    """Return, for each backend, why it cannot serve a type of device, or None."""
    names = [_check.choice("backend", name, BACKENDS) for name in backends]
    return {name: _backend._unavailable(name, device) for name in names}


def run(
    path: Path,
    about: _proof.Device,
    *,
    ops: Sequence[str] = _backend.OPS,
    backends: Sequence[str] = BACKENDS,
    precisions: Sequence[str] | None = None,
    check_only: bool = False,
    again: bool = False,
    minutes: float | None = None,
    jobs: int = 4,
    watcher: Watcher | None = None,
    timer: Timer | None = None,
    device: str = "cuda",
) -> Record:
    """Check, tune and check again; keep the file at ``path`` up to date.

    Args:
        path: the file, see :func:`eqcvt.ops._proof.user_file`.
        about: the GPU.
        ops: the ops to check and to tune.
        backends: those to check, which must be available; only Triton's launches are tuned.
        precisions: those to check in, by default all; tuning takes them all.
        check_only: whether to leave launches as they are.
        again: whether to do what the file says is done.
        minutes: after how many no further candidate is tried.
        jobs: processes at a time that check a few calls each, compile and take their share of the
            GPU's memory; 0 for all in this process.
        watcher: is told what happens.
        timer: measures kernels; by default with CUDA events.
        device: type of the device.

    Raises:
        ValueError: if an op, a backend or a precision is unknown, or tuning would leave one out.
        RuntimeError: if a check could not be made, or a candidate left the device unusable.
    """
    for op in ops:
        _check.choice("op", op, _backend.OPS)
    precisions = _proof.PRECISIONS if precisions is None else precisions
    for precision in precisions:
        _check.choice("precision", precision, _proof.PRECISIONS)
    if not check_only and set(precisions) != set(_proof.PRECISIONS):
        raise ValueError("launches are tuned for every precision: give precisions to a check only")
    watcher = watcher or Watcher()
    lock = path.with_suffix(".lock")
    with locked(lock, watcher.note, f"waiting for the eqcvt tune that holds {lock}"):
        record = Record(path, about)
        if record.dropped is not None:
            watcher.note(f"{path} is begun anew: {record.dropped}")
        launches.install(record.launches)
        _check_all(record, ops, backends, precisions, device, jobs, watcher, again)
        if check_only or "triton" not in backends:
            return record
        before = dict(record.launches)
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        search = _Search(record, about, device, timer or CudaTimer(), watcher, deadline)
        right = [
            op for op in ops if all(record.checked("triton", op, p) for p in _proof.PRECISIONS)
        ]
        for op in ops:
            if op in right:
                search.op(op, again)
            else:
                watcher.note(f"{op} is not tuned: its kernels are wrong")
        if record.launches != before:
            # A proof is of one table, and an entry may serve several ops.
            _check_all(record, _backend.OPS, ["triton"], precisions, device, jobs, watcher, False)
        return record


def _check_all(
    record: Record,
    ops: Sequence[str],
    backends: Sequence[str],
    precisions: Sequence[str],
    device: str,
    jobs: int,
    watcher: Watcher,
    again: bool,
) -> None:
    """Check ops by backends, without what has been proven, and save each verdict.

    Raises:
        Unchecked: at the end, if a check could not be made.
    """
    todo = [(backend, op, p) for op in ops for p in precisions for backend in backends]
    todo = [each for each in todo if again or not record.checked(*each)]
    watcher.begin("checking", len(todo))
    pool = ThreadPoolExecutor(jobs or 1)

    def begin(backend: str, op: str, precision: str) -> list[Future[Verdict]]:
        names = list(cases.CHECKED[op])
        parts = [names[i : i + _CALLS] for i in range(0, len(names), _CALLS)]
        if not jobs:
            return [pool.submit(lambda: Judge(op, precision, device).verdict(backend))]
        asked = (op, precision, backend, device, record.launches)
        return [pool.submit(apart, *asked, part) for part in parts]

    failures = []
    try:
        for each, parts in [(each, begin(*each)) for each in todo]:
            try:
                verdict = together([part.result() for part in parts])
            except Unchecked as error:
                failures.append(error)
                watcher.note(str(error))
                continue
            record.check(*each, verdict)
            record.save()
            watcher.checked(*each, verdict)
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise failures[0]


class _Search:
    """Tunes the launches that the model's training step takes."""

    def __init__(
        self,
        record: Record,
        about: _proof.Device,
        device: str,
        timer: Timer,
        watcher: Watcher,
        deadline: float | None,
    ) -> None:
        self.record, self.device, self.timer, self.watcher = record, device, timer, watcher
        self.deadline = deadline
        self.klass = f"sm{about.capability.replace('.', '')}"

    def expired(self) -> bool:
        """Return whether the time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def op(self, op: str, again: bool) -> None:
        """Tune all entries that an op's steps look up, the most expensive first."""
        for dtype, precisions in _TIMED.items():
            if self.expired():
                return
            x = torch.empty(0, dtype=dtype, device=self.device)
            with use_backend("triton"), tf32(True):
                steps = [cases.step(op, options, image, x) for options, image in cases.TIMED[op]]
            users = self._users(steps)
            judges = [Judge(op, precision, self.device) for precision in precisions]
            cost = {entry: self._time(entry, runs) for entry, runs in users.items()}
            todo = sorted(cost, key=lambda entry: (-cost[entry], entry))
            self.watcher.begin(f"tuning {op} in {precisions[0]}", len(todo))
            while todo:
                if self.expired():
                    return
                entry = todo.pop(0)
                done = self.record.content["times"].get(f"{self.klass} {entry}", {})
                if (again or not done.get("finished")) and self._entry(entry, users[entry], judges):
                    # Another launch can have other kernels run than before.
                    before, users = users, self._users(steps)
                    todo = [each for each in todo if each in users]
                    todo += [each for each in users if each not in before]

    def _users(self, steps: list[Callable[[], object]]) -> dict[str, list[Callable[[], object]]]:
        """Return the entries that steps look up with the table in force, each with its steps."""
        users: dict[str, list[Callable[[], object]]] = {}
        with use_backend("triton"), tf32(True):
            for step in steps:
                for entry in entries_used(step):
                    users.setdefault(entry, []).append(step)
        return users

    def _time(self, entry: str, runs: list[Callable[[], object]]) -> float:
        with use_backend("triton"), tf32(True):
            return sum(self.timer(run, decided(entry)) for run in runs)

    def _entry(self, entry: str, runs: list[Callable[[], object]], judges: list[Judge]) -> bool:
        """Tune one entry, install what was found, and save; return whether it is another launch."""

        def wrong() -> str | None:
            verdicts = (judge.verdict("triton") for judge in judges)
            return next((v.reason for v in verdicts if not v.passed), None)

        key, content = f"{self.klass} {entry}", self.record.content
        kernel, bits, shape = entry.split(" ")
        capability = launches.INTERPRETER if self.device == "cpu" else int(self.klass[2:])
        refused = content["refused"].setdefault(key, {})
        start = launches.nearest(kernel, int(bits), shape, capability)
        try:
            found = descend(
                key,
                start,
                lambda: self._time(entry, runs),
                wrong,
                refused=refused,
                expired=self.expired,
            )
        except RuntimeError:
            self.record.save()  # so that the launch which broke the device is not tried again
            raise
        if found.launch != start:
            content["launches"][key] = found.launch
        content["times"][key] = {
            "before_ms": round(found.before_ms, 5),
            "after_ms": round(found.after_ms, 5),
            "refused": len(refused),
            "finished": found.finished,
        }
        launches.install(self.record.launches)
        self.record.save()
        self.watcher.timed(key, content["times"][key] | {"launch": found.launch})
        return found.launch != start
