"""The exponential moving average of a model that is being trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """Torch's exponential moving average of weights and buffers, without waits for the device.

    Torch asks the host for the number of updates at each of them, and copies it to the device. A
    CUDA graph can hold neither; here the number stays on the device and is read before the first
    update only, which copies the model. The running statistics of batch norms are averaged as the
    weights are: copied from the model they would belong to other weights than the ones they
    normalise for.

    Args:
        model: the model to follow, on its device.
        decay: weight of the average against the newest model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        device = next(model.parameters()).device
        super().__init__(model, device, use_buffers=True)
        self.decay, self.started = decay, False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards ``model``; counters are copied."""
        self.started = self.started or bool(self.n_averaged > 0)
        for floating in (True, False):
            ours, theirs = (
                [
                    t.detach()
                    for t in (*m.parameters(), *m.buffers())
                    if t.is_floating_point() == floating
                ]
                for m in (self.module, model)
            )
            if self.started and floating:
                torch._foreach_lerp_(ours, theirs, 1 - self.decay)
            elif ours:
                torch._foreach_copy_(ours, theirs)
        self.started = True
        self.n_averaged += 1
