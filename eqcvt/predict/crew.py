"""The processes that torchrun started for one prediction."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class Crew:
    """This process, ``rank`` of ``size``, and a store in which all say how far they are.

    They have no process group: a prediction has nothing to add up, and a barrier would give up
    after minutes where one process has hours more to do than another.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.store: Any = None
        if self.size > 1:
            store = next(rendezvous("env://", self.rank, self.size))[0]
            self.store = dist.PrefixStore("eqcvt-predict", store)  # type: ignore[attr-defined]

    @contextmanager
    def work(self) -> Iterator[None]:
        """Tell the others that the block's work is done, or that it failed."""
        try:
            yield
        except BaseException:
            self._say("failed")
            raise
        self._say(f"done-{self.rank}")

    def wait(self, seconds: float = 1.0) -> None:
        """Return when all are done, asking every so many seconds.

        Raises:
            RuntimeError: one of them failed.
        """
        while self.store and not self.store.check([f"done-{r}" for r in range(self.size)]):
            if self.store.check(["failed"]):
                raise RuntimeError(
                    "another process failed: the same command does only the parts that are missing"
                )
            time.sleep(seconds)

    def _say(self, what: str) -> None:
        if self.store:
            self.store.set(what, "1")
