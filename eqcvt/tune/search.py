"""The fastest right launch of a kernel, by coordinate descent from the one in force."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from eqcvt.kernels import launches
from eqcvt.kernels.launches import Launch
from eqcvt.tune.check import first_line

# A candidate must be faster by more than what two measurements of one launch differ.
GAIN = 0.98
# Replays that a time is the median of.
ROUNDS = 15
# Kernels whose time an entry decides, where it is not the kernel of its own name alone.
DECIDES = {
    "conv_attention_attend_bwd_keys": (
        "conv_attention_attend_bwd_keys",
        "conv_attention_attend_bwd_finish",
    ),
    "lift_plan": ("lift_conv", "lift_sums", "lift_finish"),
    # More taps in a block leave fewer blocks to a kernel of their own.
    "token_embed_bwd": ("token_embed_bwd", "token_embed_bwd_filters"),
}


class Timer(Protocol):
    """Measures the milliseconds that kernels take in a call, all their launches together."""

    def __call__(self, run: Callable[[], object], kernels: tuple[str, ...]) -> float: ...


class Found(NamedTuple):
    """The outcome of a search; ``refused`` has the candidates left out, with their reasons."""

    launch: Launch
    before_ms: float
    after_ms: float
    refused: dict[str, str]
    finished: bool


class CudaTimer:
    """Replays the launches that a call makes: median of ``ROUNDS``, each with a cold L2 cache."""

    def __init__(self) -> None:
        # Filling more than any L2 cache holds also keeps the device busy until the replay is there.
        self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object], kernels: tuple[str, ...]) -> float:
        with _recorded(kernels) as made:
            run()
        torch.cuda.synchronize()
        if not made:
            raise RuntimeError(f"the call launches none of {', '.join(kernels)}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in made:
                launch()
        times = []
        for _ in range(ROUNDS):
            start, end = self._event(), self._event()
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return float(statistics.median(times))

    @staticmethod
    def _event() -> Any:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@contextmanager
def _recorded(kernels: tuple[str, ...]) -> Iterator[list[Callable[[], object]]]:
    """Yield a list that fills with the launches of ``kernels``, which can be made again."""
    from triton.runtime import JITFunction

    original = JITFunction.run
    made: list[Callable[[], object]] = []

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.__name__.removeprefix("_").removesuffix("_kernel") in kernels:
            made.append(partial(original, kernel, *args, **kwargs))
        return original(kernel, *args, **kwargs)

    JITFunction.run = run
    try:
        yield made
    finally:
        JITFunction.run = original


def entries_used(run: Callable[[], object]) -> list[str]:
    """Return the entries of the table, without their device class, that a call looks up."""
    seen: dict[str, None] = {}
    find = launches.find

    def note(kernel: str, x: torch.Tensor, shape: str = "any") -> Launch:
        seen[f"{kernel} {8 * x.dtype.itemsize} {shape}"] = None
        return find(kernel, x, shape)

    launches.find = note
    try:
        run()
    finally:
        launches.find = find
    return list(seen)


def decided(entry: str) -> tuple[str, ...]:
    """Return the kernels whose time an entry decides."""
    kernel = entry.split(" ")[0]
    return DECIDES.get(kernel, (kernel,))


def descend(
    key: str,
    start: Launch,
    time: Callable[[], float],
    wrong: Callable[[], str | None],
    *,
    refused: dict[str, str],
    expired: Callable[[], bool] = lambda: False,
) -> Found:
    """Change one field at a time by one step, as long as that is faster and as right.

    Args:
        key: the entry's full name.
        start: the launch to begin with, known to be right.
        time: returns the milliseconds with the table in force.
        wrong: returns what is wrong with the table in force, or None.
        refused: candidates not to try again, with the reason; more are added to it.
        expired: whether to stop with what was found so far.

    Raises:
        RuntimeError: if a candidate left the device unusable; it is in ``refused`` then.
    """
    best = dict(start)
    with launches.installed({key: best}):
        before = fastest = time()
    tried = {str(best)}
    kernel, capability = key.split(" ")[1], launches.class_of(key)
    fields = launches.KERNELS[kernel].fields
    improved = True
    while improved:
        improved = False
        for field, values in fields.items():
            for other in _steps(values, best[field]):
                candidate = best | {field: other}
                name = str(candidate)
                if name in tried or name in refused:
                    continue
                if launches.too_few_rows(kernel, candidate, capability):
                    continue
                if expired():
                    return Found(best, before, fastest, refused, False)
                tried.add(name)
                with launches.installed({key: candidate}):
                    try:
                        ms = time()
                        reason = wrong() if ms < GAIN * fastest else "slower"
                    except Exception as error:  # whatever a compiler or a driver raises
                        reason = first_line(error)
                        _check_device(key, name, reason, refused)
                if reason is None:
                    best, fastest, improved = candidate, ms, True
                elif reason != "slower":
                    refused[name] = reason
    return Found(best, before, fastest, refused, True)


def _steps(values: tuple[int, ...], now: int) -> list[int]:
    """Return the values beside the present one, the larger first; all of them where 0 is off."""
    if 0 in values:
        return [value for value in values if value != now]
    place = values.index(now)
    return [*values[place + 1 : place + 2], *values[max(0, place - 1) : place]]


def _check_device(key: str, name: str, reason: str, refused: dict[str, str]) -> None:
    """Raise if the device answers no more: an illegal access ends every later call as well."""
    refused[name] = reason
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise RuntimeError(
            f"{key} with {name} left the GPU unusable ({reason}); the same command goes on "
            f"without that launch"
        ) from error
