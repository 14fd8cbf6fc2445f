"""The typer application: global options, and errors as one line with exit code 2."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from typer.core import TyperGroup

import eqcvt

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError)
INTERRUPTED = 130


def console(*, stderr: bool = False) -> Console:
    """Return a console on the present standard output, or on standard error."""
    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False)


def note(text: str) -> None:
    """Print a line to standard error, unwrapped and with its brackets as they are."""
    console(stderr=True).print(text, markup=False, soft_wrap=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the place in the code; of many processes one does."""
    if os.environ.get("RANK", "0") == "0":
        note(f"warning: {' '.join(str(message).split())}")


@contextmanager
def as_interrupt(number: signal.Signals) -> Iterator[None]:
    """Let a signal end the block as Ctrl-C does, so that nothing half done stays behind."""
    if threading.current_thread() is not threading.main_thread():  # whose signals they are
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before or signal.SIG_DFL)


class _Group(TyperGroup):
    """A group of commands that turns expected exceptions into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            # A name that the terminal cannot show ends no command whose work is done.
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as interrupt:
            if not interrupt.args:  # with a text it has been said already
                note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            note(f"error: {' '.join(lines) or type(error).__name__}")
            raise typer.Exit(2) from error


app = typer.Typer(
    name="eqcvt",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rotation-equivariant vision transformers for strong-lensing images.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"eqcvt {eqcvt.__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before the command."""
