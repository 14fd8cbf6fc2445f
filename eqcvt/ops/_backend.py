"""Which implementation an op takes: one list of candidates, asked in order, each with its reason.

A backend is a module per op (``eqcvt.native.lift``, ``eqcvt.kernels.lift``) with one function for
each torch op of :mod:`eqcvt.ops._register` and ``supports(...) -> reason or None``. With ``"auto"``
the first that can is taken and every refusal is logged once; on a GPU it must be proven there as
well (:mod:`eqcvt.ops._proof`), which its first use does. A backend asked for by name that cannot
raises with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from eqcvt import _check
from eqcvt.ops import _proof, _prove

log = logging.getLogger("eqcvt")

BACKENDS = ("auto", "reference", "native", "triton")
ORDER = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}
OPS = ("conv_attention", "lift", "mlp_block", "token_embed")

_requested = os.environ.get("EQCVT_BACKEND") or "auto"
_refusals: set[tuple[str, str, str]] = set()
_warned: set[str] = set()
_modules: dict[str, dict[str, ModuleType]] = {"native": {}, "triton": {}}


class Choice(NamedTuple):
    """One row of :func:`explain`: whether a backend can serve an op on a device, or why not."""

    op: str
    device: str
    backend: str
    available: bool
    chosen: bool
    reason: str | None


class CannotServe(RuntimeError):
    """A backend that was asked for by name cannot serve a call; the text says why."""


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


def _unavailable(backend: str, device: str) -> str | None:
    """Return why ``backend`` serves nothing on ``device``, or None, its modules then imported.

    All are imported at once, as ``torch.compile`` reads the global that holds them only once: what
    was added later it would not see.
    """
    reason = _REASONS[backend](device)
    if reason is None and not _modules[backend]:
        package = {"native": "native", "triton": "kernels"}[backend]
        for op in OPS:
            _modules[backend][op] = importlib.import_module(f"eqcvt.{package}.{op}")
        if backend == "triton" and device == "cuda":
            from eqcvt.kernels import launches

            launches.install(_proof.tuned_launches())
    return reason


def _unproven(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the automatic choice leaves a backend out for want of a proof, or None."""
    if device.type != "cuda":
        return None
    precision = _proof.precision_in_force(op, dtype)
    if precision is None:
        return f"GPU kernels are checked in {', '.join(_proof.PRECISIONS)}, not in {dtype}"
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = _prove.why_not(_proof.kind(index), op, backend, precision)
    return reason and f"{reason}; EQCVT_BACKEND={backend} takes it all the same"


def _warn_of_plain_pytorch(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """Say once that a GPU runs without kernels which are there and only lack a proof."""
    if _warned:
        return
    for backend in _candidates(device.type)[:-1]:
        if _unavailable(backend, device.type) is not None:
            continue
        reason = _unproven(op, backend, device, dtype)
        if reason is not None:
            _warned.add(device.type)
            log.warning("%s on %s: plain PyTorch, not %s: %s", op, device, backend, reason)
            return


def _exporting() -> bool:
    """Return whether ``torch.export`` traces, whose program then needs nothing of this package."""
    return torch.compiler.is_exporting()


# The mark that torch.compiler.assume_constant_result sets, which would import the compiler here.
# _exporting has it because Dynamo takes is_exporting() for true under torch.compile (torch 2.11).
for _constant in (_unavailable, _unproven, _warn_of_plain_pytorch, _exporting):
    _constant._dynamo_marked_constant = True  # type: ignore[union-attr]


def _why_not_native(device: str) -> str | None:
    from eqcvt import native

    return native.unavailable(device)


def _why_not_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 makes it run on the CPU"
    if device != "cuda" and not interpreted:
        return f"it does not run on {device}"
    return None


_REASONS = {"native": _why_not_native, "triton": _why_not_triton}


def module(op: str, backend: str, device: str) -> ModuleType:
    """Return the module of ``op`` in a backend that was chosen, here or where a graph was saved.

    Raises:
        CannotServe: if the graph is of a machine that had the backend, and this one has not.
    """
    if not _modules[backend]:
        reason = _unavailable(backend, device)
        if reason is not None:
            raise CannotServe(
                f"this graph needs backend {backend!r} for {op} on {device}: {reason}"
            )
    return _modules[backend][op]


def has(op: str, backend: str, function: str) -> bool:
    """Return whether a backend that was chosen has a function of ``op`` that it may do without."""
    return hasattr(_modules[backend][op], function)


def _candidates(device: str) -> tuple[str, ...]:
    return ORDER.get(device, ("reference",))


def explain(devices: tuple[str, ...] | None = None) -> list[Choice]:
    """Return, for each op, device and backend, whether it can be used, is chosen, and why not.

    A backend that is available can still refuse a call, by its sizes or dtype; then the next one
    is taken. GPU kernels are chosen precision by precision: those that have not been checked yet if
    the check, at their first use, finds them right; the reason names those that it found wrong.
    All that is so with ``"auto"`` in force; a backend asked for by name is chosen, or none is.

    Args:
        devices: device types; by default the CPU and, where there is one, CUDA.

    Raises:
        ValueError: if ``EQCVT_BACKEND`` names no backend.
    """
    asked = _check.choice("EQCVT_BACKEND", current_backend(), BACKENDS)
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for op in OPS:
        for device in devices:
            chosen = False
            candidates = _candidates(device)
            if asked not in ("auto", *candidates):
                candidates = (asked, *candidates)
            for backend in candidates:
                reason = None if backend == "reference" else _unavailable(backend, device)
                available = take = reason is None
                if asked not in ("auto", backend):
                    reason, take = reason or f"{asked!r} is asked for", False
                elif asked == "auto" and take and backend != "reference" and device == "cuda":
                    reason, take = _standing(op, backend)
                rows.append(Choice(op, device, backend, available, take and not chosen, reason))
                chosen = chosen or take
    return rows


def _standing(op: str, backend: str) -> tuple[str | None, bool]:
    """Return what a backend lacks to be proven on the GPUs here, and whether it is taken.

    It is in one precision if it is right there, or may be found so at its first use.
    """
    for device in _proof.devices():
        gaps = [_proof.gap(device, op, backend, each) for each in _proof.PRECISIONS]
        wrong = [gap.reason for gap in gaps if gap is not None and not gap.unchecked]
        unchecked = [gap.reason for gap in gaps if gap is not None and gap.unchecked]
        if wrong:
            reason = "; ".join(dict.fromkeys(wrong))
            return f"{reason}; `eqcvt tune` checks it", len(wrong) < len(gaps)
        if unchecked:
            return f"{unchecked[0]}; the first use checks it", True
    return None, True


def _transforms() -> str | None:
    """Name what is taken of this call that registered ops, which have gradients only, lack.

    Torch would take their tangents for zero. It has no public name for either state.
    """
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return "forward-mode derivatives"
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return None
    return "torch.func transforms (grad, vmap)"


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    supports: Callable[[Any], str | None],
) -> str:
    """Return the name of the backend that serves a call of ``op``.

    Args:
        op: name of the op.
        device: that of its tensors.
        dtype: what it computes in.
        backend: a backend's name, or None for the one in force.
        supports: asks a backend's module about this call, for the reason why not or None.

    Raises:
        CannotServe: if the backend asked for by name cannot serve the call, with the reason.
    """
    requested = current_backend() if backend is None else backend
    if requested == "reference" or _exporting():  # every op has one, on every device
        return "reference"
    _check.choice("EQCVT_BACKEND" if backend is None else "backend", requested, BACKENDS)
    if transforms := _transforms():
        if requested == "auto":
            return "reference"
        raise CannotServe(
            f"backend {requested!r} has no {transforms} of {op}; use_backend('reference') has"
        )
    if requested != "auto":
        reason = _unavailable(requested, device.type) or supports(_modules[requested][op])
        if reason is not None:
            raise CannotServe(
                f"backend {requested!r} cannot serve {op} on {device.type}: {reason}; "
                f"use_backend('auto') takes the fastest that can"
            )
        return requested
    for candidate in _candidates(device.type):
        if candidate == "reference":
            break
        reason = _unavailable(candidate, device.type) or supports(_modules[candidate][op])
        reason = reason or _unproven(op, candidate, device, dtype)  # which may take its time
        if reason is None:
            return candidate
        # A compiler traces this function, and a log record would break its graph.
        if not torch.compiler.is_compiling() and (op, candidate, reason) not in _refusals:
            _refusals.add((op, candidate, reason))
            log.info("%s on %s: not %s, %s", op, device.type, candidate, reason)
    _warn_of_plain_pytorch(op, device, dtype)
    return "reference"
