"""Whole models: training, inference and the first step; equal to the plain one, then timed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import blocks, models
from bench.cases import WITHOUT_ESCNN, Case, both
from bench.conftest import Measure, Record
from bench.origin import ROOT
from bench.timing import Function
from eqcvt.models.cvt import BASELINE_STAGES
from eqcvt.nn import TransformerStage

ALL = ("escnn", "escnn-compile", *WITHOUT_ESCNN)
COMPILERS = (
    *("escnn", "escnn-compile", "eager", "compile", "compile-max"),
    *("native", "triton", "triton-compile"),
)
VARIANTS = ("exact", "D4", "D4 exact")
BATCHES = (1, 16, 128, 512)
STEPS = ("eager", "compile-max", "native-graph", "triton-graph", "auto-graph")
# Model, side of the images, channels, images, level. escnn's attention writes its scores out: from
# some size on they do not fit in the memory. Statistics of one image alone are refused in training.
SIZES: dict[str, list[tuple[str, int, int, int, str]]] = {
    "cpu": [
        ("EqCvT", 129, 3, 4, "default"),
        ("EqCvT", 129, 1, 4, "default"),
        ("EqCvT", 65, 3, 4, "default"),
        ("EqCvT", 65, 1, 4, "quick"),
        ("CvT", 129, 1, 4, "default"),
        *((name, 129, 1, images, "full") for name in ("EqCvT", "CvT") for images in (1, 16)),
        *(("EqCvT", size, 1, 4, "full") for size in (193, 257)),
        *((f"EqCvT {variant}", 129, 1, 4, "full") for variant in VARIANTS),
    ],
    "cuda": [
        *(("EqCvT", 129, 3, images, "default") for images in (128, 16)),
        ("CvT", 129, 1, 128, "default"),
        ("EqCvT", 65, 3, 16, "quick"),
        *(("EqCvT", 129, 3, images, "full") for images in (1, 512)),
        *(("EqCvT", 129, 1, images, "full") for images in BATCHES),
        *(("CvT", 129, 1, images, "full") for images in (1, 16, 512)),
        *(("EqCvT", size, 3, 16, "full") for size in (193, 257)),
        *((f"EqCvT {v}", 129, 3, images, "full") for v in VARIANTS for images in BATCHES),
    ],
}
# Pixels of a batch, beyond which escnn's scores of one block alone take 10 GiB.
ESCNN_PIXELS = {"cpu": 4 * 193**2, "cuda": 128 * 129**2}


def cases(device: str) -> list[Case]:
    main_dtype = "float32" if device == "cpu" else "bfloat16"
    result = []
    for name, size, channels, images, level in SIZES[device]:
        shape = (images, channels, size, size)
        fits = images * size**2 <= ESCNN_PIXELS[device] and size <= 193
        exported = name in ("EqCvT", "EqCvT D4") and fits
        whole = {
            "op": name,
            "shape": shape,
            "level": level,
            "implementations": ALL if exported else WITHOUT_ESCNN,
        }
        dtypes = [main_dtype]
        if device == "cuda" and (name, size, images) == ("EqCvT", 129, 128):
            dtypes.append("tf32")
        if device == "cpu" and (size, images) == (129, 4):
            dtypes.append("bfloat16")
        for dtype in dtypes:
            result += [
                case for case in both(**whole, dtype=dtype) if images > 1 or not case.training
            ]
        if device == "cuda" and images in (16, 128):
            step = {**whole, "dtype": main_dtype, "implementations": STEPS}
            result.append(Case(case="step", **step))
            if name == "EqCvT":
                result.append(Case(case="loaded step", **step))
    size, channels = 129, 1 if device == "cpu" else 3
    images = 4 if device == "cpu" else 16
    result.append(
        Case(
            op="EqCvT",
            case="first training",
            shape=(images, channels, size, size),
            dtype=main_dtype,
            level="full",
            implementations=COMPILERS,
        )
    )
    for number, channels, size in ((1, 1, 129), (2, 64, 33)):
        shape = (blocks.BATCH[device], channels, size, size)
        result += both(
            f"CvT stage {number}",
            shape=shape,
            dtype=main_dtype,
            level="full",
            implementations=WITHOUT_ESCNN,
        )
    return result


def first_step(case: Case, implementation: str, device: str, folder: Path) -> float:
    """Return the seconds to the end of the first step, in a process that finds no caches."""
    caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    text = json.dumps(dataclasses.asdict(case))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.models", text, implementation, device],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | caches,
    )
    if done.returncode:
        pytest.fail(f"the first step failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def test_bench_model(
    case: Case, implementation: str, measure: Measure, record: Record, device: str, tmp_path: Path
) -> None:
    if case.case == "first training":
        record(case, implementation, [first_step(case, implementation, device, tmp_path)])
        return
    torch.manual_seed(0)
    if case.op.startswith("CvT stage"):
        number = int(case.op.split()[-1])
        stage = TransformerStage(case.shape[1], BASELINE_STAGES[number - 1], dropout=0.1)
        later = number > 1  # images have no gradient
        blocks.time_block(case, implementation, stage, measure, device, input_gradient=later)
        return

    images, labels = models.batch(case, device)

    def build() -> Function:
        return models.step(case, implementation, models.plain(case, device), images, labels)

    measure(case, implementation, build)
