"""Every op by its GPU kernels: against float64, in all dtypes, in a CUDA graph, without a sync.

Beside what is written here, tests of the CPU run with the tensors of this file's device: those of
the ops in ``test_fast``, and those that run Triton's kernels in its interpreter elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.kernels.conftest  # noqa: F401  chooses the interpreter where there is no GPU
from eqcvt import use_backend
from eqcvt.ops._proof import PRECISIONS
from eqcvt.tune import cases
from eqcvt.tune.cases import CALLS, Call, activations, results
from eqcvt.tune.check import Judge
from tests.ops import test_fast
from tests.ops.test_fast import OPS

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Each value of each setting, with many of each pair: 40 of 5 x 4 x 7 x 2 x 3 x 3 x 2 x 2.
LIFT: dict[str, dict[str, Any]] = {}
for _i in range(40):
    _kernel = (3, 5, 7, 9, 11)[_i % 5]
    _channels = (1, 2, 3, 4, 8, 24)[_i % 6]
    LIFT[f"matrix {_i}"] = {
        "shape": (1 + _i % 3, _channels, 41 + _i % 4, 43 - _i % 7),
        "kernel": _kernel,
        "order": (4, 8, 1, 2, 3, 16, 5)[_i % 7],
        "fields": (4, 3, 10)[_i // 2 % 3],
        "stride": 1 + _i // 3 % 2,
        "padding": (0, 1, _kernel // 2)[_i // 5 % 3],
        "sigma": (0.66, None, 1.2)[_i // 4 % 3],
        "blur_stride": 1 + _i // 7 % 2,
        "pool": _i // 6 % 3 != 0,
        "masked": _i // 2 % 2 == 0,
    }
CASES = [
    (op, name, options)
    for op, named in {**cases.CHECKED, "lift": cases.CHECKED["lift"] | LIFT}.items()
    for name, options in named.items()
]
# What asks of the machine rather than of kernels, and what needs float64 or a CPU's threads.
LEFT_OUT = ("refus", "assemble", "interpreter", "supported", "compiler_works")
OF_ALL_BACKENDS = ("autocast", "strided", "promises", "compiles", "torch_s_seed")


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


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


for _name, _test in vars(test_fast).items():
    if _name.startswith("test_") and any(part in _name for part in OF_ALL_BACKENDS):
        globals()[_name] = _test
if importlib.util.find_spec("triton"):
    from tests.kernels.test_lift import tile  # noqa: F401  their fixture

    for _op in (
        "conv_attention",
        "conv_attention_fold",
        "lift",
        "lift_compiled",
        "mlp_block",
        "token_embed",
    ):
        for _name, _test in vars(importlib.import_module(f"tests.kernels.test_{_op}")).items():
            if _name.startswith("test_") and not any(part in _name for part in LEFT_OUT):
                globals()[f"test_{_op}_by_triton_{_name[5:]}"] = _test
del test_fast


def on_gpu(
    op: str, training: bool, dtype: torch.dtype, **options: Any
) -> tuple[Call, list[Tensor]]:
    """Return a call with its constants on the GPU, and inputs there in ``dtype``."""
    torch.manual_seed(1)
    call, inputs = CALLS[op](training, **options)
    return call, activations(op, inputs, dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("op", "options"),
    [pytest.param(op, options, id=f"{op} {name}") for op, name, options in CASES],
)
def test_values_and_gradients_are_as_good_as_the_reference_s(
    op: str,
    options: dict[str, Any],
    precision: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In training and evaluation, and the same bits twice."""
    monkeypatch.setitem(cases.CHECKED, op, {"call": options})
    verdict = Judge(op, precision, "cuda").verdict(backend)
    if not verdict.served:  # Triton has no depthwise filters of 5x5, say
        pytest.skip(f"{backend}: {verdict.reason}")
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_gives_what_the_reference_gives(op: str, backend: str) -> None:
    call, inputs = on_gpu(op, False, torch.bfloat16)
    count = 2 if op == "conv_attention" else 1
    empty = [t[:0] if i < count else t for i, t in enumerate(inputs)]
    found = []
    for name in ("reference", backend):
        with use_backend(name):
            found.append(results(call, [t.float() for t in empty]))
    for mine, same in zip(*found, strict=True):
        for a, b in zip(mine, same, strict=True):
            assert a.shape == b.shape
            assert not a.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_is_where_the_reference_has_it(
    op: str, value: float, backend: str
) -> None:
    call, inputs = on_gpu(op, False, torch.float32)
    inputs[0][-1, -1, 4, 5] = value
    found = []
    for name in ("reference", backend):
        with use_backend(name):
            found.append(call(*inputs)[0])
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert found[0][0].isfinite().all()
    assert found[1][0].isfinite().all()


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
