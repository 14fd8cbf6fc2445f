"""The file of tuned launches and proofs: begun, gone on with, written whole."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from eqcvt._files import write_text
from eqcvt.ops import _proof
from eqcvt.tune.check import Verdict


class Record:
    """What one file of :mod:`eqcvt.ops._proof` holds.

    Args:
        path: the file; what counts of it for this device and these kernels is kept.
        device: the GPU.

    Attributes:
        dropped: why what the file held was not kept, or None.
    """

    def __init__(self, path: Path, device: _proof.Device) -> None:
        import eqcvt

        self.path, self.dropped = path, None
        content: dict[str, Any] = {}
        if path.is_file():
            try:
                content = _proof.read(path)
                self.dropped = _proof.foreign(content, device)
            except (ValueError, OSError) as error:
                self.dropped = str(error)
        if self.dropped is not None:
            content = {}
        sources = _proof.sources("triton")
        if content and content.get("sources") != sources:
            self.dropped = "its launches are those of other kernels"
            content = {"checks": content["checks"]}
        self.content = {
            "format": _proof.FORMAT,
            "machine": _proof.machine(device),
            "eqcvt": eqcvt.__version__,
            "date": "",
            "sources": sources,
            "checks": content.get("checks", {}),
            "launches": content.get("launches", {}),
            "times": content.get("times", {}),
            "refused": content.get("refused", {}),
        }

    @property
    def launches(self) -> dict[str, dict[str, int]]:
        """The launches that differ from the shipped ones, or were found to be the fastest."""
        launches: dict[str, dict[str, int]] = self.content["launches"]
        return launches

    def check(self, backend: str, op: str, precision: str, verdict: Verdict) -> None:
        """Note the outcome of a check of the kernels as they are launched now."""
        self.content["checks"][_proof.key(backend, op, precision)] = {
            "passed": verdict.passed,
            "error": round(verdict.error, 4) if verdict.passed else None,
            "reason": verdict.reason,
            "kernels": _proof.identity(backend, self.launches),
        }

    def checked(self, backend: str, op: str, precision: str) -> bool:
        """Return whether the kernels as they are launched now passed a check."""
        check = self.content["checks"].get(_proof.key(backend, op, precision), {})
        identity = _proof.identity(backend, self.launches)
        return check.get("passed") is True and check.get("kernels") == identity

    def save(self) -> None:
        """Write the file, in the place of the one before."""
        self.content["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        write_text(self.path, _text(self.content))


def _text(content: dict[str, Any]) -> str:
    """Return JSON with one line for each entry of its tables."""
    parts = []
    for name, value in content.items():
        if isinstance(value, dict):
            rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            text = "{\n" + ",\n".join(rows) + "\n }" if rows else "{}"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
