"""The parts of a CvT at the sizes they have in the models, for the files of their ops."""

from __future__ import annotations

import torch
from torch import nn

from bench.cases import DTYPES, WITHOUT_ESCNN, Case, both
from bench.conftest import Measure
from bench.floor import Work
from bench.implementations import calls, contender
from bench.timing import Function
from eqcvt.nn import Stage

BATCH = {"cpu": 4, "cuda": 128}
# The stages of EqCvT and of the CvT baseline: channels and side of the maps they read, side of the
# tokens. The smallest comes last.
STAGES = {
    "eqcvt": (Stage(32, heads=3, mlp_ratio=2), 10, 121, 61),
    "cvt-1": (Stage(64, heads=2, embed_kernel=7, embed_stride=4), 1, 129, 33),
    "cvt-2": (Stage(128, heads=3), 64, 33, 17),
}
QUICK = "cvt-2"


def cases(op: str, device: str, *, embed: bool = False) -> list[Case]:
    """Return training and inference of an op in each stage, on tokens or (embed) on maps."""
    result = []
    for name, (stage, channels, size, side) in STAGES.items():
        shape = (BATCH[device], channels, size, size) if embed else None
        shape = shape or (BATCH[device], stage.dim, side, side)
        for dtype in ("float32",) if device == "cpu" else ("bfloat16", "tf32", "float32"):
            rare = device == "cuda" and (dtype == "float32" or (dtype, name) == ("tf32", "cvt-1"))
            level = "full" if rare else "quick" if name == QUICK else "default"
            result += both(
                op,
                name,
                shape=shape,
                dtype=dtype,
                level=level,
                implementations=WITHOUT_ESCNN,
                options={"stage": stage, "channels": channels},
            )
    return result


def time_block(
    case: Case,
    implementation: str,
    plain: nn.Module,
    measure: Measure,
    device: str,
    work: Work | None = None,
    *,
    tokens: bool = True,
    input_gradient: bool = True,
) -> None:
    """Measure a module on random input: tokens, which are channels last in memory, or maps.

    Parameters are float32; under autocast the input comes in its dtype, as from the layer before.
    """
    plain = plain.to(device)
    x = torch.randn(case.shape, device=device, dtype=DTYPES[case.dtype])
    if tokens:
        x = x.to(memory_format=torch.channels_last)

    def build() -> Function:
        module = contender(case, implementation, plain, x)
        return calls(case, implementation, module, x, input_gradient=input_gradient)

    measure(case, implementation, build, work=work)
