"""The front's stored constants and filters in terms of our parameters."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from eqcvt.convert.layout import BLUR, FILTER, MASK, WEIGHTS, Layout
from eqcvt.groups import Group, lifting_basis
from eqcvt.ops import blur_kernel, circular_mask, filter_bank

LARGEST_RESIDUAL = 1e-3
_DISAGREEMENT = 1e-4
_CONSTANTS = 1e-6  # of float32
AUTHOR_MASK, AUTHOR_BLUR = (1.0, 2.0), 0.66


class Solution(NamedTuple):
    """Coefficients ``[F, C, b]`` (float64) in the basis of ``group``, and the relative residual."""

    group: Group
    weight: Tensor
    kernel_size: int
    residual: float


def solve(bank: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """Return the least-squares coefficients of filters in a basis.

    Args:
        bank: filters ``[F, G, C, k, k]``.
        basis: ``[b, G, k, k]``.

    Returns:
        Coefficients ``[F, C, b]`` and the norm of the remainder over the norm of ``bank``, in
        float64.
    """
    columns = basis.double().flatten(1).T
    rows = bank.double().transpose(1, 2).flatten(2).flatten(0, 1)
    solution = torch.linalg.lstsq(columns, rows.T, driver="gelsd").solution
    remainder = torch.linalg.norm(columns @ solution - rows.T)
    residual = float(remainder / torch.linalg.norm(rows).clamp_min(1e-30))
    return solution.T.reshape(bank.shape[0], bank.shape[2], -1), residual


def solve_front(state: dict[str, Tensor], layout: Layout, source: str) -> Solution:
    """Return the front's group and our coefficients of its stored filters.

    A group of 8 elements may be C8 or D4: the one whose basis expresses the filters is taken.

    Raises:
        ValueError: if the filters are outside of our basis, or the entries do not fit together.
    """
    order = layout.order
    assert order is not None
    bank, sampled = _stored_bank(state, layout, source)
    size = bank.shape[-1]
    names = [f"C{order}"] + ([f"D{order // 2}"] if order % 2 == 0 else [])
    solutions = []
    for name in names:
        try:
            basis = lifting_basis(name, size)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        weight, residual = solve(bank, basis)
        # The stored basis decides where the filters, all zero say, would fit several groups.
        other = 0.0 if sampled is None else solve(sampled.unsqueeze(2), basis)[1]
        solutions.append(
            (max(residual, other), Solution(Group.from_name(name), weight, size, residual))
        )
    best = min(solutions, key=lambda pair: pair[0])[1]
    if not best.residual <= LARGEST_RESIDUAL:
        raise ValueError(
            f"{source}: the stored filter is outside of our basis ({best.group.name}, "
            f"{size}x{size}): its relative residual is {best.residual:.2g}, at most "
            f"{LARGEST_RESIDUAL:g} is allowed; {_explain(bank, best.group)}"
        )
    return best


def _explain(bank: Tensor, group: Group) -> str:
    """Say why a bank may be outside of the basis."""
    scale = bank.abs().max()
    for g in range(1, group.order):
        if not group.is_exact(g):
            continue
        turned = group.act_on_image(bank[:, 0], g)
        if (turned - bank[:, g]).abs().max() > 1e-2 * scale:
            return (
                f"its channel {g} is not channel 0 turned by element {g} of {group.name}, so it is "
                f"damaged, of another group, or in another order of the group's elements"
            )
    return (
        "its channels are turned copies of each other, so it was probably made with other rings, "
        "widths or frequency cut-off than R2Conv's defaults"
    )


def _stored_bank(
    state: dict[str, Tensor], layout: Layout, source: str
) -> tuple[Tensor, Tensor | None]:
    """Return the filters ``[F, G, C, k, k]`` and, if stored, the basis ``[b, G, k, k]``."""
    assert layout.order is not None
    order = layout.order
    fields = state[f"block1.2.batch_norm_[{order}].weight"].numel()
    bank = expanded = sampled = None
    if FILTER in state:
        stored = state[FILTER].double()
        if stored.dim() != 4 or len(stored) != fields * order or stored.shape[2] != stored.shape[3]:
            raise ValueError(
                f"{source}: {FILTER!r} has the shape {list(stored.shape)}, but {fields} fields of "
                f"{order} channels need [{fields * order}, C, k, k]"
            )
        bank = stored.reshape(fields, order, *stored.shape[1:])
    if layout.sampled_basis is not None:
        stored, weights = state[layout.sampled_basis].double(), state[WEIGHTS].double()
        size = math.isqrt(stored.shape[-1]) if stored.dim() == 4 else 0
        count = len(stored) * fields
        if (
            stored.dim() != 4
            or stored.shape[1:3] != (order, 1)
            or size**2 != stored.shape[3]
            or not count
            or weights.numel() % count
        ):
            raise ValueError(
                f"{source}: {layout.sampled_basis!r} has the shape {list(stored.shape)} and "
                f"{WEIGHTS!r} {list(weights.shape)}; {fields} fields need [b, {order}, 1, k * k] "
                f"and [{fields} * C * b]"
            )
        sampled = stored.reshape(-1, order, size, size)
        expanded = filter_bank(weights.reshape(fields, -1, len(stored)), sampled)
    if bank is None:
        assert expanded is not None
        return expanded, sampled
    if expanded is not None:
        if expanded.shape != bank.shape:
            raise ValueError(
                f"{source}: {FILTER!r} has the shape {list(state[FILTER].shape)}, but {WEIGHTS!r} "
                f"and the stored basis make {list(expanded.flatten(0, 1).shape)}"
            )
        scale = max(float(bank.norm()), float(expanded.norm()), 1e-30)
        difference = float((bank - expanded).norm()) / scale
        if difference > _DISAGREEMENT:
            unset = not bank.any()  # a module never put into evaluation mode stores zeros
            warnings.warn(
                f"{source}: {FILTER!r} is not what {WEIGHTS!r} expand to (relative difference "
                f"{difference:.2g}); "
                + ("it is all zero, so the weights are taken" if unset else "the filter is taken"),
                UserWarning,
                stacklevel=5,
            )
            return (expanded if unset else bank), sampled
    return bank, sampled


def _rounding(stored: Tensor) -> float:
    """Return how far a constant from 0 to 1 may be off for the precision it is stored in."""
    return max(_CONSTANTS, torch.finfo(stored.dtype).eps)


def fit_mask(state: dict[str, Tensor], source: str) -> tuple[int, float, float]:
    """Return the size, margin (percent) and sigma (pixels) of the stored circular mask.

    Raises:
        ValueError: if no margin and sigma make the stored values.
    """
    stored = state[MASK].double().squeeze()
    if state[MASK].dim() != 4 or stored.dim() != 2 or stored.shape[0] != stored.shape[1]:
        raise ValueError(
            f"{source}: {MASK!r} has the shape {list(state[MASK].shape)}, expected [1, 1, H, H]"
        )
    size = len(stored)
    line = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2).square()
    distance = line[:, None] + line[None, :]
    edge = (stored > 1e-6) & (stored < 1 - 1e-4)
    guesses = [AUTHOR_MASK]
    if torch.unique(distance[edge]).numel() > 1:
        # Outside of the circle log(mask) = (radius^2 - distance^2) / sigma^2, a straight line.
        columns = torch.stack([torch.ones_like(distance[edge]), -distance[edge]], 1)
        constant, slope = torch.linalg.lstsq(columns, stored[edge].log()).solution.tolist()
        if slope > 0 and constant > 0:
            sigma = slope**-0.5
            margin = 100 * (1 - math.sqrt(constant / slope) / ((size - 1) / 2))
            guesses += [(round(margin, 3), round(sigma, 3)), (margin, sigma)]
    for margin, sigma in guesses:
        made = circular_mask(size, margin=margin, sigma=sigma) if 0 <= margin < 100 else -stored
        if (made - stored).abs().max() < _rounding(state[MASK]):
            return size, margin, sigma
    raise ValueError(
        f"{source}: {MASK!r} is not a circular mask with a Gaussian edge "
        f"(margin {AUTHOR_MASK[0]:g} %, sigma {AUTHOR_MASK[1]:g} px and a fit were tried)"
    )


def fit_blur(state: dict[str, Tensor], source: str) -> float:
    """Return the standard deviation in pixels of the stored blur.

    Raises:
        ValueError: if it is not one Gaussian of three standard deviations for all channels.
    """
    stored = state[BLUR].double()
    if stored.dim() == 4 and stored.shape[1] == 1 and stored.shape[2] == stored.shape[3]:
        kernel = stored[0, 0]
        centre = len(kernel) // 2
        guesses = [AUTHOR_BLUR]
        if centre and kernel[centre, centre] > kernel[centre, centre - 1] > 0:
            ratio = math.log(kernel[centre, centre] / kernel[centre, centre - 1])
            sigma = (2 * ratio) ** -0.5
            guesses += [round(sigma, 3), sigma]
        for sigma in guesses:
            made = blur_kernel(sigma)
            if made.shape == kernel.shape and (made - stored).abs().max() < _rounding(state[BLUR]):
                return sigma
    raise ValueError(
        f"{source}: {BLUR!r} of shape {list(stored.shape)} is not one Gaussian blur of three "
        f"standard deviations for every channel"
    )
