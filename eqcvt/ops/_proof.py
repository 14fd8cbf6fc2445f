"""Which GPU kernels were proven on this machine's GPU: the file that ``eqcvt tune`` writes, read.

The file is EQCVT_TUNED (``none``: no file counts), else ``<device>.json`` in
``$XDG_CACHE_HOME/eqcvt`` (``~/.cache/eqcvt``); the package may ship ``kernels/proven-<class>.json``
for a class of devices. It is read once, at the first use of a GPU, and written by nothing but
``eqcvt tune``. It holds tuned launches, and for each backend, op and precision whether the kernels
were as right as plain PyTorch; both count for the same device, versions of torch and triton, and
kernels only. All processes of one run must find the same file: on several machines, each needs it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eqcvt import native

log = logging.getLogger("eqcvt")

FORMAT = 1
VARIABLE = "EQCVT_TUNED"
# Float32 has two: with the products that PyTorch's own switches allow, and without.
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
PACKAGE = Path(__file__).resolve().parents[1]


class Device(NamedTuple):
    """A GPU by its name and compute capability, ``"9.0"``."""

    name: str
    capability: str


class Source(NamedTuple):
    """A file that was looked for: its content, or why nothing of it, or no launch, counts."""

    path: Path
    content: dict[str, Any]
    refused: str | None
    launches_refused: str | None = None


def devices() -> list[Device]:
    """Return the kinds of GPUs that torch sees."""
    found = set()
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.add(Device(about.name, f"{about.major}.{about.minor}"))
    return sorted(found)


def user_file(device: Device) -> Path:
    """Return where the file for a device is looked for, and written."""
    given = os.environ.get(VARIABLE)
    if given and given != "none":
        return Path(given).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():
        cache = Path("~/.cache").expanduser()
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return cache / "eqcvt" / f"{slug}.json"


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
    """Return what names the kernels that a check was made of: their sources and their launches."""
    if backend != "triton":
        return sources(backend)
    text = sources(backend) + json.dumps(launches, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
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


def foreign(content: dict[str, Any], device: Device, *, shipped: bool = False) -> str | None:
    """Return why a file does not count for a device, or None; a shipped one is for its class."""
    for what, here in machine(device).items():
        there = content["machine"].get(what)
        if there != here and not (shipped and what == "name"):
            return f"it was made with {what} {there}, and here is {here}"
    return None


@functools.cache
def found(device: Device) -> tuple[Source, ...]:
    """Read the files for a device, the user's first.

    Raises:
        FileNotFoundError: if the variable names a file that is not there.
        ValueError: if the file that it names is not one.
    """
    if os.environ.get(VARIABLE) == "none":
        return ()
    own = user_file(device)
    shipped = PACKAGE / "kernels" / f"proven-sm{device.capability.replace('.', '')}.json"
    read_files = []
    for path in (own, shipped):
        named = path == own and bool(os.environ.get(VARIABLE))
        if not named and not path.is_file():
            continue
        try:
            content = read(path)
            refused = foreign(content, device, shipped=path == shipped)
        except (ValueError, OSError) as error:
            if named:
                raise
            content, refused = {}, str(error)
        stale = refused
        if refused is None and content.get("sources") != sources("triton"):
            stale = "its launches and its proof are of other Triton kernels than these"
        if stale is not None:
            log.warning("%s is not used: %s", path, stale)
        read_files.append(Source(path, content, refused, stale))
    return tuple(read_files)


def report() -> list[dict[str, str]]:
    """Return, for each kind of GPU, the file that was looked for and whether it counts."""
    rows = []
    for device in devices():
        read_files = found(device) or (Source(user_file(device), {}, None, "there is none"),)
        rows += [
            {"device": device.name, "file": str(s.path), "state": s.launches_refused or "in use"}
            for s in read_files
        ]
    return rows


def tuned_launches() -> dict[str, dict[str, int]]:
    """Return the launches of the files that count, made for the Triton kernels that are here."""
    launches: dict[str, dict[str, int]] = {}
    for device in devices():
        for source in reversed(found(device)):
            if source.launches_refused is None:
                launches |= source.content["launches"]
    return launches


@functools.cache
def why_not(op: str, backend: str) -> str | None:
    """Return why a backend's kernels of an op are not proven on the GPUs here, or None.

    Raises:
        FileNotFoundError: as :func:`found`.
        ValueError: as :func:`found`.
    """
    for device in devices():
        reasons = [_unproven(source, op, backend) for source in found(device)]
        if not reasons:
            return f"its kernels are not proven on {device.name}; `eqcvt tune` proves them"
        if None not in reasons:
            return reasons[0]
    return None


def _unproven(source: Source, op: str, backend: str) -> str | None:
    """Return why a file does not prove an op, or None if it does."""
    if source.refused is not None:
        return f"{source.path} is not used: {source.refused}"
    own = identity(backend, source.content["launches"])
    for precision in PRECISIONS:
        check = source.content["checks"].get(key(backend, op, precision))
        if check is None:
            return f"{source.path} has no check of it in {precision}; `eqcvt tune` makes one"
        if check.get("kernels") != own:
            return f"{source.path} proves other kernels than these; `eqcvt tune` checks them"
        if check.get("passed") is not True:
            return f"{source.path} found it wrong in {precision}: {check.get('reason')}"
    return None
