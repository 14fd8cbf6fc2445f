"""Launches side by side on a GPU: which are right, and how long each takes.

A question names a kernel, bits and class of shape, as ``kernels/launches.json`` does, and values of
fields. Every combination of these, with all other fields as in the table, is checked as ``eqcvt
tune`` checks and called once as the model's training step does, each question in a process of its
own; then those that are right are timed in that step, one after another. The launch in force comes
first and once more last, which shows how much times drift; what is shipped is faster than both.
``eqcvt tune`` finds launches by itself; this answers a dozen questions in minutes::

    python -m bench.launch_times "lift_blur 16 any ROWS=4,8,16" --images 128 --images 16
    python -m bench.launch_times @bench/questions.txt --ship
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.origin import stamp
from eqcvt._files import read_json, write_json, write_text
from eqcvt.kernels import launches
from eqcvt.kernels.launches import Launch
from eqcvt.ops import use_backend
from eqcvt.tune import _TIMED, cases
from eqcvt.tune.check import Judge, first_line, tf32
from eqcvt.tune.search import GAIN, CudaTimer, Timer, decided, entries_used

# What is timed and what is checked, by bits, as ``eqcvt tune`` does.
BITS = {8 * dtype.itemsize: (dtype, precisions) for dtype, precisions in _TIMED.items()}


class Question(NamedTuple):
    """The launches of one entry to be compared, the one in force first."""

    op: str
    key: str
    tried: list[Launch]

    @property
    def entry(self) -> str:
        """The key without its device class."""
        return self.key.partition(" ")[2]

    @property
    def bits(self) -> int:
        """Those of the dtype."""
        return int(self.entry.split(" ")[1])


class Row(NamedTuple):
    """A launch, what is wrong with it or None, and its milliseconds by number of images."""

    launch: Launch
    wrong: str | None
    ms: dict[int, float]


def question(text: str, capability: int) -> Question:
    """Read a question.

    Raises:
        ValueError: if it is none, or names a kernel, field or value that there is not.
    """
    words = text.split()
    fields: dict[str, list[int]] = {}
    try:
        kernel, bits, shape, *rest = words
        for word in rest:
            name, values = word.split("=")
            fields[name] = [int(value) for value in values.split(",")]
        if int(bits) not in BITS or not fields:
            raise ValueError
    except ValueError:
        raise ValueError(
            f'a question is one such as "lift_blur 16 any ROWS=4,8,16", got {text!r}'
        ) from None
    op = next((op for op in cases.TIMED if kernel.startswith(op)), None)
    key = f"sm{capability} {kernel} {bits} {shape}"
    try:
        now = launches.nearest(kernel, int(bits), shape, capability)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    if op is None:
        raise ValueError(f"{kernel} is named after no op of {', '.join(cases.TIMED)}")
    return Question(op, key, candidates(key, now, fields))


def candidates(key: str, now: Launch, values: Mapping[str, Sequence[int]]) -> list[Launch]:
    """Return the launch in force, then every other combination of ``values``.

    Raises:
        ValueError: if a field or a value is unknown.
    """
    found = [dict(now)]
    for chosen in itertools.product(*values.values()):
        launch = now | dict(zip(values, chosen, strict=True))
        if launch not in found:
            found += launches.validated({key: launch}).values()
    return found


def steps(op: str, entry: str, images: int, device: str) -> list[Callable[[], object]]:
    """Return the op's training steps that look an entry up.

    Raises:
        ValueError: if none does.
    """
    x = torch.empty(0, dtype=BITS[int(entry.split(" ")[1])][0], device=device)
    found, looked_up = [], set()
    for options, gradient in cases.TIMED[op]:
        shape = (images, *options["shape"][1:])
        step = cases.step(op, options | {"shape": shape}, gradient, x)
        used = entries_used(step)
        looked_up.update(used)
        if entry in used:
            found.append(step)
    if not found:
        raise ValueError(f"{op}'s steps look {entry!r} up nowhere, but {sorted(looked_up)}")
    return found


def judge(
    asked: Question, images: Sequence[int], calls: Sequence[str] | None, device: str
) -> Iterator[str | None]:
    """Yield what is wrong with each launch, or None; those that are right are compiled by then."""
    judges = [Judge(asked.op, p, device, calls or None) for p in BITS[asked.bits][1]]
    with use_backend("triton"), tf32(True):
        runs = [run for count in images for run in steps(asked.op, asked.entry, count, device)]
    for launch in asked.tried:
        with launches.installed({asked.key: launch}):
            verdicts = (each.verdict("triton") for each in judges)
            wrong = next((v.reason for v in verdicts if not v.passed), None)
            with use_backend("triton"), tf32(True):
                try:
                    for run in runs if wrong is None else ():
                        run()
                except Exception as error:  # whatever a compiler or a driver raises
                    wrong = first_line(error)
        yield wrong


def apart(
    asked: Question,
    images: Sequence[int],
    calls: Sequence[str] | None = None,
    device: str = "cuda",
    seconds: float | None = None,
) -> list[str | None]:
    """Return what :func:`judge` yields in another process; a launch that ends it is wrong.

    What is not judged after so many seconds of a process is given as wrong.
    """
    reasons: list[str | None] = []
    while len(reasons) < len(asked.tried):
        rest = asked._replace(tried=asked.tried[len(reasons) :])
        try:
            run = subprocess.run(
                [sys.executable, "-m", "bench.launch_times", "--judge"],
                input=json.dumps([rest, images, calls, device]),
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as late:
            reasons += map(json.loads, (late.stdout or b"").decode().splitlines())
            left = len(asked.tried) - len(reasons)
            return [*reasons, *[f"it had not been judged after {seconds:g} s"] * left]
        reasons += map(json.loads, run.stdout.splitlines())
        if run.returncode and len(reasons) < len(asked.tried):
            said = run.stderr.strip().splitlines() or [f"its process ended with {run.returncode}"]
            reasons.append(said[-1])
    return reasons


def compare(
    asked: Question,
    reasons: Sequence[str | None],
    images: Sequence[int],
    *,
    timer: Timer,
    device: str = "cuda",
) -> Iterator[Row]:
    """Time the launches that are right, the first once more at the end."""
    tried = asked.tried
    with use_backend("triton"), tf32(True):
        made = {count: steps(asked.op, asked.entry, count, device) for count in images}
        for launch, wrong in [*zip(tried, reasons, strict=True), (tried[0], reasons[0])]:
            ms = {}
            if wrong is None:
                with launches.installed({asked.key: launch}):
                    for count, runs in made.items():
                        ms[count] = sum(timer(run, decided(asked.entry)) for run in runs)
            yield Row(launch, wrong, ms)


def fastest(rows: Sequence[Row]) -> Launch | None:
    """Return the launch to ship in the place of the first row's, or None if that stays.

    It takes the least time for the first number of images, clearly less than the launch in force,
    which is the first row and the last, and for none more.
    """
    first, *others, last = rows
    right = [row for row in others if row.ms]
    if not right:
        return None
    best = min(right, key=lambda row: next(iter(row.ms.values())))
    now = [min(first.ms[count], last.ms[count]) for count in first.ms]  # none where it is wrong
    gains = [ms / before for ms, before in zip(best.ms.values(), now, strict=bool(now))]
    return best.launch if not now or (gains[0] < GAIN and max(gains) <= 1) else None


def ship(key: str, launch: Launch, path: Path = launches.FILE) -> None:
    """Put a launch into the shipped table, behind the entries of its kernel if it is new there."""
    table = read_json(path)
    rows = [(name, table[name]) for name in table if name != key]
    places = [i for i, (name, _) in enumerate(rows) if name.split(" ")[1] == key.split(" ")[1]]
    place = list(table).index(key) if key in table else places[-1] + 1 if places else len(rows)
    rows.insert(place, (key, launch))
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in rows)
    write_text(path, f"{{\n{lines}\n}}\n")


class _Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Take a line of a file as a question, but for empty ones and comments."""
        return [] if arg_line.strip()[:1] in ("", "#") else [arg_line]


def main() -> None:
    """Answer the questions, a row for each launch, and ship the fastest if asked to."""
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.add_argument("questions", nargs="*", help="or @FILE with one a line")
    parser.add_argument("--images", type=int, action="append", help="may be repeated [128]")
    parser.add_argument("--call", action="append", help="a call of the check [all of the op's]")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time [8]")
    parser.add_argument("--seconds", type=float, default=1800, help="for each of them [1800]")
    parser.add_argument("--ship", action="store_true", help="put the fastest into launches.json")
    parser.add_argument("--out", type=Path, help="a JSON file of everything")
    parser.add_argument("--judge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        asked, *rest = json.load(sys.stdin)
        for reason in judge(Question(*asked), *rest):
            print(json.dumps(reason), flush=True)
        return
    if not options.questions:
        parser.error("no question was asked")
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device to time launches on")
    capability = launches.properties(torch.device("cuda")).capability
    try:
        all_asked = [question(text, capability) for text in options.questions]
    except ValueError as error:
        parser.error(str(error))
    images = options.images or [128]
    with ThreadPoolExecutor(options.jobs) as pool:
        judged = list(
            pool.map(
                lambda each: apart(each, images, options.call, seconds=options.seconds), all_asked
            )
        )
    content: dict[str, Any] = {**stamp("cuda"), "questions": {}}
    timer, answered = CudaTimer(), False
    for each, reasons in zip(all_asked, judged, strict=True):
        print(each.key)
        rows: list[Row] = []
        for row in compare(each, reasons, images, timer=timer):
            rows.append(row)
            times = "  ".join(f"{ms:.4f} ms at {count} images" for count, ms in row.ms.items())
            print(f"  {json.dumps(row.launch)}: {row.wrong or times}", flush=True)
        answered |= any(row.ms for row in rows)
        best = fastest(rows)
        print(f"  fastest: {json.dumps(best or each.tried[0])}{'' if best else ', as it is'}")
        if options.ship and best:
            ship(each.key, best)
        content["questions"][each.key] = [row._asdict() for row in rows]
        if options.out:
            write_json(options.out, content)
    if not answered:
        raise SystemExit("error: none of these launches is right")


if __name__ == "__main__":
    main()
