"""Where a step's time goes on a GPU: every kernel of a model and of its parts.

``python -m bench.kernel_times`` prints, for each case in bfloat16 with the Triton kernels, at
batch 128 unless its name says another, the milliseconds of a call from the host and as a CUDA
graph, the memory that it adds at its height, and the kernels it launches, how often and for how
long; ``--out FILE`` keeps all of it as JSON. Nothing is compared here: ``eqcvt tune`` and the other
files of this folder do that.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import eqcvt
from bench import models
from bench.blocks import STAGES
from bench.cases import Case
from bench.implementations import calls, contender
from bench.origin import stamp
from bench.timing import Function, captured, cuda_seconds, peak_mib
from eqcvt._files import write_json
from eqcvt.models.cvt import BASELINE_STAGES
from eqcvt.nn import ConvAttention, MlpBlock, TransformerStage

BATCH, ROUNDS, PROFILED = 128, 25, 5
TOKENS = (BATCH, 32, 61, 61)


def part(module: nn.Module, name: str, shape: tuple[int, ...], gradient: bool) -> Function:
    """Return a call of a part of a model on random input."""
    case = Case("part", name, shape, "bfloat16")
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if shape[1] >= 32:
        x = x.to(memory_format=torch.channels_last)
    module = contender(case, "triton", module.cuda(), x, compare=False)
    return calls(case, "triton", module, x, input_gradient=gradient)


def model(op: str, name: str, images: int, channels: int) -> Function:
    """Return a step of a model."""
    case = Case(op, name, (images, channels, 129, 129), "bfloat16")
    batch, labels = models.batch(case, "cuda")
    return models.step(case, "triton", models.plain(case, "cuda"), batch, labels, compare=False)


def lift(name: str, channels: int) -> Function:
    """Return a call of the steerable block."""
    block = eqcvt.EqCvT(in_channels=channels, image_size=129).lift[0]
    return part(block, name, (BATCH, channels, 129, 129), False)


EQCVT = STAGES["eqcvt"][0]
CASES: dict[str, Callable[[], Function]] = {
    "EqCvT, training": lambda: model("EqCvT", "training", BATCH, 3),
    "EqCvT, inference": lambda: model("EqCvT", "inference", BATCH, 3),
    "EqCvT, training, 16 images": lambda: model("EqCvT", "training", 16, 3),
    "steerable block, training": lambda: lift("training", 3),
    "steerable block, inference": lambda: lift("inference", 3),
    "attention block, training": lambda: part(ConvAttention(EQCVT, 0.1), "training", TOKENS, True),
    "MLP block, training": lambda: part(MlpBlock(EQCVT, 0.1), "training", TOKENS, True),
    "CvT, training": lambda: model("CvT", "training", BATCH, 1),
    "CvT, first stage, training": lambda: part(
        TransformerStage(1, BASELINE_STAGES[0], 0.1), "training", (BATCH, 1, 129, 129), False
    ),
    "CvT, second stage, training": lambda: part(
        TransformerStage(64, BASELINE_STAGES[1], 0.1), "training", (BATCH, 64, 33, 33), True
    ),
}


def measured(function: Function) -> dict[str, Any]:
    """Return a call's times, memory and kernels."""
    for _ in range(3):
        function()
    row: dict[str, Any] = {"peak_mib": peak_mib(function, "cuda")}
    row["eager_ms"] = 1e3 * statistics.median(cuda_seconds(function, rounds=ROUNDS))
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(PROFILED):
            function()
        torch.cuda.synchronize()
    row["kernels"] = kernels = {
        event.key: [event.count / PROFILED, event.self_device_time_total / PROFILED / 1e3]
        for event in record.key_averages()
        if event.self_device_time_total > 0
    }
    row["launches"] = sum(count for count, _ in kernels.values())
    row["kernel_ms"] = sum(ms for _, ms in kernels.values())
    row["graph_ms"] = 1e3 * statistics.median(cuda_seconds(captured(function), rounds=ROUNDS))
    return row


def main() -> None:
    """Measure the cases whose names hold what is asked for; by default all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases whose names hold one of these [all]")
    parser.add_argument("--out", type=Path, help="a JSON file of everything")
    parser.add_argument("--least", type=float, default=0.01, help="kernels printed, in ms [0.01]")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device to time kernels on")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    origin = stamp("cuda")
    rows: dict[str, Any] = {}
    for name, build in CASES.items():
        if options.names and not any(asked in name for asked in options.names):
            continue
        rows[name] = row = measured(build())
        print(
            f"{name}: {row['eager_ms']:.3f} ms, graph {row['graph_ms']:.3f} ms, "
            f"{row['launches']:.0f} kernels, {row['peak_mib']:.0f} MiB"
        )
        for kernel, (count, ms) in sorted(row["kernels"].items(), key=lambda k: -k[1][1]):
            if ms >= options.least:
                print(f"  {ms:8.4f} ms  {count:5.1f} x  {kernel[:90]}")
        if options.out:
            write_json(options.out, origin | {"cases": rows})


if __name__ == "__main__":
    main()
