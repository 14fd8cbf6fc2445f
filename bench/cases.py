"""What there is to time, as data: a case, its key in the table, and which cases a run takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

# A run takes the cases up to its level: `make bench`, with --quick less and with --full all.
LEVELS = ("quick", "default", "full")
# A row's dtype: float32 and tf32 are float32 with torch's switch of TF32 off and on, bfloat16 is
# autocast of modules whose parameters are float32, as a model is trained.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
STANDARD = (
    "escnn",
    "eager",
    "compile",
    "compile-max",
    "native",
    "triton",
    "auto",
    "native-compile",
    "triton-compile",
    "auto-compile",
    "native-graph",
    "triton-graph",
    "auto-graph",
)
WITHOUT_ESCNN = STANDARD[1:]


@dataclass(frozen=True)
class Case:
    """One thing to time; with an implementation it is a row.

    Args:
        op: what is timed: an op's stem, or a model.
        case: how, such as ``training``; the last word of it says which of the two.
        shape: of the input, the batch first.
        dtype: one of ``DTYPES``.
        level: the first of ``LEVELS`` that takes it.
        implementations: who does it, of those that are there.
        options: what its file builds it from.
    """

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    level: str = "default"
    implementations: tuple[str, ...] = STANDARD
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> bool:
        """Whether it goes forward and backward."""
        return self.case.split()[-1] in ("training", "step")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Its case, op, shape and dtype as they stand in a row."""
        return self.case, self.op, "x".join(map(str, self.shape)), self.dtype

    def __str__(self) -> str:
        return "-".join((self.op, *self.key[::2], self.dtype)).replace(" ", "_")


def both(op: str, name: str = "", **rest: Any) -> list[Case]:
    """Return the case of training and that of inference."""
    return [Case(op, f"{name} {case}".strip(), **rest) for case in ("training", "inference")]
