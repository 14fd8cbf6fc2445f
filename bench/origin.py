"""What a recorded number needs to be made again: device, threads, versions, commit."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch

import eqcvt

ROOT = Path(__file__).resolve().parents[1]


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the processor with its family and model.

    A virtual machine's processor is often named by its maker alone, whichever generation it is.
    """
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", text, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(found):
        name += f", family {found['cpu family']} model {found['model']}"
    return name


def slug(name: str) -> str:
    """Return a device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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


def stamp(device: str) -> dict[str, str]:
    """Return what a recorded time was measured on, with what, and when."""
    return {
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
