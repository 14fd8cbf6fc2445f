"""Which GPU kernels were proven on this machine's GPU: the file that ``eqcvt tune`` writes.

The file is EQCVT_TUNED (``none``: no file counts), else the one in ``$XDG_CACHE_HOME/eqcvt``
(``~/.cache/eqcvt``) with the names of the device and of the versions of torch and triton. It holds
tuned launches, and for each backend, op and precision whether the kernels were as right as plain
PyTorch; both count for the same device, versions of torch and triton, and kernels only.

Kernels without a verdict are checked where they are first wanted: once per machine, by ``eqcvt tune
--check-only`` in a process of its own, while the other processes of a run wait. A file that
EQCVT_TUNED names is read and never written so. Launches are tuned by no one but ``eqcvt tune``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eqcvt import native
from eqcvt._files import read_json

log = logging.getLogger("eqcvt")

FORMAT = 1
VARIABLE = "EQCVT_TUNED"
# What a call may compute in; of float32 PyTorch's own switches say which, see precision_in_force.
PRECISIONS_OF = {
    torch.float32: ("float32", "tf32"),
    torch.bfloat16: ("bfloat16",),
    torch.float16: ("float16",),
}
PRECISIONS = tuple(each for group in PRECISIONS_OF.values() for each in group)
CONVOLUTIONS = ("lift", "token_embed")
PACKAGE = Path(__file__).resolve().parents[1]


class Device(NamedTuple):
    """A GPU by its name and compute capability, ``"9.0"``."""

    name: str
    capability: str


class Source(NamedTuple):
    """A file that was looked for: its content, or why it or its launches are ignored."""

    path: Path
    content: dict[str, Any]
    refused: str | None
    launches_refused: str | None = None


class Gap(NamedTuple):
    """Why an op's kernels are not proven on a GPU, and whether they only lack a check."""

    reason: str
    unchecked: bool


def devices() -> list[Device]:
    """Return the kinds of GPUs that torch sees."""
    return sorted({kind(index) for index in range(torch.cuda.device_count())})


@functools.cache
def kind(index: int) -> Device:
    """Return the kind of the GPU with this index in torch."""
    about = torch.cuda.get_device_properties(index)
    return Device(about.name, f"{about.major}.{about.minor}")


def user_file(device: Device) -> Path:
    """Return where the file for a device is looked for, and written."""
    given = os.environ.get(VARIABLE)
    if given and given != "none":
        return Path(given).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():
        cache = Path(os.path.expanduser("~"), ".cache")
    if not cache.is_absolute():  # a user without a home
        cache = Path(tempfile.gettempdir(), f"eqcvt-{os.getuid()}")
    here = machine(device)
    name = f"{device.name} torch {here['torch']} triton {here['triton']}".lower()
    return cache / "eqcvt" / f"{re.sub(r'[^a-z0-9.]+', '-', name).strip('-')}.json"


def machine(device: Device) -> dict[str, str | None]:
    """Return what a file must have been made with to count."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {**device._asdict(), "torch": torch.__version__, "triton": triton}


@functools.cache
def sources(backend: str) -> str:
    """Return a hash of a backend's kernels: Triton's files, or the compiled extension's."""
    files = {"triton": PACKAGE / "kernels", "native": PACKAGE / "native"}[backend]
    paths = sorted([*files.glob("*.py"), *files.glob("launches.json")])
    if backend == "native":
        paths += [Path(native.build_info()["file"])]
    text = hashlib.sha256()
    for path in paths:
        text.update(path.name.encode() + b"\0" + path.read_bytes())
    return text.hexdigest()[:16]


def identity(backend: str, launches: dict[str, dict[str, int]]) -> str:
    """Return a hash of the kernels that a check was made of: their sources and launches."""
    if backend != "triton":
        return sources(backend)
    text = sources(backend) + json.dumps(launches, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def precision_in_force(op: str, dtype: torch.dtype) -> str | None:
    """Return what a call of an op computes in now, or None where no kernel is checked in that.

    float32 is ``"tf32"`` where PyTorch's switch allows it: cuDNN's, which is on at first, for
    convolutions, and that of matrix products, which is off, for the others.
    """
    if dtype == torch.float32:
        backends: Any = torch.backends
        switch = backends.cudnn.conv if op in CONVOLUTIONS else backends.cuda.matmul
        return "tf32" if switch.fp32_precision == "tf32" else "float32"
    return PRECISIONS_OF.get(dtype, (None,))[0]


def key(backend: str, op: str, precision: str) -> str:
    """Return the name of one check."""
    return f"{backend} {op} {precision}"


def read(path: Path) -> dict[str, Any]:
    """Return a file's content.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not such a file, or its launches are not of this version's kernels.
    """
    from eqcvt.kernels import launches

    content = read_json(path)
    parts = ("machine", "launches", "checks")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict) for p in parts):
        raise ValueError(f"{path} was not written by eqcvt tune: it needs {', '.join(parts)}")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r}, this version {FORMAT}")
    try:
        launches.validated(content["launches"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def foreign(content: dict[str, Any], device: Device) -> str | None:
    """Return why a file does not count for a device, or None."""
    for what, here in machine(device).items():
        there = content["machine"].get(what)
        if there != here:
            return f"it was made with {what} {there}, and here is {here}"
    return None


@functools.cache
def found(device: Device) -> Source | None:
    """Read the file for a device, or return None if there is none, or none is to count.

    Raises:
        FileNotFoundError: if the variable names a file that is not there.
        ValueError: if the file that it names is not one.
    """
    named = os.environ.get(VARIABLE)
    path = user_file(device)
    if named == "none" or not (named or path.is_file()):
        return None
    try:
        content = read(path)
        refused = foreign(content, device)
    except (ValueError, OSError) as error:
        if named:
            raise
        content, refused = {}, str(error)
    stale = refused
    if refused is None and content.get("sources") != sources("triton"):
        stale = "its launches and its proof are of other Triton kernels than these"
    if stale is not None:
        log.warning("%s is not used: %s", path, stale)
    return Source(path, content, refused, stale)


def report() -> list[dict[str, str]]:
    """Return, for each kind of GPU, the file that was looked for and whether it counts."""
    rows = []
    for device in devices():
        source = found(device) or Source(user_file(device), {}, None, "there is none")
        state = source.launches_refused or "in use"
        rows.append({"device": device.name, "file": str(source.path), "state": state})
    return rows


def tuned_launches() -> dict[str, dict[str, int]]:
    """Return the launches of the files that count, made for the Triton kernels that are here."""
    launches: dict[str, dict[str, int]] = {}
    for device in devices():
        source = found(device)
        if source is not None and source.launches_refused is None:
            launches |= source.content["launches"]
    return launches


def gap(device: Device, op: str, backend: str, precision: str) -> Gap | None:
    """Return what the file for a GPU lacks to prove a backend's kernels in a precision, or None.

    Raises:
        FileNotFoundError: as :func:`found`.
        ValueError: as :func:`found`.
    """
    source = found(device)
    unchecked = not os.environ.get(VARIABLE)  # a file that the user names is not added to
    if source is None:
        return Gap(f"its kernels have not been checked on {device.name}", unchecked)
    if source.refused is not None:
        return Gap(f"{source.path} is not used: {source.refused}", False)
    check = source.content["checks"].get(key(backend, op, precision))
    if check is None:
        return Gap(f"{source.path} has no check of it in {precision}", unchecked)
    if check.get("kernels") != identity(backend, source.content["launches"]):
        return Gap(f"{source.path} proves other kernels than these", unchecked)
    if check.get("passed") is not True:
        return Gap(f"{source.path} found it wrong in {precision}: {check.get('reason')}", False)
    return None
