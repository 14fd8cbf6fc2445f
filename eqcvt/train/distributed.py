"""Processes of one run: their devices, the group that torchrun asks for, reductions over it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Process:
    """This process's place in the run: ``rank`` of ``world_size``, and the device it works on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Add ``value`` up over all processes, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers (running statistics) of the first one."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make the gradients of ``model`` the mean over all processes.

        Running statistics are not sent at every step: ``broadcast_buffers`` does it once an epoch.
        """
        if self.world_size == 1:
            return model
        # Depthwise filters have a size-1 axis, whose stride torch compares though it means nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        ids = [self.device] if self.device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        # Set here because torch renamed the constructor's argument in between.
        net.broadcast_buffers = False
        return net


def resolve_device(name: str | torch.device = "auto", *, local_rank: int = 0) -> torch.device:
    """Turn ``auto`` | ``cpu`` | ``cuda`` | ``cuda:i`` into a device that exists.

    Args:
        name: ``auto`` takes a GPU if there is one.
        local_rank: the GPU that ``auto`` and ``cuda`` stand for.

    Raises:
        ValueError: when the GPU asked for is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if str(name) == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:i, got {name!r}") from error
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise ValueError(
            f"device {str(name)!r} (GPU {index}) was asked for, but torch sees {count} GPUs; "
            "use device 'cpu' or 'auto'"
        )
    return torch.device("cuda", index)


@contextmanager
def processes(device: str = "auto") -> Iterator[Process]:
    """Join the process group that torchrun describes, for the length of the block.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. Without them, or with one process, there is no
    group. A group that exists already is used and left standing. The CPU talks gloo, GPUs nccl.

    Args:
        device: as in ``resolve_device``; a numbered GPU is refused with several processes.

    Raises:
        ValueError: for a device that does not exist or does not fit.
    """
    joined = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if joined else _environment("WORLD_SIZE", 1)
    rank = dist.get_rank() if joined else _environment("RANK", 0)
    if world_size == 1:
        yield Process(0, 1, resolve_device(device))
        return
    if device.startswith("cuda:"):
        raise ValueError(
            f"device {device!r} names one GPU, but {world_size} processes run: use device='cuda', "
            "which gives each process its own"
        )
    chosen = resolve_device(device, local_rank=_environment("LOCAL_RANK", rank))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not joined:
        _join("nccl" if chosen.type == "cuda" else "gloo", rank, world_size)
    try:
        yield Process(rank, world_size, chosen)
    finally:
        if not joined:
            # gloo's threads take Python's lock to let go of the last tensors. Ending the group
            # holds that lock and waits for the threads: let them finish first, or both wait.
            time.sleep(0.1)
            dist.destroy_process_group()


_stores: list[Any] = []


def _join(backend: str, rank: int, world_size: int) -> None:
    """Join the group of all processes, under keys that no earlier group of theirs has used.

    torch itself reuses the keys, and a second run in the same processes would wait for the
    addresses of the first for ever.
    """
    if not _stores:
        _stores.append(next(rendezvous("env://", rank, world_size))[0])
    prefixed = dist.PrefixStore(f"eqcvt-{len(_stores)}", _stores[0])  # type: ignore[attr-defined]
    _stores.append(prefixed)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size)


def _environment(name: str, default: int) -> int:
    """An integer that torchrun put into the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}")
    return int(text)
