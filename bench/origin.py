"""What a recorded number needs to be made again: device, threads, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch

import eqcvt

ROOT = Path(__file__).resolve().parents[1]


def device_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def threads(device: str) -> str:
    """Return the number of threads of the CPU's work; nothing on a GPU."""
    return str(torch.get_num_threads()) if device == "cpu" else ""


def versions() -> str:
    """Return the versions that the numbers depend on."""
    parts = f"eqcvt {eqcvt.__version__}; torch {torch.__version__}; numpy {np.__version__}"
    return f"{parts}; Python {platform.python_version()}"


def commit() -> str:
    """Return the checkout's commit, marked where sources differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown commit"
    watched = [*git, "status", "--porcelain", "--", "eqcvt", "kernels", "csrc", "bench/*.py"]
    changed = subprocess.run(watched, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+changes" if changed else "")
