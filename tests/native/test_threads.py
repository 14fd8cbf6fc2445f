"""The threads of the CPU kernels: torch's own, and calls from threads and forked workers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.native.test_build import run
from tests.native.threads import threads

pytestmark = pytest.mark.needs("native")
THREADS = 3


@pytest.fixture
def _threads() -> Iterator[None]:
    with threads(THREADS):
        yield


def arguments(seed: int, tokens: int = 600) -> list[Tensor]:
    """Arguments of an op; by default with enough work for all threads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, tokens, 32), (32,), (32,), (64, 32), (64,), (32, 64), (32,)]
    return [*(torch.rand(shape, generator=generator) for shape in shapes), torch.tensor([seed])]


def call(seed: int) -> Tensor:
    """Run the op."""
    from eqcvt.native import mlp_block

    return mlp_block.forward(*arguments(seed), dropout=0.1, eps=1e-5)


@pytest.mark.usefixtures("_threads")
def test_calls_from_several_threads_agree_with_one() -> None:
    expected = [call(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for y, e in zip(pool.map(call, range(4)), expected, strict=True):
                assert torch.equal(y, e)


class Calls(Dataset[Tensor]):
    """A data set whose items are made by the op, with several threads."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(THREADS)
        return call(index)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("_threads")
def test_a_forked_worker_can_call() -> None:
    expected = [call(index) for index in range(4)]  # helpers of this process exist by now
    loader = DataLoader(
        Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for y, e in zip(loader, expected, strict=True):
        assert torch.equal(y, e)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_kernels_run_on_the_threads_that_torch_has() -> None:
    code = f"""
import os, torch
from tests.native.test_threads import call
torch.set_num_threads({THREADS})
torch.ones(2 ** 22).exp()
before = len(os.listdir("/proc/self/task"))
call(0), call(1)
print(before, len(os.listdir("/proc/self/task")))
"""
    status, output = run(sys.executable, "-c", code)
    before, after = map(int, output.split())
    assert (status, after) == (0, before)
    assert before >= THREADS


def test_python_runs_while_a_launcher_does() -> None:
    """A launcher holds no lock of the interpreter: another thread goes on during a long call."""
    from eqcvt.native import mlp_block

    tensors = arguments(0, 50_000)
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(1e-4):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks[0]
    mlp_block.forward(*tensors, dropout=0.1, eps=1e-5)
    during = ticks[0] - before
    done.set()
    thread.join()
    assert during > 10


@pytest.mark.parametrize("count", [1, THREADS])
def test_subnormal_numbers_are_zero_in_kernels_and_nowhere_else(count: int) -> None:
    """They would cost an Intel processor most of its time; the caller's mode is the caller's."""
    from eqcvt.native import lift

    with threads(count):
        images, bank = torch.full((4, 1, 30, 30), 1e-39), torch.ones(2, 4, 1, 3, 3)
        mean, *_ = lift.moments(images, bank, None, stride=1, padding=0, correlate=False)
        assert (mean == 0).all()
        halves = torch.full((300_000,), 1e-39) * 0.5  # by all threads of torch
        assert (halves > 0).all()
