"""Stands in for a CUDA graph where there is no GPU: records torch operations, runs them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The last one puts a number from the host into a tensor.
WAITING = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal),
    aten.lift_fresh,
)


class Operations(TorchDispatchMode):
    """Keeps every torch operation with its tensors, and refuses those that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            raise RuntimeError(f"{func} waits for the device")
        kwargs = kwargs or {}
        results = func(*args, **kwargs)

        def again() -> None:
            """Run it on the same tensors, and put the results where they were, as a graph does."""
            for old, new in zip(
                tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)

        self.calls.append(again)
        return results


class Recorded:
    """Stands in for a CUDA graph: numbers, branches and addresses of the recording are kept.

    A CUDA graph does not run what it records; here the recording is the first replay.
    """

    made: list[Recorded]

    def __init__(self, device: torch.device) -> None:
        self.runs, self.recordings, self.replays = 0, 0, 0
        self.made.append(self)

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        self.runs += 1
        return work()

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recordings += 1
        operations, first = Operations(), True
        with operations:
            result = work()

        def replay() -> Tensor:
            nonlocal first
            self.replays += 1
            # What was recorded has its gradients and casts; nothing is added to it.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for call in [] if first else operations.calls:
                    call()
            first = False
            return result.clone()

        return replay
