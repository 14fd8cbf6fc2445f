"""One optimiser step as a CUDA graph: a whole step costs the host one launch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain

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
    recording: everything else. When the optimizer loads a state, the weights come to lie elsewhere
    or the model changes between training and evaluation, the step warms up and records anew.

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
        self._rates = [torch.zeros((), dtype=torch.float32, device=self._device) for _ in groups]
        self._start_again()

    def _start_again(self) -> None:
        self._replay, self._left = None, self.warmup
        self._recorded: list[int] = []

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
        if self._replay is not None and self._memory() != self._recorded:
            log.info("recording the training step anew: what it works on was replaced")
            self._start_again()
        if self._left:
            self._left -= 1
            return self._run(self._batch)
        if self._replay is None:
            self._replay = self._recorder.record(lambda: self._launch(*self._batch))
            self._recorded = self._memory()
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
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _memory(self) -> list[int]:
        """Where the graph finds parameters and the optimizer's state, and the model's mode."""
        state = self.optimizer.state
        tensors = chain(state, *(values.values() for values in state.values()))
        return [self.model.training, *map(Tensor.data_ptr, tensors)]


def _described(batch: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in batch)
