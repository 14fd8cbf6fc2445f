"""The planar groups C_n and D_n, how they act, and the band-limited steerable filters they turn.

A group element ``g`` is a rotation by a multiple of 360/n degrees (counter-clockwise), for D_n
possibly after the mirror image ``x -> -x``. It acts on an image by ``(g x)(p) = x(g^-1 p)``, on a
filter in the same way, and on the group axis of a regular field by the permutation
``(g u)(h) = u(g^-1 h)``.

Every equivariant filter bank from scalar images to regular fields is one free filter ``phi`` and
its turned copies, ``psi[g](p) = phi(g^-1 p)``; from regular to regular fields it is one free filter
per relative group element. ``phi`` ranges over Gaussian rings times circular harmonics below a
cut-off frequency, so that turning it by any angle stays within what the grid can represent (Weiler
and Cesa, "General E(2)-Equivariant Steerable CNNs", NeurIPS 2019, arXiv:1911.08251; rings, widths
and cut-off are those of escnn's ``R2Conv`` default).
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eqcvt import _check

MAX_ORDER = 16
KERNEL_SIZES = range(3, 12)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """The cyclic group C_n (``reflections=False``) or the dihedral group D_n.

    Element ``i`` is the pair ``(flip, turn) = divmod(i, n)``: first mirrored if ``flip``, then
    turned by ``360 * turn / n`` degrees counter-clockwise. Element 0 is the identity.

    Args:
        n: number of rotations.
        reflections: whether mirror images belong to the group.
    """

    n: int
    reflections: bool = False

    @staticmethod
    def from_name(name: str | Group) -> Group:
        """Return the group called ``"C4"``, ``"D8"``, ... (at most 16 elements).

        Raises:
            TypeError: if ``name`` is not a string.
            ValueError: if it names no group of at most 16 elements.
        """
        if isinstance(name, Group):
            name = name.name
        if not isinstance(name, str):
            raise TypeError(
                f"group must be a name such as 'C4', got {type(name).__name__} {name!r}"
            )
        match = re.fullmatch(r"([CD])([1-9]\d*)", name)
        if match is None:
            _check.choice("group", name, GROUP_NAMES)
            raise AssertionError("unreachable: every valid name matches")
        group = Group(int(match[2]), match[1] == "D")
        if group.order > MAX_ORDER:
            largest = f"{match[1]}{MAX_ORDER // (2 if match[1] == 'D' else 1)}"
            raise ValueError(
                f"group {name!r} has {group.order} elements, at most {MAX_ORDER} are supported; "
                f"the largest of this kind is {largest!r}"
            )
        return group

    @property
    def name(self) -> str:
        return f"{'D' if self.reflections else 'C'}{self.n}"

    @property
    def order(self) -> int:
        return self.n * (2 if self.reflections else 1)

    @property
    def grid_symmetries(self) -> Group:
        """The subgroup that maps the pixel grid onto itself (multiples of 90 degrees, mirrors)."""
        return Group(math.gcd(self.n, 4), self.reflections)

    def parts(self, element: int) -> tuple[int, int]:
        """Return ``(flip, turn)`` of an element."""
        if not 0 <= element < self.order:
            raise ValueError(f"{self.name} has elements 0 to {self.order - 1}, got {element}")
        return divmod(element, self.n)

    def compose(self, a: int, b: int) -> int:
        """Return the element that acts as ``b`` first and ``a`` afterwards."""
        (flip_a, turn_a), (flip_b, turn_b) = self.parts(a), self.parts(b)
        turn = turn_a - turn_b if flip_a else turn_a + turn_b
        return (flip_a ^ flip_b) * self.n + turn % self.n

    def inverse(self, a: int) -> int:
        """Return the element that undoes ``a``."""
        flip, turn = self.parts(a)
        return a if flip else -turn % self.n

    def matrix(self, element: int) -> Array:
        """Return the 2x2 matrix that moves a point ``(x, y)`` (x to the right, y up)."""
        flip, turn = self.parts(element)
        angle = 2 * math.pi * turn / self.n
        cos, sin = math.cos(angle), math.sin(angle)
        mirror = np.diag([-1.0 if flip else 1.0, 1.0])
        return np.array([[cos, -sin], [sin, cos]]) @ mirror

    def permutation(self, element: int) -> list[int]:
        """Return the index list ``p`` with ``(g u)(h) = u[p[h]]``, the action on a group axis."""
        inverse = self.inverse(element)
        return [self.compose(inverse, h) for h in range(self.order)]

    def is_exact(self, element: int) -> bool:
        """Whether the element maps the pixel grid onto itself."""
        return (4 * self.parts(element)[1]) % self.n == 0

    def act_on_image(self, x: Tensor, element: int) -> Tensor:
        """Turn images or filters about their centre: ``(g x)(p) = x(g^-1 p)``.

        Multiples of 90 degrees and mirrors are exact; other angles interpolate bilinearly and read
        zeros outside of the image.

        Args:
            x: floating-point tensor ``[..., H, W]``.
            element: index of the group element.

        Returns:
            A tensor of the same shape and dtype (height and width swapped by quarter turns).
        """
        flip, turn = self.parts(element)
        if self.is_exact(element):
            mirrored = x.flip(-1) if flip else x
            return torch.rot90(mirrored, 4 * turn // self.n, (-2, -1))
        height, width = x.shape[-2:]
        # grid_sample counts y downwards, so the matrix is conjugated by diag(1, -1).
        inverse = self.matrix(self.inverse(element)) * np.array([[1.0, -1.0], [-1.0, 1.0]])
        if height != width:
            inverse = inverse * np.array([[1.0, height / width], [width / height, 1.0]])
        theta = torch.as_tensor(inverse, dtype=x.dtype, device=x.device)
        theta = torch.cat([theta, theta.new_zeros(2, 1)], 1)
        flat = x.reshape(1, -1, height, width)
        grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
        return F.grid_sample(flat, grid, align_corners=False).reshape(x.shape)

    def act_on_regular(self, u: Tensor, element: int) -> Tensor:
        """Act on a regular field: turn the image and permute the group axis.

        Args:
            u: tensor ``[B, F, G, H, W]``.
            element: index of the group element.
        """
        if u.dim() != 5 or u.shape[2] != self.order:
            raise ValueError(
                f"a regular field of {self.name} is [B, F, {self.order}, H, W], got {list(u.shape)}"
            )
        return self.act_on_image(u[:, :, self.permutation(element)], element)


GROUP_NAMES = tuple(
    [f"C{n}" for n in range(1, MAX_ORDER + 1)] + [f"D{n}" for n in range(1, MAX_ORDER // 2 + 1)]
)


@dataclass(frozen=True)
class _Harmonic:
    """One free filter: a Gaussian ring times the cos or sin of ``frequency`` times the angle."""

    frequency: int
    odd: bool
    radius: float
    width: float


def _harmonics(kernel_size: int) -> list[_Harmonic]:
    """List the free filters of a kernel size by frequency, then cos and sin, then rings."""
    half = kernel_size // 2
    radii = np.linspace(0, (kernel_size - 1) // 2, math.ceil(kernel_size / 2))
    # The outermost ring is narrow so that it does not run over the border; the centre is one pixel.
    widths = [0.005 if r == 0 else 0.4 if r == radii[-1] else 0.6 for r in radii]

    def cutoff(radius: float) -> float:
        if radius == 0:
            return 0
        return min(2 * radius, 2 if radius == half else 2 * radius - (radius + 1) % 2)

    top = int(max(cutoff(r) for r in radii))
    return [
        _Harmonic(frequency, odd, float(radius), width)
        for frequency in range(top + 1)
        for odd in ((False, True) if frequency else (False,))
        for radius, width in zip(radii, widths, strict=True)
        if frequency <= cutoff(radius)
    ]


def _pixel_centres(kernel_size: int) -> Array:
    """Return the ``[k * k, 2]`` points (x, y) of a filter's pixels in storage order, y up."""
    line = np.arange(kernel_size) - (kernel_size - 1) / 2
    y, x = np.meshgrid(-line, line, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], 1)


def _sample(harmonic: _Harmonic, points: Array, n: int) -> Array:
    radius, angle = np.hypot(points[:, 0], points[:, 1]), np.arctan2(points[:, 1], points[:, 0])
    ring = np.exp(-0.5 * ((radius - harmonic.radius) / harmonic.width) ** 2)
    # escnn measures angles from the y axis, and conjugates harmonics above half of n.
    phase = harmonic.frequency * (angle - math.pi / 2)
    if not harmonic.odd:
        wave = np.cos(phase)
    else:
        wave = np.sin(phase) * (-1 if 2 * (harmonic.frequency % n) > n else 1)
    if harmonic.frequency:
        wave = np.where(radius > 1e-9, wave, 0.0)
    value: Array = ring * wave
    return value


def _irrep(group: Group, harmonic: _Harmonic) -> tuple[tuple[int, int], int]:
    """Return which irreducible part of the regular representation a harmonic feeds, and its size.

    The one-dimensional parts of D_n are told apart by parity; its two-dimensional ones come twice,
    one for the cosine and one for the sine.
    """
    residue = harmonic.frequency % group.n
    index = min(residue, group.n - residue)
    one_dimensional = index == 0 or 2 * index == group.n
    return (index, int(harmonic.odd) if group.reflections else 0), 1 if one_dimensional else 2


@functools.cache
def _lifting(group: Group, kernel_size: int) -> tuple[Array, Array, list[_Harmonic]]:
    """Return the sampled basis [b, g, k, k], its initial deviations at C = 1, its harmonics."""
    if kernel_size not in KERNEL_SIZES:
        nearest = min(max(kernel_size, KERNEL_SIZES[0]), KERNEL_SIZES[-1])
        raise ValueError(
            f"kernel_size must be {KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}, got {kernel_size}; "
            f"the nearest is {nearest}"
        )
    points = _pixel_centres(kernel_size)
    turned = [points @ group.matrix(group.inverse(g)).T for g in range(group.order)]
    elements, irreps, harmonics = [], [], []
    for harmonic in _harmonics(kernel_size):
        stack = np.stack([_sample(harmonic, p, group.n) for p in turned])
        norm = np.linalg.norm(stack)
        if norm < 1e-6:  # even sizes have no pixel at the centre
            continue
        irrep, size = _irrep(group, harmonic)
        elements.append(stack * (math.sqrt(size) / norm))
        irreps.append(irrep)
        harmonics.append(harmonic)
    counts = {irrep: irreps.count(irrep) for irrep in irreps}
    basis = np.stack(elements).reshape(-1, group.order, kernel_size, kernel_size)
    return basis, np.array([1 / math.sqrt(counts[irrep]) for irrep in irreps]), harmonics


def lifting_basis(group: str | Group, kernel_size: int) -> Tensor:
    r"""Return the steerable basis from scalar images to regular fields.

    .. math:: \psi_b[g](p) = \phi_b(g^{-1} p), \qquad \sum_{g,p} \psi_b[g](p)^2 = d_b

    with :math:`d_b` the size of the irreducible representation that the harmonic feeds (1 or 2),
    which is escnn's normalisation; for cyclic groups the values and their order are escnn's too.

    Args:
        group: the group or its name.
        kernel_size: filter size in pixels, 3 to 11, odd or even.

    Returns:
        float64 tensor ``[b, G, k, k]``; 18 elements at 7x7.

    Raises:
        ValueError: on an unknown group or a kernel size out of range.
    """
    return torch.from_numpy(_lifting(Group.from_name(group), kernel_size)[0].copy())


def lifting_std(group: str | Group, kernel_size: int, in_channels: int) -> Tensor:
    """Return the standard deviations ``[b]`` of escnn's He-style initialisation of a filter.

    Within one irreducible part of the output the weights share the variance 1 / (number of weights
    that feed it). The expected squared norm of each output channel's filter is then the size of the
    parts that are fed over the group's order: 1 for C4, less for larger groups and small filters.
    """
    std = _lifting(Group.from_name(group), kernel_size)[1]
    return torch.from_numpy(std / math.sqrt(in_channels))


def regular_basis(group: str | Group, kernel_size: int) -> Tensor:
    r"""Return the steerable basis from regular to regular fields.

    .. math:: \psi_{b,r}[g, h](p) = \phi_b(g^{-1} p) \; [g^{-1} h = r]

    one copy of the scalar basis for each relative element :math:`r`, of squared norm ``G``.

    Args:
        group: the group or its name.
        kernel_size: filter size in pixels, 3 to 11.

    Returns:
        float64 tensor ``[b * G, G, G, k, k]`` (basis, output element, input element, rows,
        columns).
    """
    group = Group.from_name(group)
    scalar = lifting_basis(group, kernel_size)
    scalar = scalar * (group.order / scalar.square().sum((1, 2, 3), keepdim=True)).sqrt()
    count, order = scalar.shape[:2]
    basis = scalar.new_zeros(count, order, order, order, kernel_size, kernel_size)
    for relative in range(order):
        for g in range(order):
            basis[:, relative, g, group.compose(g, relative)] = scalar[:, g]
    return basis.reshape(count * order, order, order, kernel_size, kernel_size)


def _isotypic(group: Group) -> list[tuple[Array, int]]:
    """Return the projectors ``[G, G]`` of the group axis onto its isotypic parts, and their size.

    The size is that of the part over that of one irreducible representation, times the latter:
    multiplicity times dimension.
    """
    parts = []
    for index in range(group.n // 2 + 1):
        one_dimensional = index == 0 or 2 * index == group.n
        for parity in (1, -1) if group.reflections and one_dimensional else (1,):
            projector = np.zeros((group.order, group.order))
            for g in range(group.order):
                flip, turn = group.parts(g)
                character = math.cos(2 * math.pi * index * turn / group.n)
                if one_dimensional:
                    character *= parity if flip else 1
                elif group.reflections:
                    character *= 0 if flip else 4
                else:
                    character *= 2
                projector[range(group.order), group.permutation(g)] += character / group.order
            parts.append((projector, round(np.trace(projector))))
    return parts


@functools.cache
def _regular_covariance(group: Group, kernel_size: int) -> Array:
    basis = regular_basis(group, kernel_size).numpy()
    rings: dict[tuple[int, float], list[int]] = {}
    for index, harmonic in enumerate(_lifting(group, kernel_size)[2]):
        rows = [index * group.order + relative for relative in range(group.order)]
        rings.setdefault((harmonic.frequency, harmonic.radius), []).extend(rows)
    parts = _isotypic(group)
    covariance = np.zeros((len(basis), len(basis)))
    for out, size in parts:
        # An equivariant filter is known by its first output element, so that suffices.
        images = {key: np.tensordot(basis[rows], out[0], (1, 0)) for key, rows in rings.items()}
        projections, counts = [], []
        for inner, _ in parts:
            projection = np.zeros_like(covariance)
            for key, rows in rings.items():
                image = np.einsum("ch,bhij->bcij", inner, images[key])
                known, wanted = (t.reshape(len(rows), -1).T for t in (basis[rows, 0], image))
                projection[np.ix_(rows, rows)] = np.linalg.lstsq(known, wanted, rcond=None)[0]
            projections.append(projection)
            counts.append(round(np.trace(projection)))
        kinds = sum(count > 0 for count in counts)
        for projection, count in zip(projections, counts, strict=True):
            if count:
                covariance += projection * size / (kinds * count * group.order)
    return covariance


def regular_covariance(group: str | Group, kernel_size: int, in_fields: int) -> Tensor:
    """Return the covariance ``[b * G, b * G]`` of the weights in escnn's He-style initialisation.

    escnn draws one weight for each basis filter between irreducible parts of input and output, with
    the variance 1 / (kinds of input part x filters from that kind); here is what that makes of the
    weights of :func:`regular_basis`. Each output channel's filter has an expected squared norm
    of 1.
    """
    covariance = _regular_covariance(Group.from_name(group), kernel_size)
    return torch.from_numpy(covariance / in_fields)


def orbit_basis(group: str | Group, kernel_size: int) -> Tensor:
    """Return the indicator functions of the pixel orbits of a filter under the grid symmetries.

    A filter is unchanged by the group's quarter turns (and mirrors) iff it is a combination of
    these.

    Returns:
        float64 tensor ``[orbits, k, k]`` of zeros and ones; 3 orbits at 3x3 for C4 and D4.
    """
    symmetries = Group.from_name(group).grid_symmetries
    index = torch.arange(kernel_size**2, dtype=torch.float64).reshape(kernel_size, kernel_size)
    images = torch.stack([symmetries.act_on_image(index, g) for g in range(symmetries.order)])
    representative = images.amin(0)
    return torch.stack(
        [(representative == r).double() for r in sorted(set(representative.flatten().tolist()))]
    )
