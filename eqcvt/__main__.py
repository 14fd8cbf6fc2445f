"""``python -m eqcvt``: the same as the command ``eqcvt``."""

from eqcvt.cli import app

app(prog_name="eqcvt")
