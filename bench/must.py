"""What must be reached on one H100, and whether a run reached it, from that run's own rows.

`make bench ARGS="--device cuda --must"` times only what stands here and prints the table at its
end; `python -m bench.must bench/results/<device>.csv` prints it from a file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from bench.cases import Case
from bench.rows import Row, lines, origins, read

EAGER = ("triton", "native", "auto")
GRAPHED = tuple(f"{name}-graph" for name in EAGER)
OURS = (*EAGER, *GRAPHED)


class Goal(NamedTuple):
    """Ours must be ``factor`` times as fast as another, or stay within ``mib``.

    ``case`` is that of :attr:`Case.key`, ``ours`` are the implementations of which the best counts,
    and ``others`` those it is held against, the best of them too, each with its dtype; in the case
    of the name ``against``, if that is another.
    """

    what: str
    case: tuple[str, str, str, str]
    others: tuple[tuple[str, str], ...] = ()
    factor: float = 0.0
    ours: tuple[str, ...] = OURS
    mib: float = 0.0
    against: str = ""

    @property
    def other_case(self) -> tuple[str, str, str]:
        """The case, op and shape of ``others``."""
        case, op, shape, _ = self.case
        return self.against or case, op, shape


LIFT = ("lift", "128x3x129x129")
CORE = ("conv_attention", "128x3x3721x961")
BLOCK = "128x32x61x61"
MODEL = ("EqCvT", "128x3x129x129")
BF16, TF32 = "bfloat16", "tf32"
MODEL_OURS = (*OURS, "triton-compile", "auto-compile")
GOALS = (
    Goal("steerable block, training", ("training", *LIFT, BF16), (("compile", BF16),), 8),
    Goal(
        "steerable block, training",
        ("training", *LIFT, BF16),
        (("escnn", BF16), ("escnn", TF32)),
        25,
    ),
    Goal("steerable block, inference", ("inference", *LIFT, BF16), (("compile", BF16),), 8),
    Goal("steerable block, training", ("training", *LIFT, TF32), (("compile", TF32),), 4),
    Goal("steerable block, training, memory", ("training", *LIFT, BF16), ours=EAGER, mib=358.4),
    Goal("attention core, forward", ("core inference", *CORE, BF16), (("cudnn-64", BF16),), 1.5),
    Goal("attention core, both ways", ("core training", *CORE, BF16), (("cudnn-64", BF16),), 1.9),
    Goal(
        "attention block, training",
        ("eqcvt training", "conv_attention", BLOCK, BF16),
        (("compile", BF16),),
        2.5,
    ),
    Goal(
        "MLP block, training",
        ("eqcvt training", "mlp_block", BLOCK, BF16),
        (("compile", BF16),),
        2,
    ),
    Goal(
        "CvT, first stage, training",
        ("training", "CvT stage 1", "128x1x129x129", BF16),
        (("compile", BF16),),
        1,
    ),
    Goal(
        "CvT, second stage, training",
        ("training", "CvT stage 2", "128x64x33x33", BF16),
        (("compile", BF16),),
        1,
    ),
    Goal(
        "EqCvT, training, 128 images",
        ("training", *MODEL, BF16),
        (("escnn", BF16), ("escnn", TF32)),
        20,
        MODEL_OURS,
    ),
    Goal(
        "EqCvT, training, 128 images",
        ("training", *MODEL, BF16),
        (("compile", BF16),),
        4,
        MODEL_OURS,
    ),
    Goal(
        "EqCvT, whole step, 16 images",
        ("step", "EqCvT", "16x3x129x129", BF16),
        (("compile-max", BF16),),
        3,
        GRAPHED,
    ),
    Goal(
        "EqCvT, whole step with its loader, 128 images",
        ("loaded step", *MODEL, BF16),
        tuple((name, BF16) for name in GRAPHED),
        1 / 1.15,
        GRAPHED,
        against="step",
    ),
    Goal(
        "EqCvT, inference, 128 images",
        ("inference", *MODEL, BF16),
        (("compile", BF16),),
        3.5,
        MODEL_OURS,
    ),
    Goal(
        "EqCvT, training, 128 images, memory",
        ("training", *MODEL, BF16),
        ours=EAGER,
        mib=1024,
    ),
)


def needs(case: Case, implementation: str) -> bool:
    """Whether a row of this case and implementation stands in a goal."""
    for goal in GOALS:
        if case.key == goal.case and implementation in goal.ours:
            return True
        if case.key[:3] == goal.other_case and (implementation, case.dtype) in goal.others:
            return True
    return False


def _best(
    rows: list[Row], case: tuple[str, str, str], names: tuple[tuple[str, str], ...], column: str
) -> Row | None:
    """Return the row of the smallest number among implementations in their dtypes."""
    found = [
        row
        for row in rows
        if (row["case"], row["op"], row["shape"]) == case
        and (row["implementation"], row["dtype"]) in names
        and row[column]
    ]
    return min(found, key=lambda row: float(row[column]), default=None)


def table(rows: list[Row]) -> list[Row]:
    """Return one row per goal: what it asks, what was reached by what, and pass, fail or missing.

    A ratio is that of the medians.
    """
    result = []
    for goal in GOALS:
        column, unit = ("peak_mib", "MiB") if goal.mib else ("median_ms", "ms")
        dtype = goal.case[3]
        ours = _best(rows, goal.case[:3], tuple((name, dtype) for name in goal.ours), column)
        other = _best(rows, goal.other_case, goal.others, column) if goal.others else None
        reached, verdict = "", "missing"
        if ours is not None and goal.mib:
            value = float(ours[column])
            reached, verdict = f"{value:.0f} MiB", "pass" if value <= goal.mib else "FAIL"
        elif ours is not None and other is not None:
            ratio = float(other[column]) / float(ours[column])
            reached, verdict = f"{ratio:.2f} x", "pass" if ratio >= goal.factor else "FAIL"
        result.append(
            {
                "what": f"{goal.what}, {dtype}",
                "held against": "" if goal.mib else _said(other, goal.others, column, unit),
                "ours": _said(ours, (("ours", dtype),), column, unit),
                "required": f"<= {goal.mib:.0f} MiB" if goal.mib else f">= {goal.factor:.3g} x",
                "reached": reached,
                "verdict": verdict,
            }
        )
    return result


def _said(row: Row | None, names: tuple[tuple[str, str], ...], column: str, unit: str) -> str:
    if row is None:
        return f"no row of {'/'.join(dict.fromkeys(name for name, _ in names))}"
    return f"{row['implementation']} ({row['dtype']}) {float(row[column]):.4g} {unit}"


def report(rows: list[Row]) -> list[str]:
    """Return the table as lines of text, and how many goals were reached."""
    goals = table(rows)
    passed = sum(goal["verdict"] == "pass" for goal in goals)
    said = [*lines(goals, tuple(goals[0])), f"{passed} of {len(goals)} reached"]
    for column in ("commit", "versions"):
        if " / " in (several := origins(rows, column)):
            said.append(f"rows of more than one {column}, so not of one run: {several}")
    return said


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("\n".join(report(read(Path(name)))))
