"""Random rotations on the training device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eqcvt._check import choice, integer

MODES = ("rotate", "dihedral", "mixed", "none")
# Images turned together on the CPU: their fine grids then stay in its cache.
CPU_PART = 8


def rotate(images: Tensor, degrees: Tensor, supersample: int = 3) -> Tensor:
    """Rotate each image counter-clockwise about its centre, on a finer grid.

    The image is enlarged bilinearly, rotated bilinearly with zeros beyond its edge, and reduced
    with an antialiasing bilinear filter, as the author's transforms did. The fine pixel at the
    place (x, y) from the centre, y downwards, takes the value at
    ``(x cos - y sin, x sin + y cos)``. Nothing waits for the device: a CUDA graph can hold it.

    Interpolation smooths the noise: white noise of deviation 1 keeps 0.54 unturned and 0.50 turned
    by 45 degrees, ``rotate(torch.randn(99, 1, 65, 65), torch.full((99,), 45.0))[..., 25:40,
    25:40].std()``. Images that are not turned, as in validation, have all of theirs.

    Args:
        images: Floating [B, C, H, W].
        degrees: Angle of each image [B].
        supersample: Factor of the finer grid; 1 rotates the pixels themselves.

    Returns:
        [B, C, H, W] of the same type; half precisions are computed in float32.
    """
    if images.device.type == "cpu" and len(images) > CPU_PART:
        parts = zip(torch.split(images, CPU_PART), torch.split(degrees, CPU_PART), strict=True)
        return torch.cat([rotate(*part, supersample) for part in parts])
    fine = images if images.dtype == torch.float64 else images.to(torch.float32)
    height, width = images.shape[-2] * supersample, images.shape[-1] * supersample
    if supersample > 1:
        fine = F.interpolate(fine, (height, width), mode="bilinear", align_corners=False)
    fine = F.grid_sample(
        fine, _rotated_grid(degrees.to(fine), height, width), mode="bilinear", align_corners=False
    )
    if supersample > 1:
        size = (images.shape[-2], images.shape[-1])
        fine = F.interpolate(fine, size, mode="bilinear", align_corners=False, antialias=True)
    return fine.to(images.dtype)


def _rotated_grid(degrees: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel's value comes from, [B, height, width, 2] as ``grid_sample`` takes it.

    A rotation is linear, so the place is the sum of one part for the column and one for the row.
    As complex numbers x + iy these are added in one pass; ``affine_grid``, which makes a matrix
    product of every pixel, takes longer than the sampling itself.
    """
    dtype, device = degrees.dtype, degrees.device
    x = torch.arange(width, dtype=dtype, device=device) - (width - 1) / 2
    y = torch.arange(height, dtype=dtype, device=device)[:, None] - (height - 1) / 2
    # grid_sample measures in halves of the image, from the middle.
    to_x, to_y = 2 / width, 2 / height
    angle = degrees.deg2rad()[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    column = torch.complex(to_x * cos * x, to_y * sin * x)  # [B, 1, width]
    row = torch.complex(to_x * -sin * y, to_y * cos * y)  # [B, height, 1]
    return torch.view_as_real(column + row)


class Augment(nn.Module):
    """Turn every image of a batch by an angle of its own.

    The randomness comes from torch's global generator of the images' device. In evaluation mode
    (``.eval()``) images pass unchanged.

    Args:
        mode: ``rotate``: any angle in [-180, 180) degrees, with half the noise; ``dihedral``: exact
            quarter turns and mirror images, of square images; ``mixed``: the first half of a batch
            by any angle, the rest exactly; ``none``: unchanged.
        supersample: Factor of the finer grid on which ``rotate`` works.
    """

    def __init__(self, mode: str = "mixed", supersample: int = 3) -> None:
        super().__init__()
        self.mode = choice("augmentation", mode, MODES)
        self.supersample = integer("supersample", supersample)

    def forward(self, images: Tensor) -> Tensor:
        """Return turned images of the same shape and type.

        Args:
            images: Floating [B, C, H, W].

        Raises:
            TypeError: Integers, which rotation would round; scale them with ``to_unit`` first.
            ValueError: Another shape.
        """
        if not images.is_floating_point():
            raise TypeError(
                f"augmentation needs floating images, got {images.dtype}: "
                "scale them with eqcvt.data.to_unit first"
            )
        if images.ndim != 4:
            raise ValueError(
                f"augmentation needs images of the shape [B, C, H, W], got {list(images.shape)}"
            )
        if self.mode == "none" or not self.training or images.shape[0] == 0:
            return images
        if self.mode != "rotate" and images.shape[-1] != images.shape[-2]:
            raise ValueError(
                f"quarter turns need square images, got {images.shape[-2]}x{images.shape[-1]}"
            )
        if self.mode == "mixed":
            first, rest = torch.tensor_split(images, 2)
            return torch.cat([self._any_angle(first), _quarter_turns(rest)])
        return self._any_angle(images) if self.mode == "rotate" else _quarter_turns(images)

    def _any_angle(self, images: Tensor) -> Tensor:
        uniform = torch.rand(images.shape[0], device=images.device)
        return rotate(images, uniform * 360 - 180, self.supersample)

    def extra_repr(self) -> str:
        """Show the settings in the module's repr."""
        return f"mode={self.mode!r}, supersample={self.supersample}"


def _quarter_turns(images: Tensor) -> Tensor:
    """Turn and mirror each image at random, exactly."""
    quarter, half, mirror = torch.rand(3, images.shape[0], 1, 1, 1, device=images.device) < 0.5
    images = torch.where(quarter, images.rot90(1, (2, 3)), images)
    images = torch.where(half, images.rot90(2, (2, 3)), images)
    return torch.where(mirror, images.flip(3), images)
