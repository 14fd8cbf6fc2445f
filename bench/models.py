"""Whole models and their steps, as built by bench/test_bench_model.py and by a process of its own.

``python -m bench.models '<case as JSON>' <implementation> <device>`` prints the seconds from the
model's construction to the end of its first step.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

import eqcvt
from bench.cases import Case
from bench.implementations import IMPLEMENTATIONS, calls, contender
from bench.timing import Function, synchronise
from eqcvt.convert import to_escnn
from eqcvt.data import Augment, Batches, LensingImages
from eqcvt.models import VisionModel
from eqcvt.train import GraphedStep, Step
from eqcvt.train.loop import _gather

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

    A ``training`` is forward, loss and backward; a ``step`` is a training and the optimiser, a
    ``loaded step`` a step that takes its images from a set of 8-bit ones on the device, turned.
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
    if case.case.endswith("step"):
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
    amp = torch.bfloat16 if case.dtype == "bfloat16" else None
    if case.case == "loaded step":
        batches = loader(images, labels)
        prepare = partial(_gather, batches, Augment(), module)  # as training does
        kind = GraphedStep if graph else Step
        loaded = kind(module, optimizer, prepare=prepare, amp=amp)
        places = cycle(list(batches.places()))
        return lambda: loaded(next(places))
    if graph:
        graphed = GraphedStep(module, optimizer, loss_fn=cross_entropy, amp=amp)
        return lambda: graphed(images, labels)
    training = calls(
        case, implementation, module, images, loss=lambda logits: cross_entropy(logits, labels)
    )

    def trained() -> None:
        training()
        optimizer.step()

    return trained


def loader(images: Tensor, labels: Tensor) -> Batches:
    """Return eight batches of 8-bit images made of one, on its device."""
    grey = (255 * images).to(torch.uint8).repeat(8, 1, 1, 1).cpu().numpy()
    classes = labels.repeat(8).cpu().numpy().astype(np.uint8)
    data = LensingImages(grey, classes, ("no_sub", "sub"))
    return Batches(data, len(images), device=images.device, shuffle=True)


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
