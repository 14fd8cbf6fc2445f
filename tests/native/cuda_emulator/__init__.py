"""Builds the CUDA sources for the host, with ``emulate.h`` in place of CUDA, and calls them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[2] / "csrc" / "cuda"
NOWHERE = 256
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
ALIGNMENT = ["-fsanitize=alignment", "-fno-sanitize-recover=all"]
# The runtime of each sanitizer, and what makes it run beside Python.
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0"},
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66"},
}


class Emulated:
    """The launchers of some sources as functions of tensors and numbers."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def order(self, order: int) -> None:
        """Run fibers and blocks as numbered (0), backwards (1) or shuffled with a seed (> 1).

        Asynchronous copies arrive at the last moment, in odd orders at the first.
        """
        self._library.emulate_order(order)

    def in_any_order(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what ``run`` returns, after a check that all orders give the same bits.

        A missing barrier, a race between blocks or an unwritten value would change some bit.
        """
        runs = []
        for order in (0, 1, 4, 7):
            self.order(order)
            runs.append(run())
        self.order(0)
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
        return runs[0]

    def launch(self, name: str, *args: Tensor | int | float | None, like: Tensor) -> None:
        """Call a launcher as ``eqcvt.native.launch`` does, with a NaN-filled workspace."""
        function = getattr(self._library, f"eqcvt_cuda_{name}")
        values = [ctypes.c_int(DTYPES[like.dtype]), *map(argument, args)]
        size = ctypes.c_int64(-1)
        status = function(*values, None, ctypes.byref(size), None)
        assert status == 0, f"{name}: status {status}"
        assert size.value >= 0, f"{name} did not say what workspace it needs"
        workspace = torch.full((size.value,), 0xFF, dtype=torch.uint8)
        status = function(*values, ctypes.c_void_p(workspace.data_ptr()), None, None)
        assert status == 0, f"{name}: status {status}"


def argument(value: Tensor | int | float | None) -> object:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        # An empty tensor has no address, and null would mean that the tensor is absent.
        return ctypes.c_void_p(value.data_ptr() or NOWHERE)
    if isinstance(value, bool):
        return ctypes.c_int(value)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def build(folder: Path, *sources: Path, sanitizer: str | None = None) -> Path:
    """Compile sources to a library in ``folder``; it takes the place of the CUDA build in tests.

    A sanitizer, ``address`` or ``thread``, is built in where it is preloaded, as a library that
    uses it demands; see ``preload``.
    """
    if sanitizer is None:
        loaded = os.environ.get("LD_PRELOAD", "")
        sanitizer = next((kind for kind, name in RUNTIMES.items() if name in loaded), None)
    library = folder / f"{sources[0].stem}{f'_{sanitizer}' if sanitizer else ''}.so"
    extra = [] if sanitizer is None else [f"-fsanitize={sanitizer}", "-g1"]
    command = ["g++", *FLAGS, *ALIGNMENT, *extra, "-DEQCVT_EMULATE", '-DEQCVT_API=extern "C"']
    command += ["-include", str(HERE / "emulate.h"), "-x", "c++", *map(str, sources)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def fixture(sources: str) -> Any:
    """Make the fixture of a test file: the launchers of the CUDA sources of such names."""

    @pytest.fixture(scope="module")
    def native(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
        return Emulated(build(tmp_path_factory.mktemp("emulated"), *sorted(CUDA.glob(sources))))

    return native


def preload(sanitizer: str) -> dict[str, str]:
    """Return the environment in which libraries with a sanitizer load."""
    query = ["g++", f"-print-file-name={RUNTIMES[sanitizer]}"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return {"LD_PRELOAD": found, **OPTIONS[sanitizer]}


def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output to be written: full of NaN, so that what is left out shows."""
    return torch.full(shape, float("nan"), dtype=dtype)
