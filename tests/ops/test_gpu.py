"""Every op by its GPU kernels: against float64, in all dtypes, in a CUDA graph, without a sync."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eqcvt import use_backend
from tests.ops.test_fast import CALLS, OPS, Call, activations, results
from tests.tolerance import assert_as_good

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend that the GPU has."""
    from eqcvt import ops

    rows = [row for row in ops.explain(("cuda",)) if row.backend == request.param]
    if not rows[0].available:
        pytest.skip(f"needs {request.param}: {rows[0].reason}")
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def on_gpu(op: str, training: bool, dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    """Return a call with its constants on the GPU, and inputs there in ``dtype``."""
    torch.manual_seed(1)
    with torch.device("cuda"):
        call, inputs = CALLS[op](training)
    return call, activations(op, inputs, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_are_as_good_as_the_reference_s(
    op: str, dtype: torch.dtype, training: bool, backend: str
) -> None:
    call, inputs = on_gpu(op, training, dtype)
    with use_backend("reference"):
        exact = results(call, [t.double() for t in inputs])
        reference = results(call, [t.to(dtype) for t in inputs])
    with use_backend(backend):
        actual = results(call, inputs)
    for part, backward in ((0, False), (1, True)):
        for mine, true, theirs in zip(actual[part], exact[part], reference[part], strict=True):
            # Parameters and statistics of ours are wider than the reference's, not worse.
            assert_as_good(mine.to(theirs.dtype), true, theirs, backward=backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_bit_equal(op: str, dtype: torch.dtype, backend: str) -> None:
    call, inputs = on_gpu(op, True, dtype)
    with use_backend(backend):
        first, again = (results(call, inputs) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_step_is_captured_in_a_cuda_graph(op: str, backend: str) -> None:
    call, inputs = on_gpu(op, True, torch.bfloat16)
    with use_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                expected = results(call, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(call, inputs)
        graph.replay()
        torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_step_never_waits_for_the_device(op: str, backend: str) -> None:
    call, inputs = on_gpu(op, True, torch.float32)
    with use_backend(backend):
        results(call, inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(call, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
