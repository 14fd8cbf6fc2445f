"""One optimiser step: batch, loss, gradient, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from eqcvt.train.average import Average

Prepare = Callable[..., tuple[Tensor, Tensor]]


def _as_given(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, labels


@dataclass(eq=False)
class Step:
    """One optimiser step, launched operation by operation.

        step = Step(model, optimizer, amp=torch.bfloat16)
        loss = step(images, labels)

    Nothing in it waits for the device, except where ``scaler`` scales for an optimizer that is not
    fused.

    Args:
        model: maps what ``prepare`` makes to logits.
        optimizer: changes its parameters, at the rate that its groups then have.
        loss_fn: maps (logits, labels) to the loss.
        prepare: maps what the step is called with to (input of the model, labels), without a
            gradient: the place for gathering, scaling and augmentation. By default the step is
            called with these.
        amp: the type autocast computes in; None for that of the model, whatever autocast is on.
        clip: largest norm of the gradient, 0 for no clipping.
        scaler: scales the loss for ``amp=torch.float16``.
        average: ``Average(model, decay)``, which follows the model after each update.
    """

    model: nn.Module
    optimizer: Optimizer
    _: KW_ONLY
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    prepare: Prepare = _as_given
    amp: torch.dtype | None = None
    clip: float = 0.0
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    average: Average | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take one step on a batch; returns the loss before it, without a gradient."""
        return self._launch(*batch)

    def _launch(self, *batch: Tensor) -> Tensor:
        with torch.no_grad():
            images, labels = self.prepare(*batch)
        # Kept casts of the weights would outlive an update where the caller's autocast is on.
        with torch.autocast(
            images.device.type, self.amp, enabled=self.amp is not None, cache_enabled=False
        ):
            loss = self.loss_fn(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(loss))
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach()
