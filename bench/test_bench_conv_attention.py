"""Attention with convolutional projections: its core against other fused ones, then the block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import blocks
from bench.cases import DTYPES, Case, both
from bench.conftest import Measure
from bench.floor import Work
from bench.implementations import IMPLEMENTATIONS, LIMITS, same
from bench.timing import Function, captured
from eqcvt.nn import ConvAttention, Stage
from tests.ops.primitives import conv_attention_attend

DIM = 32
# Torch's kernels in the width of a head, and in that of the tokens when weights are folded.
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# For each device: images, heads, queries, keys; on a CPU those of images of 65x65.
SIZES = {"cpu": (4, 3, 841, 225), "cuda": (128, 3, 3721, 961)}
THEIRS = {
    "cpu": ("flash-64", "flash-32"),
    "cuda": ("flash-64", "cudnn-64", "flash-32", "cudnn-32", "flex-64"),
}
OURS = ("native", "triton", "native-graph", "triton-graph")


def cases(device: str) -> list[Case]:
    core = [
        case
        for dtype in (("float32", "bfloat16") if device == "cpu" else ("bfloat16",))
        for case in both(
            "conv_attention",
            "core",
            shape=SIZES[device],
            dtype=dtype,
            level="quick",
            implementations=(*THEIRS[device], *OURS),
        )
    ]
    return core + blocks.cases("conv_attention", device)


def core_work(case: Case, images: int, heads: int, queries: int, keys: int, width: int) -> Work:
    """Count the least attention needs: products of scores and of values, and exponentials.

    A product is as wide as the narrower of token and head, since weights can be folded. Backward
    recomputes the scores and needs four products more. Keys are few beside the queries, which are
    read and whose results are written once each way.
    """
    scores = images * heads * queries * keys
    traffic = images * queries * width * DTYPES[case.dtype].itemsize
    if case.training:
        return Work(7 * scores * width, 2 * scores, 5 * traffic)
    return Work(2 * scores * width, scores, 2 * traffic)


def block_work(case: Case, stage: Stage) -> Work:
    """Count :func:`core_work` for a block: the rest of it is small beside the core."""
    batch, dim, side, _ = case.shape
    keys = ((side - 1) // stage.kv_stride + 1) ** 2
    width = min(dim, stage.head_dim)
    return core_work(case, batch, stage.heads, side**2, keys, width)


Core = tuple[Callable[..., Tensor], list[Tensor]]


def torch_core(case: Case, kernel: str, width: int, device: str) -> Core:
    """Return attention by one of torch's kernels on heads of ``width`` channels, and its inputs."""
    images, heads, queries, keys = case.shape
    inputs = [
        torch.randn(images, heads, count, width, device=device, dtype=DTYPES[case.dtype])
        for count in (queries, keys, keys)
    ]
    if kernel == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        return torch.compile(flex_attention, dynamic=False), inputs

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(KERNELS[kernel]):
            return F.scaled_dot_product_attention(q, k, v)

    return run, inputs


def our_core(case: Case, backend: str, device: str) -> Core:
    """Return what ours does from the depthwise outputs on, and its inputs.

    That is more than the core: the norms, folded products, the sum over heads and its bias. It is
    first compared with plain float32, on one image.
    """
    images, heads, queries, keys = case.shape
    tokens = [
        torch.randn(images, count, DIM, device=device, dtype=DTYPES[case.dtype])
        for count in (queries, keys)
    ]
    affine = [torch.ones(2, DIM, device=device), torch.zeros(2, DIM, device=device)]
    products = [
        torch.randn(shape, device=device) / scale
        for shape, scale in (
            ((heads, DIM, DIM), DIM),
            ((heads, DIM), DIM),
            ((heads, DIM, DIM), DIM**0.5),
            ((DIM,), 1),
        )
    ]
    seed = torch.zeros(1, dtype=torch.int64, device=device)

    def run(a: Tensor, b: Tensor, *parameters: Tensor) -> Tensor:
        save = torch.is_grad_enabled()
        y: Tensor = torch.ops.eqcvt.conv_attention_attend(
            *(a, b, None, None, *parameters, seed), dropout=0.0, save=save, backend=backend
        )[0]
        return y

    def plain(a: Tensor, b: Tensor, *parameters: Tensor) -> Tensor:
        tokens = (a.float(), b.float(), None, None)
        return conv_attention_attend(*tokens, *parameters, seed, dropout=0.0, save=False)[0]

    few = [t[:1] for t in tokens]
    results = []
    for function in (run, plain):
        leaves = [t.clone().requires_grad_() for t in (*few, *affine, *products)]
        y = function(*leaves)
        weight = torch.cos(torch.arange(y.numel(), device=device)).view(y.shape)
        results.append([y.detach(), *torch.autograd.grad((y.float() * weight).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs, LIMITS[case.dtype])
    return run, [*tokens, *affine, *products]


def calls(case: Case, implementation: str, core: Core) -> Function:
    """Return the function that is timed."""
    function, inputs = core
    leaves = [t.requires_grad_(case.training) for t in inputs]
    gradient: list[Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def forward_and_backward() -> None:
        y = function(*leaves)
        if not gradient:
            gradient.append(torch.randn_like(y))
        torch.autograd.grad(y, leaves, gradient[0])

    timed = forward_and_backward if case.training else forward
    return captured(timed) if implementation.endswith("graph") else timed


def test_bench_conv_attention(
    case: Case, implementation: str, measure: Measure, device: str
) -> None:
    torch.manual_seed(0)
    if not case.case.startswith("core"):
        stage: Stage = case.options["stage"]
        block = ConvAttention(stage, dropout=0.1)
        blocks.time_block(case, implementation, block, measure, device, block_work(case, stage))
        return

    def build() -> Function:
        if implementation in IMPLEMENTATIONS:
            core = our_core(case, IMPLEMENTATIONS[implementation].backend, device)
        else:
            kernel, width = implementation.split("-")
            core = torch_core(case, kernel, int(width), device)
        return calls(case, implementation, core)

    measure(case, implementation, build, work=core_work(case, *case.shape, DIM))
