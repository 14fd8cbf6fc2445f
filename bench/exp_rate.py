"""A Triton kernel that does nothing but exponentials, for a GPU's rate of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, STEPS, PROGRAMS_EACH = 1024, 512, 32


@triton.jit
def _exp_rate_kernel(y_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Apply ``2 ** -x`` to each of ``BLOCK`` values ``STEPS`` times; it stays between 0 and 1."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = 1.0 / (1.0 + o.to(tl.float32))
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(y_ptr + o, x)


def _programs() -> int:
    return PROGRAMS_EACH * torch.cuda.get_device_properties(0).multi_processor_count


def count() -> int:
    """Return how many exponentials :func:`run` computes."""
    return _programs() * BLOCK * STEPS


def run() -> None:
    """Compute them on the current GPU."""
    y = torch.empty(_programs() * BLOCK, device="cuda")
    _exp_rate_kernel[(_programs(),)](y, STEPS, BLOCK, num_warps=8)
