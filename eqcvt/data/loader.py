"""Batches from images that live on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from eqcvt._check import integer
from eqcvt.data.files import LensingImages


class Batches:
    """Iterate over (images, labels); all images are moved to the device once.

    They stay there in the type they are stored in, and a batch is gathered there: uint8 images are
    scaled where they are used, and so take a quarter of the memory.

    Every epoch has its own permutation, which depends on (seed, epoch) alone. With several
    processes each takes its contiguous part of every global batch, so that together they see
    what one process sees.

    Args:
        data: The set.
        batch_size: Size of the global batch; must divide by ``world_size``.
        device: Where the images live.
        shuffle: Whether to permute.
        seed: Seed of the permutations.
        rank, world_size: Which of how many processes this is.
        drop_last: Leave out a last batch that is not full. Without it the last parts of several
            processes can differ by one image and be empty, so train them with True.

    Raises:
        ValueError: Sizes that do not fit.
    """

    def __init__(
        self,
        data: LensingImages,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        integer("batch_size", batch_size)
        integer("world_size", world_size)
        integer("seed", seed, 0)
        if integer("rank", rank, 0) >= world_size:
            raise ValueError(f"rank must be below world_size {world_size}, got {rank}")
        if batch_size % world_size:
            lower = batch_size // world_size * world_size
            near = [str(n) for n in (lower, lower + world_size) if n]
            raise ValueError(
                f"batch_size is the global batch and must divide by world_size {world_size}, "
                f"got {batch_size}; nearest: {' or '.join(near)}"
            )
        if len(data) == 0:
            raise ValueError("there are no images to make batches of")
        if drop_last and len(data) < batch_size:
            raise ValueError(
                f"{len(data)} images do not fill one batch of {batch_size}: "
                "take a smaller batch_size, or drop_last=False"
            )
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = 0
        images = torch.from_numpy(np.require(data.images, requirements=["C", "W"]))
        if images.ndim == 3:
            images = images[:, None]
        self.images = images.to(device)
        self.labels = torch.from_numpy(data.labels.astype(np.int64)).to(device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next pass."""
        self.epoch = integer("epoch", epoch, 0)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def places(self) -> Iterator[Tensor]:
        """Iterate over the batches' places in ``images`` and ``labels``, int64 on the device.

        The permutation is moved once; nothing waits for the device between two batches.
        """
        count = len(self.images)
        order = np.arange(count)
        if self.shuffle:
            key = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,))
            order = np.random.Generator(np.random.Philox(key)).permutation(count)
        places = torch.from_numpy(order).to(self.images.device)
        for batch in range(len(self)):
            whole = places[batch * self.batch_size : (batch + 1) * self.batch_size]
            start = self.rank * len(whole) // self.world_size
            stop = (self.rank + 1) * len(whole) // self.world_size
            yield whole[start:stop]

    def take(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels at ``places``, as they are stored."""
        return self.images[places], self.labels[places]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.take, self.places())
