"""That the emulator shows what it is there to show, and the shared helpers of device.cuh."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.native.cuda_emulator import DTYPES, HERE, build, preload
from tests.ops.primitives import keep, philox

REVERSE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
x = (ctypes.c_float * 128)(*range(128))
library.check_reverse(x, int(sys.argv[2]), int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"), HERE / "check.cu")


@pytest.fixture(scope="module")
def library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_are_columns", [False, True])
def test_mma_multiplies(library: ctypes.CDLL, dtype: torch.dtype, rows_are_columns: bool) -> None:
    a, b, c = torch.randn(16, 16, dtype=dtype), torch.randn(16, 8, dtype=dtype), torch.randn(16, 8)
    expected = c.double() + a.double() @ b.double()
    given = b.T.contiguous() if rows_are_columns else b
    library.check_product(
        DTYPES[dtype], _pointer(a), _pointer(given), _pointer(c), rows_are_columns
    )
    torch.testing.assert_close(c.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("order", range(4))
def test_a_barrier_makes_the_order_irrelevant(library: ctypes.CDLL, order: int) -> None:
    x = torch.arange(128.0)
    library.emulate_order(order)
    library.check_reverse(_pointer(x), 0, 256)
    library.emulate_order(0)
    assert torch.equal(x.reshape(2, 64).flip(1).flatten(), torch.arange(128.0))


def test_a_missing_barrier_shows(library: ctypes.CDLL) -> None:
    found = []
    for order in range(2):
        x = torch.arange(128.0)
        library.emulate_order(order)
        library.check_reverse(_pointer(x), 2, 256)
        found.append(x)
    library.emulate_order(0)
    assert not torch.equal(*found)
    assert found[0].isnan().any()


def _run(
    path: Path, barrier: int, shared: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", REVERSE, str(path), str(barrier), str(shared)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_barrier_for_some_threads_ends_the_process(path: Path) -> None:
    result = _run(path, 1, 256)
    assert result.returncode != 0
    assert "different places" in result.stderr


def test_address_sanitizer_sees_the_end_of_shared_memory(tmp_path: Path) -> None:
    path = build(tmp_path, HERE / "check.cu", sanitizer="address")
    assert _run(path, 0, 256, **preload("address")).returncode == 0
    result = _run(path, 0, 252, **preload("address"))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


def test_thread_sanitizer_sees_a_missing_barrier(tmp_path: Path) -> None:
    path = build(tmp_path, HERE / "check.cu", sanitizer="thread")
    environment = preload("thread")
    if "unexpected memory mapping" in _run(path, 0, 256, **environment).stderr:
        pytest.skip("this thread sanitizer does not know the kernel's layout of memory")
    for barrier in (0, 3):
        whole = _run(path, barrier, 256, **environment)
        assert (whole.returncode, whole.stderr) == (0, "")
    for forgotten in (2, 4):
        result = _run(path, forgotten, 256, **environment)
        assert result.returncode == 66
        assert "data race" in result.stderr


@pytest.mark.parametrize("start", [0, 1, 3, 2**34 - 5])
def test_dropout_is_the_reference_mask(library: ctypes.CDLL, start: int) -> None:
    seed, out = torch.tensor([-(2**62) + 12345]), torch.empty(128)
    library.check_words(
        _pointer(seed), ctypes.c_double(0.3), 1, ctypes.c_int64(start), _pointer(out)
    )
    if start < 2**20:
        expected = keep(seed, torch.Size([start + 128]), 0.3, 1)
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(out, expected[start:].float())
    else:
        numbers = philox(int(seed), torch.arange(start, start + 128), 1)
        assert torch.equal(out > 0, numbers >= round(0.3 * 2**16))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (100, 64), (0, 5)])
def test_sums_of_partials(library: ctypes.CDLL, rows: int, columns: int) -> None:
    partials, out = torch.randn(rows, columns), torch.empty(columns)
    library.check_sums(
        _pointer(partials), ctypes.c_int64(rows), ctypes.c_int64(columns), _pointer(out)
    )
    assert torch.equal(out, partials.double().sum(0).float())
