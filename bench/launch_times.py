"""Launches of one kernel side by side on a GPU: which are right, and how long each takes.

Every combination of the values given, with all other fields as in ``kernels/launches.json``, is
checked as ``eqcvt tune`` checks, in processes of their own, and timed in the model's training step
if it is right. The launch in force comes first and once more last, which shows how much times
drift; what is shipped is faster than both. ``eqcvt tune`` finds launches by itself; this answers
one question in a minute::

    python -m bench.launch_times conv_attention_attend_bwd_keys 16 D32 STEP=32 REGISTERS=96,80 \\
        --images 128 --images 16 --ship
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from bench.origin import stamp
from eqcvt._files import read_json, write_json, write_text
from eqcvt.kernels import launches
from eqcvt.kernels.launches import Launch
from eqcvt.ops import use_backend
from eqcvt.tune import _TIMED, cases
from eqcvt.tune.check import Unchecked, apart, tf32
from eqcvt.tune.search import GAIN, CudaTimer, Timer, decided, entries_used

# What is timed and what is checked, by bits, as ``eqcvt tune`` does.
BITS = {8 * dtype.itemsize: (dtype, precisions) for dtype, precisions in _TIMED.items()}


class Row(NamedTuple):
    """A launch, what is wrong with it or None, and its milliseconds by number of images."""

    launch: Launch
    wrong: str | None
    ms: dict[int, float]


def candidates(key: str, values: Mapping[str, Sequence[int]], capability: int) -> list[Launch]:
    """Return the launch in force, then every other combination of ``values``.

    Raises:
        KeyError: if there is no launch of that kernel, bits and shape.
        ValueError: if a field or a value is unknown.
    """
    kernel, bits, shape = key.split(" ")[1:]
    now = launches.nearest(kernel, int(bits), shape, capability)
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


def compare(
    op: str,
    key: str,
    tried: Sequence[Launch],
    images: Sequence[int],
    *,
    check: Callable[[Launch, str], str | None],
    timer: Timer,
    device: str = "cuda",
    jobs: int = 8,
) -> Iterator[Row]:
    """Check all launches, then time the right ones, the first once more at the end."""
    entry = key.partition(" ")[2]
    precisions = BITS[int(entry.split(" ")[1])][1]
    with ThreadPoolExecutor(jobs) as pool:
        verdicts = [[pool.submit(check, launch, p) for p in precisions] for launch in tried]
        reasons = [next((v.result() for v in each if v.result()), None) for each in verdicts]
    with use_backend("triton"), tf32(True):
        made = {count: steps(op, entry, count, device) for count in images}
        for launch, wrong in [*zip(tried, reasons, strict=True), (tried[0], reasons[0])]:
            ms = {}
            if wrong is None:
                with launches.installed({key: launch}):
                    for count, runs in made.items():
                        ms[count] = sum(timer(run, decided(entry)) for run in runs)
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


def _field(text: str) -> tuple[str, list[int]]:
    name, equals, values = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return name, [int(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a field is given as ROWS=4,8,16 with whole numbers, got {text!r}"
        ) from None


def main() -> None:
    """Compare the launches asked for, print a row each, and ship the fastest if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", help="as kernels/launches.json names it")
    parser.add_argument("bits", type=int, choices=list(BITS), help="of the dtype")
    parser.add_argument("shape", help="class of the shape, as in D32, K256 or any")
    parser.add_argument("fields", nargs="+", type=_field, help="FIELD=VALUE,VALUE,...")
    parser.add_argument(
        "--op", choices=list(cases.TIMED), help="[the op the kernel is named after]"
    )
    parser.add_argument("--images", type=int, action="append", help="may be repeated [128]")
    parser.add_argument("--call", action="append", help="a call of the check [all of the op's]")
    parser.add_argument("--jobs", type=int, default=8, help="checks at a time [8]")
    parser.add_argument("--ship", action="store_true", help="put the fastest into launches.json")
    parser.add_argument("--out", type=Path, help="a JSON file of everything")
    options = parser.parse_args()
    images = options.images or [128]
    op = options.op or next((o for o in cases.TIMED if options.kernel.startswith(o)), None)
    if op is None:
        parser.error(f"{options.kernel} is named after no op: give --op")
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device to time launches on")
    capability = launches.properties(torch.device("cuda")).capability
    key = f"sm{capability} {options.kernel} {options.bits} {options.shape}"
    try:
        tried = candidates(key, dict(options.fields), capability)
    except (KeyError, ValueError) as error:
        parser.error(str(error.args[0]))

    def check(launch: Launch, precision: str) -> str | None:
        try:
            return apart(op, precision, "triton", "cuda", {key: launch}, options.call or ()).reason
        except Unchecked as error:
            return str(error)

    rows: list[Row] = []
    origin = {**stamp("cuda"), "entry": key}
    for row in compare(op, key, tried, images, check=check, timer=CudaTimer(), jobs=options.jobs):
        rows.append(row)
        times = "  ".join(f"{ms:.4f} ms at {count} images" for count, ms in row.ms.items())
        print(f"{json.dumps(row.launch)}: {row.wrong or times}", flush=True)
        if options.out:
            write_json(options.out, origin | {"rows": [row._asdict() for row in rows]})
    if not any(row.ms for row in rows):
        raise SystemExit("error: none of these launches is right")
    best = fastest(rows)
    print(f"fastest: {json.dumps(best or tried[0])}{'' if best else ', which is in force'}")
    if options.ship and best:
        ship(key, best)
        print(f"wrote {launches.FILE}")


if __name__ == "__main__":
    main()
