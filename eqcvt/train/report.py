"""What the first process of a run shows: a live bar on a terminal, one line per finished epoch."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor


class Reporter:
    """Live progress of a run; silent where ``shown`` is false, no bar where there is no terminal.

    Args:
        shown: whether to print at all.
        steps: optimiser steps of the whole run.
        done: those an earlier run has taken.
        batch_size: images in a step, over all processes.
    """

    def __init__(self, *, shown: bool, steps: int, done: int, batch_size: int) -> None:
        self.console = Console(quiet=not shown)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
            transient=True,
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, state="")
        self.batch_size = batch_size
        self.since, self.count = time.perf_counter(), 0

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Show which epoch begins."""
        self.bar.update(self.task, description=f"epoch {epoch}/{epochs}")
        self.since, self.count = time.perf_counter(), 0

    def step(self, loss: Tensor) -> None:
        """Count an optimiser step; twice a second show its loss and the throughput."""
        self.bar.advance(self.task)
        self.count += 1
        elapsed = time.perf_counter() - self.since
        if self.bar.disable or elapsed < 0.5:
            return
        # Reading the loss waits for the device, hence not at every step.
        state = f"loss {loss.item():.4f}  {self.count * self.batch_size / elapsed:,.0f} img/s"
        self.bar.update(self.task, state=state)
        self.since, self.count = time.perf_counter(), 0

    def end_epoch(self, row: dict[str, Any], epochs: int, *, best: bool) -> None:
        """Print the line of a finished epoch."""
        auc = "-" if row["val_auc"] is None else f"{row['val_auc']:.4f}"
        self.say(
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.4f}  "
            f"validation loss {row['val_loss']:.4f} accuracy {100 * row['val_accuracy']:.2f} % "
            f"AUC {auc}  {row['images_per_second']:,.0f} img/s{'  best' if best else ''}"
        )

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
