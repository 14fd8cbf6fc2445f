"""``eqcvt tune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from eqcvt.cli.app import app, console, note

if TYPE_CHECKING:
    from eqcvt.tune.record import Record


@app.command()
def tune(
    *,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Check the kernels, leave launches as they are.")
    ] = False,
    op: Annotated[
        list[str] | None, typer.Option(help="An op; may be repeated (default: all).")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="triton | native; may be repeated (default: both).")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="With --check-only: float32 | tf32 | bfloat16 | float16 (default: all)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file (default: $EQCVT_TUNED, or one in ~/.cache/eqcvt)."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Try no further launch after so many.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Checks at a time, a process each.")] = 4,
    again: Annotated[
        bool, typer.Option("--again", help="Do what the file says is done too.")
    ] = False,
) -> None:
    """Prove the GPU kernels on this machine's GPU and find their fastest launches.

    Kernels that are as right as plain PyTorch are taken from then on without being asked for; all
    else stays with plain PyTorch. The first use of a GPU checks by itself what it needs; tuning is
    done here only. The same command goes on where one that was interrupted ended. Exit code 1:
    kernels are wrong.
    """
    from eqcvt import tune as tuning
    from eqcvt.ops import _backend, _proof

    if not torch.cuda.is_available():
        raise RuntimeError("eqcvt tune needs a CUDA device, and torch sees none")
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = _proof.Device(about.name, f"{about.major}.{about.minor}")
    path = out or _proof.user_file(device)
    os.environ[_proof.VARIABLE] = "none"  # nothing but the file that is made is to count
    there = tuning.available(backend or tuning.BACKENDS, "cuda")
    for name, why in there.items():
        if why is not None and backend:
            raise RuntimeError(f"{name} cannot be checked: {why}")
        if why is not None:
            note(f"{name} is left out: {why}")
    backends = [name for name, why in there.items() if why is None]
    if not backends:
        raise RuntimeError("there is no backend for CUDA devices to check")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    screen = console(stderr=True)
    bar = Progress(*columns, TimeElapsedColumn(), console=screen, disable=not screen.is_terminal)
    with bar as progress:

        class Screen(tuning.Watcher):
            """Shows steps in the progress bar, and what was found above it."""

            def note(self, text: str) -> None:
                progress.console.print(text, markup=False, soft_wrap=True)

            def begin(self, what: str, steps: int) -> None:
                self.task = progress.add_task(what, total=steps)

            def checked(self, backend: str, op: str, precision: str, verdict: Any) -> None:
                progress.advance(self.task)
                if not verdict.passed or not screen.is_terminal:
                    found = verdict.reason or f"right, {verdict.error:.2f} of the error allowed"
                    self.note(f"{op} by {backend} in {precision}: {found}")

            def timed(self, key: str, entry: dict[str, Any]) -> None:
                progress.advance(self.task)
                before, after = entry["before_ms"], entry["after_ms"]
                self.note(f"{key}: {before:.4f} -> {after:.4f} ms, {entry['launch']}")

        try:
            record = tuning.run(
                path,
                device,
                ops=op or _backend.OPS,
                backends=backends,
                precisions=precision,
                check_only=check_only,
                again=again,
                minutes=minutes,
                jobs=jobs,
                watcher=Screen(),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what was found is kept; the same command goes on") from None
    page = console()
    page.print(_checks(record))
    if record.content["times"]:
        page.print(_times(record))
    page.print(str(record.path), markup=False, soft_wrap=True)
    if not all(check["passed"] for check in record.content["checks"].values()):
        raise typer.Exit(1)


def _checks(record: Record) -> Table:
    """Return a table of the checks: the largest error over the one that is allowed."""
    table = Table("kernels", "error / allowed", "why not", title="Checks", title_justify="left")
    for name, check in record.content["checks"].items():
        error = "-" if check["error"] is None else f"{check['error']:.2f}"
        table.add_row(name, error, check["reason"] or "")
    return table


def _times(record: Record) -> Table:
    """Return a table of the launches that were timed."""
    table = Table("launch", title="Milliseconds in a training step at batch 128")
    table.title_justify = "left"
    for name in ("before", "after", "refused"):
        table.add_column(name, justify="right")
    for key, entry in record.content["times"].items():
        times = (f"{entry[name]:.4f}" for name in ("before_ms", "after_ms"))
        table.add_row(key, *times, str(entry["refused"]))
    return table
