"""The command line: ``eqcvt simulate | train | evaluate | predict | export | ...``."""

from eqcvt.cli import demo, evaluate, inspect, predict, simulate, train, tune, use
from eqcvt.cli.app import app

__all__ = ["app", "demo", "evaluate", "inspect", "predict", "simulate", "train", "tune", "use"]
