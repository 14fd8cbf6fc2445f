"""One optimiser step as a CUDA graph: a whole step costs the host one launch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from eqcvt._check import integer
from eqcvt.train.average import Average
from eqcvt.train.step import Step

log = logging.getLogger("eqcvt")


class Recorder:
    """Runs work on a stream of its own, and records it; all that needs a GPU stands here.

    Args:
        device: the GPU.

    Raises:
        ValueError: another device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"a CUDA graph needs a model on a GPU, got one on {device}: move it with "
                "model.to('cuda'), or take eqcvt.train.Step"
            )
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Run ``work`` behind all that was launched before, and before all that comes after."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record ``work`` without running it; what is returned runs it.

        Raises:
            RuntimeError: when something in it waits for the device. The process cannot go on
                using the device then.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread, such as a loader's, may use the device meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            raise RuntimeError(
                f"this training step cannot be recorded as a CUDA graph ({error}): take "
                "eqcvt.train.Step, or eqcvt train --no-cuda-graph, in a new process"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            # The next replay overwrites the result.
            return result.clone()

        return replay


@dataclass(eq=False)
class GraphedStep(Step):
    """:class:`Step`, recorded once and then replayed as one CUDA graph.

        optimizer = torch.optim.Adam(model.parameters(), capturable=True, fused=True)
        step = GraphedStep(model, optimizer, amp=torch.bfloat16)
        loss = step(images, labels)

    The first ``warmup`` calls take their steps as :class:`Step` does, on another stream; the next
    one records, and from then on each call copies its batch into fixed memory and replays. No step
    is taken that was not asked for, and random numbers from torch's generator of the device are
    the ones that a plain step draws: a run with the graph is the run without it, but for rounding.

    Read anew at each step: the batch, the random numbers, and the rate of each group of the
    optimizer, which becomes a tensor (set it by value or through torch's schedulers). Fixed by
    recording: everything else. When the optimizer loads a state or gets another setting, the
    weights come to lie elsewhere, or what is trained or in training mode changes, the step warms up
    and records anew. Schedulers that move momentum too (``OneCycleLR``, ``CyclicLR``) would have it
    do so all the time: give them ``cycle_momentum=False``.

    A batch with another number of images, such as the last one of an epoch, is run without the
    graph.

    Args:
        warmup: calls before recording. Kernels are compiled and memory is found in these.

    Raises:
        TypeError, ValueError: a model that is not on a GPU; an optimizer, a scaler or an average
            that cannot be recorded.
    """

    _: KW_ONLY
    warmup: int = 3
    _batch: tuple[Tensor, ...] = field(default=(), init=False, repr=False)
    _replay: Callable[[], Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        integer("warmup", self.warmup)
        self._device = next(self.model.parameters()).device
        self._recorder = Recorder(self._device)
        groups, name = self.optimizer.param_groups, type(self.optimizer).__name__
        if not all(group.get("capturable") for group in groups):
            raise ValueError(
                f"a CUDA graph needs an optimizer made with capturable=True, such as "
                f"torch.optim.Adam(..., capturable=True, fused=True); got {name} without it"
            )
        if self.scaler.is_enabled() and not all(group.get("fused") for group in groups):
            raise ValueError(
                f"loss scaling in a CUDA graph needs an optimizer made with fused=True, which "
                f"skips a step on the device; got {name} without it"
            )
        if self.average is not None and not isinstance(self.average, Average):
            raise TypeError(
                "a CUDA graph needs an eqcvt.train.Average, whose update does not ask the host; "
                f"got {type(self.average).__name__}"
            )
        self._rates: list[Tensor] = []
        self._start_again()

    def _start_again(self) -> None:
        self._replay, self._left = None, self.warmup
        self._recorded: dict[str, list[Any]] = {}

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take one step on a batch; returns the loss before it, without a gradient.

        Raises:
            ValueError: tensors on another device, or of another type or shape than before.
        """
        same = self._same_size(batch)
        self._take_rates()
        if not same:
            return self._run(batch)
        for fixed, given in zip(self._batch, batch, strict=True):
            fixed.copy_(given)
        if self._replay is not None and (changed := self._changed()):
            log.warning("recording the training step anew: %s changed", changed)
            self._start_again()
        if self._left:
            self._left -= 1
            return self._run(self._batch)
        if self._replay is None:
            self._replay = self._recorder.record(lambda: self._launch(*self._batch))
            self._recorded = self._fixed()
        return self._replay()

    def _run(self, batch: tuple[Tensor, ...]) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            return self._recorder.run(lambda: self._launch(*batch))

    def _same_size(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether a batch has as many images as the one that is recorded; the first one decides."""
        for tensor in batch:
            if tensor.device != self._device:
                raise ValueError(
                    f"the model is on {self._device}, got a batch on {tensor.device}: move it there"
                )
        if not self._batch:
            self._batch = tuple(torch.empty_like(tensor) for tensor in batch)
        expected, given = ([(t.dtype, t.shape[1:]) for t in b] for b in (self._batch, batch))
        if given != expected:
            raise ValueError(
                f"this step takes batches like {_described(self._batch)}, got {_described(batch)}: "
                "make another GraphedStep for these"
            )
        same = [t.shape for t in batch] == [t.shape for t in self._batch]
        if not same:
            log.info("a batch of %s is run without the CUDA graph", _described(batch))
        return same

    def _take_rates(self) -> None:
        """Copy rates that were set by value to where the graph reads them."""
        groups = self.optimizer.param_groups
        while len(self._rates) < len(groups):
            self._rates.append(torch.zeros((), dtype=torch.float32, device=self._device))
        for group, rate in zip(groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _fixed(self) -> dict[str, list[Any]]:
        """What a recording fixes, by what to call it."""
        optimizer, modules = self.optimizer, list(self.model.modules())
        # In one walk over the modules, since every step takes it.
        own = chain.from_iterable((m._parameters.values(), m._buffers.values()) for m in modules)
        mine = [tensor for tensor in chain.from_iterable(own) if tensor is not None]
        state = chain.from_iterable(values.values() for values in optimizer.state.values())
        settings = [name for name in optimizer.defaults if name != "lr"]
        return {
            "where tensors lie": [t.data_ptr() for t in chain(mine, optimizer.state, state)],
            "which parameters are trained": [tensor.requires_grad for tensor in mine],
            "which modules are in training mode": [module.training for module in modules],
            **{
                f"the optimizer's {name}": [group[name] for group in optimizer.param_groups]
                for name in settings
            },
        }

    def _changed(self) -> str:
        """Name what is no longer as it was recorded."""
        now = self._fixed()
        return ", ".join(name for name, values in self._recorded.items() if values != now[name])


def _described(batch: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in batch)
