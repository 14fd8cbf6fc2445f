"""Memory that shows what a kernel did not write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def filled_memory() -> Iterator[None]:
    """Fill what torch allocates with NaN, or 77."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else 77)

        return made

    with (
        mock.patch.object(torch, "empty", filling(torch.empty)),
        mock.patch.object(torch, "empty_like", filling(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filling(Tensor.new_empty)),
    ):
        yield
