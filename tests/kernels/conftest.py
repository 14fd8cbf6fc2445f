"""Without a GPU the kernels run in Triton's interpreter, chosen before they are imported."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _scalars_are_indices(tensor, scope):  # type: ignore[no-untyped-def]
        # NumPy 2.4 no longer turns the one-element arrays of the interpreter into integers.
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _scalars_are_indices


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the kernels from rounding the factors of convolutions, as torch's default allows."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
