"""Ordinary and symmetric convolution filters behind one parameter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eqcvt.groups import Group, orbit_basis
from eqcvt.nn.constants import Constants


class Filters(Constants):
    """Convolution filters ``[out, in, k, k]``, free or constant on the pixel orbits of a group.

    Free filters are stored as they are; symmetric ones as one weight per orbit (3 for a 3x3 filter
    under the 90-degree turns), from which the filter is expanded.

    Args:
        out_channels: filters.
        in_channels: channels each of them reads (1 for depthwise ones).
        kernel_size: size in pixels.
        symmetry: the group whose grid symmetries leave the filters unchanged; None for free
            filters.
    """

    orbits: Tensor | None

    def __init__(
        self, out_channels: int, in_channels: int, kernel_size: int, symmetry: Group | None = None
    ) -> None:
        super().__init__()
        self.symmetry, self.kernel_size = symmetry, kernel_size
        # The same bound as torch.nn.Conv2d's default, so that both kinds start alike.
        bound = 1 / math.sqrt(in_channels * kernel_size**2)
        self.register_constants(torch.get_default_device(), torch.get_default_dtype())
        shape = (kernel_size, kernel_size) if self.orbits is None else self.orbits.shape[:1]
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, *shape).uniform_(-bound, bound)
        )

    def constants(self) -> dict[str, Tensor | None]:
        if self.symmetry is None:
            return {"orbits": None}
        return {"orbits": orbit_basis(self.symmetry, self.kernel_size)}

    def forward(self) -> Tensor:
        """Return the filters ``[out, in, k, k]``."""
        if self.orbits is None:
            return self.weight
        orbits = self.orbits.to(self.weight.dtype)
        return (self.weight.unsqueeze(-1).unsqueeze(-1) * orbits).sum(2)

    def extra_repr(self) -> str:
        filters, channels, *_, size = (self.weight if self.orbits is None else self()).shape
        symmetry = "" if self.symmetry is None else f", symmetry={self.symmetry.name}"
        return f"{channels} -> {filters}, kernel_size={size}{symmetry}"
