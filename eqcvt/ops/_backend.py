"""Which implementation an op takes: one list of candidates, asked in order, each with its reason.

A candidate answers ``supports(device) -> reason or None``. With ``"auto"`` the first that can is
taken and every refusal is logged once; a backend asked for by name that cannot raises with its
reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqcvt import _check

log = logging.getLogger("eqcvt")

BACKENDS = ("auto", "reference", "native", "triton")
ORDER = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}

_requested = os.environ.get("EQCVT_BACKEND") or "auto"
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_refusals: set[tuple[str, str, str]] = set()


class Choice(NamedTuple):
    """One row of :func:`explain`: whether a backend can serve an op on a device, or why not."""

    op: str
    device: str
    backend: str
    available: bool
    chosen: bool
    reason: str | None


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Make ``implementation`` serve ``op`` when ``backend`` is chosen."""
    _implementations.setdefault(op, {})[backend] = implementation


def current_backend() -> str:
    """Return the backend in force: ``use_backend``'s, at first ``EQCVT_BACKEND`` or auto."""
    return _requested


class use_backend:
    """Choose the backend of every op, as a call (until the next) or as a context manager.

    It holds for the process, and for the modules of ``eqcvt.fast``; ``eqcvt.EqCvT`` is the
    reference and stays it. The variable ``EQCVT_BACKEND``, read at import, sets what holds at
    first.

    Args:
        name: ``"auto"`` (the fastest that can), ``"reference"``, ``"native"`` or ``"triton"``.

    Raises:
        ValueError: on another name. That a named backend cannot serve an op is raised at the op's
            use.

    Example:
        >>> with use_backend("reference"):
        ...     current_backend()
        'reference'
    """

    def __init__(self, name: str) -> None:
        global _requested
        self._name = _check.choice("backend", name, BACKENDS)
        self._before, _requested = _requested, self._name

    def __enter__(self) -> None:
        global _requested
        if _requested != self._name:  # entered again, after another choice
            self._before, _requested = _requested, self._name

    def __exit__(self, *exception: object) -> None:
        global _requested
        _requested = self._before


def _refusal(op: str, backend: str) -> str | None:
    if backend in _implementations[op]:
        return None
    return f"this version of eqcvt has no {backend} implementation of {op}"


def _candidates(device: str) -> tuple[str, ...]:
    return ORDER.get(device, ("reference",))


def explain(devices: tuple[str, ...] | None = None) -> list[Choice]:
    """Return, for each op, device and backend, whether it can be used, is chosen, and why not.

    Args:
        devices: device types; by default the CPU and, where there is one, CUDA.
    """
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for op in sorted(_implementations):
        for device in devices:
            chosen = False
            for backend in _candidates(device):
                reason = _refusal(op, backend)
                rows.append(
                    Choice(
                        op, device, backend, reason is None, reason is None and not chosen, reason
                    )
                )
                chosen = chosen or reason is None
    return rows


def _choose(op: str, device: str, requested: str) -> str:
    _check.choice("EQCVT_BACKEND", requested, BACKENDS)
    if requested != "auto":
        reason = _refusal(op, requested)
        if reason is None and requested not in _candidates(device):
            reason = f"it does not run on {device}"
        if reason is not None:
            raise RuntimeError(
                f"backend {requested!r} cannot serve {op} on {device}: {reason}; "
                f"use_backend('auto') takes the fastest that can"
            )
        return requested
    for backend in _candidates(device):
        reason = _refusal(op, backend)
        if reason is None:
            return backend
        # A compiler traces this function, and a log record would break its graph.
        if not torch.compiler.is_compiling() and (op, device, backend) not in _refusals:
            _refusals.add((op, device, backend))
            log.info("%s on %s: not %s, %s", op, device, backend, reason)
    raise AssertionError("unreachable: every op has a reference")


def dispatch(op: str, x: Tensor, backend: str | None) -> Callable[..., Any]:
    """Return the implementation of ``op`` for the device of ``x``.

    Args:
        op: name of the op.
        x: tensor whose device decides.
        backend: a backend's name, or None for the one in force.

    Raises:
        RuntimeError: if the backend asked for by name cannot serve the op, with the reason.
    """
    requested = current_backend() if backend is None else backend
    if requested == "reference":  # every op has one, on every device
        return _implementations[op]["reference"]
    return _implementations[op][_choose(op, x.device.type, requested)]
