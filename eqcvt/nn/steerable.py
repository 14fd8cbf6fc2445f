"""The steerable block as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eqcvt import groups, ops
from eqcvt.nn.constants import Constants
from eqcvt.nn.norm import BatchNorm
from eqcvt.nn.parts import check_parts


class SteerableLift(Constants):
    """Steerable convolution, inner batch norm, ReLU, and optionally mask, blur and group pooling.

    Reads scalar images (``regular=False``) or regular fields (``regular=True``), see
    :func:`eqcvt.ops.lift` for the equation and how it transforms.

    Args:
        group: the group, or its name such as ``"C4"``.
        in_channels: image channels, or with ``regular`` the number of input fields.
        fields: output fields ``F``.
        kernel_size: filter size in pixels, 3 to 11.
        stride: step of the convolution.
        padding: zeros added on each side.
        regular: whether the input is a regular field.
        mask_size: image size of the circular input mask; None for no mask.
        mask_margin: margin of the mask in percent of half the image size.
        mask_sigma: fall-off of the mask in pixels.
        blur_sigma: standard deviation of the antialiasing blur in pixels; None for no blur.
        blur_stride: step of the blur.
        pool: whether to take the maximum over the group axis.
    """

    backend: str | None = "reference"
    basis: Tensor
    mask: Tensor | None
    blur: Tensor | None

    def __init__(
        self,
        group: str | groups.Group,
        in_channels: int,
        fields: int,
        kernel_size: int = 7,
        *,
        stride: int = 1,
        padding: int = 0,
        regular: bool = False,
        mask_size: int | None = None,
        mask_margin: float = 1.0,
        mask_sigma: float = 2.0,
        blur_sigma: float | None = None,
        blur_stride: int = 1,
        pool: bool = True,
    ) -> None:
        super().__init__()
        self.group = groups.Group.from_name(group)
        self.fields, self.regular = fields, regular
        self.stride, self.padding, self.blur_stride, self.pool = stride, padding, blur_stride, pool
        self.kernel_size, self.blur_sigma = kernel_size, blur_sigma
        self.mask_size, self.mask_margin, self.mask_sigma = mask_size, mask_margin, mask_sigma
        dtype = torch.get_default_dtype()
        if regular:
            covariance = groups.regular_covariance(self.group, kernel_size, in_channels)
            scale = torch.linalg.cholesky(covariance).T
        else:
            scale = groups.lifting_std(self.group, kernel_size, in_channels).diag()
        self.register_constants(torch.get_default_device(), dtype)
        self.weight = nn.Parameter(torch.randn(fields, in_channels, len(scale)) @ scale.to(dtype))
        self.norm = BatchNorm(fields)

    def constants(self) -> dict[str, Tensor | None]:
        make_basis = groups.regular_basis if self.regular else groups.lifting_basis
        size, sigma = self.mask_size, self.blur_sigma
        return {
            "basis": make_basis(self.group, self.kernel_size),
            "mask": None
            if size is None
            else ops.circular_mask(size, margin=self.mask_margin, sigma=self.mask_sigma),
            "blur": None if sigma is None else ops.blur_line(sigma),
        }

    def bank(self) -> Tensor:
        """Return the bank of turned filters ``[F, G, C, k, k]``, in the weights' own precision."""
        basis = self.basis.to(self.weight.dtype)
        if self.weight.is_meta:  # which has no autocast
            return ops.filter_bank(self.weight, basis)
        with torch.autocast(self.weight.device.type, enabled=False):
            return ops.filter_bank(self.weight, basis)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: ``[B, C, H, W]``, or with ``regular`` ``[B, F', G, H, W]``.

        Returns:
            ``[B, F, H', W']`` with ``pool``, else ``[B, F, G, H', W']``.
        """
        check_parts(self, "norm")
        y, mean, variance = ops.lift(
            x.flatten(1, 2) if self.regular else x,
            self.bank(),
            self.norm.weight,
            self.norm.bias,
            self.norm.running,
            self.mask,
            self.blur,
            stride=self.stride,
            padding=self.padding,
            blur_stride=self.blur_stride,
            pool=self.pool,
            eps=self.norm.eps,
            process_group=self.norm.process_group,
            backend=self.backend,
        )
        if mean is not None and variance is not None:
            self.norm.track(mean, variance)
        return y

    def extra_repr(self) -> str:
        fields, channels, count = self.weight.shape
        kind = "regular" if self.regular else "trivial"
        return (
            f"{self.group.name}, {kind} {channels} -> regular {fields}, "
            f"kernel_size={self.basis.shape[-1]}, basis={count}, stride={self.stride}, "
            f"padding={self.padding}, mask={self.mask is not None}, "
            f"blur={self.blur is not None}, blur_stride={self.blur_stride}, pool={self.pool}"
        )
