"""Argument checks whose messages name what was given, what is allowed and the nearest choice."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choice(what: str, given: object, allowed: Iterable[str]) -> str:
    """Return ``given`` if it is one of ``allowed``; else raise a ValueError that suggests one."""
    names = list(allowed)
    if isinstance(given, str) and given in names:
        return given
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(given).lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
    raise ValueError(f"{what} must be one of {', '.join(map(repr, names))}, got {given!r}{hint}")


def plain(value: object) -> object:
    """Return a NumPy number as Python's, which JSON and TOML can write; others as they are."""
    return value.item() if isinstance(value, np.generic) else value


def integer(what: str, given: object, minimum: int = 1) -> int:
    """Return ``given`` if it is an integer of at least ``minimum``; otherwise raise."""
    try:
        value = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        value = None
    if value is None or isinstance(given, bool):
        raise TypeError(f"{what} must be an integer, got {type(given).__name__} {given!r}")
    if value < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {value}")
    return value


def number(
    what: str,
    given: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_below: bool = False,
) -> float:
    """Return ``given`` as a float if it is finite and in [low, high] or (low, high]; else raise."""
    value = plain(given)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number, got {type(given).__name__} {given!r}")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, got {value}")
    if not low <= value <= high or (open_below and value == low):
        above = f"above {low:g}" if open_below else f"at least {low:g}"
        # A bound that no one meets by mistake is named only to whom it refuses.
        below = f" and at most {high:g}" if high < 1e38 or value > high else ""
        raise ValueError(f"{what} must be {above}{below}, got {given}")
    return float(value)


def boolean(what: str, given: object) -> bool:
    """Return ``given`` if it is True or False; otherwise raise."""
    if not isinstance(given, bool):
        raise TypeError(f"{what} must be True or False, got {type(given).__name__} {given!r}")
    return given


def fraction(what: str, given: object) -> float:
    """Return ``given`` as a float in [0, 1); otherwise raise."""
    value = number(what, given)
    if not 0 <= value < 1:
        raise ValueError(f"{what} must lie in [0, 1), got {given}")
    return value


def probability(what: str, given: float) -> None:
    """Refuse what is no probability below 1; unlike ``fraction``, Dynamo can trace this."""
    if not 0 <= given < 1:
        raise ValueError(f"{what} must lie in [0, 1), got {given}")


def shapes(op: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Refuse tensors of other shapes than an op's kernels read, which take them as they come.

    Args:
        op: the op's name.
        expected: by the name of each argument, the tensor given, or None, and its right shape.

    Raises:
        ValueError: naming the first that differs, its shape and the right one.
    """
    for name, (given, shape) in expected.items():
        if given is not None and given.shape != tuple(shape):
            raise ValueError(f"{op} needs {name} {list(shape)}, got {list(given.shape)}")


def amp_dtype(amp: str, device_type: str) -> torch.dtype | None:
    """Return what autocast computes in on a type of device, or None for no autocast.

    Raises:
        ValueError: on another name than ``off``, ``bf16`` and ``fp16``, and on fp16 without a GPU.
    """
    dtype = AMP[choice("amp", amp, AMP)]
    if amp == "fp16" and device_type == "cpu":
        raise ValueError("amp='fp16' needs a GPU; on the CPU use amp='bf16' or amp='off'")
    return dtype
