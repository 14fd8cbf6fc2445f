"""Whole models and their steps, as built by bench/test_bench_model.py and by a process of its own.

``python -m bench.models '<case as JSON>' <implementation> <device>`` prints the seconds from the
model's construction to the end of its first step.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

import eqcvt
from bench.cases import Case
from bench.implementations import IMPLEMENTATIONS, calls, contender
from bench.timing import Function, synchronise
from eqcvt.convert import to_escnn
from eqcvt.models import VisionModel

VARIANTS: dict[str, tuple[type[VisionModel], dict[str, Any]]] = {
    "EqCvT": (eqcvt.EqCvT, {}),
    "EqCvT exact": (eqcvt.EqCvT, {"invariance": "exact"}),
    "EqCvT D4": (eqcvt.EqCvT, {"group": "D4"}),
    "EqCvT D4 exact": (eqcvt.EqCvT, {"group": "D4", "invariance": "exact"}),
    "CvT": (eqcvt.CvT, {}),
}


def plain(case: Case, device: str) -> VisionModel:
    """Return our plain model of a case."""
    torch.manual_seed(0)
    architecture, options = VARIANTS[case.op]
    _, channels, size, _ = case.shape
    return architecture(in_channels=channels, image_size=size, **options).to(device)


def batch(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Return images and labels."""
    images = torch.rand(case.shape, device=device)
    return images, torch.arange(len(images), device=device) % 2


def step(
    case: Case,
    implementation: str,
    model: VisionModel,
    images: Tensor,
    labels: Tensor,
    *,
    compare: bool = True,
) -> Function:
    """Return what is timed of a model, which is first compared with the plain one.

    A ``training`` is forward, loss and backward; a ``step`` is a training and the optimiser.
    """
    device = images.device.type
    module = contender(
        case,
        implementation,
        model,
        images,
        escnn=lambda: to_escnn(model).to(device),
        compare=compare,
    )
    if case.case == "step":
        return whole_step(case, implementation, module, images, labels)
    return calls(
        case, implementation, module, images, loss=lambda logits: cross_entropy(logits, labels)
    )


def whole_step(
    case: Case, implementation: str, module: nn.Module, images: Tensor, labels: Tensor
) -> Function:
    """Return a training with its optimiser, in one CUDA graph or not."""
    module.train()
    graph = IMPLEMENTATIONS[implementation].mode == "graph"
    optimizer = Adam(module.parameters(), lr=1e-4, weight_decay=1e-7, fused=True, capturable=graph)
    if graph:
        from eqcvt.train.graph import GraphedStep

        amp = torch.bfloat16 if case.dtype == "bfloat16" else None
        graphed = GraphedStep(module, optimizer, loss_fn=cross_entropy, amp=amp)
        return lambda: graphed(images, labels)
    training = calls(
        case, implementation, module, images, loss=lambda logits: cross_entropy(logits, labels)
    )

    def trained() -> None:
        training()
        optimizer.step()

    return trained


def main(text: str, implementation: str, device: str) -> float:
    """Return the seconds to the end of the first step; imports and the device's start come before.

    The case of the text is a training or an inference.
    """
    case = Case(**json.loads(text))
    images, labels = batch(case, device)
    synchronise(device)
    start = time.perf_counter()
    step(case, implementation, plain(case, device), images, labels, compare=False)()
    synchronise(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
