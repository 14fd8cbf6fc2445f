"""Which backend the ops of a model's modules take."""

from __future__ import annotations

from torch import nn

from eqcvt._check import choice
from eqcvt.ops._backend import BACKENDS


def set_backend(model: nn.Module, backend: str | None) -> None:
    """Make every module of ``model`` that runs an op take a backend.

    Args:
        model: a model built of this package's modules.
        backend: a backend's name; None for the one in force when the op runs
            (:func:`eqcvt.use_backend`).

    Raises:
        ValueError: on another name; the model is then as it was.
    """
    if backend is not None:
        choice("backend", backend, BACKENDS)
    for module in model.modules():
        if hasattr(type(module), "backend"):
            module.backend = backend  # type: ignore[assignment]
