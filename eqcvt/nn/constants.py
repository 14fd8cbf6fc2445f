"""Tensors that are made, not learned: filter bases, masks, blur windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """A module with constants: buffers outside of the state dict, always exact in their dtype.

    ``.bfloat16().float()`` gives float32 constants, not what was left of them in bfloat16, and a
    module from the ``meta`` device has them as soon as ``to_empty`` or
    ``load_state_dict(assign=True)`` gives it memory. Other values that are put in their place last
    until the module is moved or converted.
    """

    def constants(self) -> dict[str, Tensor | None]:
        """Return the constants by name, in float64."""
        raise NotImplementedError

    def register_constants(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the constants and register them as buffers."""
        for name, value in self._made().items():
            placed = None if value is None else value.to(device, dtype)
            self.register_buffer(name, placed, persistent=False)

    def _made(self) -> dict[str, Tensor | None]:
        with torch.device("cpu"):  # the meta device has no values
            return self.constants()

    def _held(self) -> dict[str, Tensor]:
        outside = self._non_persistent_buffers_set
        return {k: v for k, v in self._buffers.items() if k in outside and v is not None}

    def _renew(self, names: list[str], device: torch.device | None = None) -> None:
        """Make constants anew, in their place or on a device."""
        made = self._made() if names else {}
        for name in names:
            held, value = self._buffers[name], made.get(name)
            if held is not None and value is not None:
                self._buffers[name] = value.to(device or held.device, held.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._held()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = {k: v for k, v in self._held().items() if type(v) is Tensor}  # not DTensor's
        self._renew([k for k, v in after.items() if v is not before[k] and not v.is_meta])
        return self

    def _load_from_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        parameter = next(self.parameters(), None)
        if parameter is not None and not parameter.is_meta:
            self._renew([k for k, v in self._held().items() if v.is_meta], parameter.device)
