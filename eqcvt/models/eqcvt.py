"""EqCvT: a steerable front before a Convolutional vision Transformer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from eqcvt import _check
from eqcvt.groups import Group
from eqcvt.models._base import VisionModel
from eqcvt.nn import Stage, SteerableLift
from eqcvt.ops import blur_line, conv_size

INVARIANCES = ("front", "exact")
AUTHOR_STAGES = (Stage(dim=32, depth=2, heads=3, mlp_ratio=2),)


class EqCvT(VisionModel):
    """The rotation-equivariant Convolutional vision Transformer, reference implementation.

    Input mask, steerable convolution, inner batch norm, ReLU, antialiasing blur and group pooling;
    then the stages of a CvT, global average and classifier. With the defaults it is the published
    model: 65,170 parameters at three channels, 64,810 at one.

    Transformation: the front's feature maps turn with the image, exactly for the turns and mirrors
    that the group shares with the pixel grid and up to interpolation for others. With
    ``invariance="exact"`` all filters behind it are constant on the orbits of those symmetries, and
    the logits do not change at all under them.

    Args:
        in_channels: image channels.
        num_classes: classes; 0 for features.
        image_size: height and width in pixels.
        group: ``"C4"``, ``"D4"``, ``"C8"``, ``"D8"`` or any C_n, D_n of at most 16 elements.
        fields: regular fields of the front.
        invariance: ``"front"`` (the published model) or ``"exact"``.
        kernel_size: steerable filter size in pixels, 3 to 11.
        padding: zeros around the input of each steerable convolution.
        lift_depth: steerable convolutions in front, the first lifting, the others regular to
            regular.
        lift_stride: step of the first one.
        mask: whether the image is multiplied by a soft circular mask.
        mask_margin: its margin in percent of half the image size.
        mask_sigma: its fall-off in pixels.
        blur_sigma: standard deviation of the antialiasing blur in pixels; None for none.
        blur_stride: step of the blur.
        stages: the CvT's stages, each a :class:`eqcvt.nn.Stage` or a dictionary of its fields.
        head_hidden: width of the classifier's hidden layer; None for layer norm and one linear map.
        dropout: dropout probability in the transformer blocks.

    Raises:
        ValueError: on a value that is not allowed, or with ``"exact"`` an image size at which a
            strided layer would break the symmetry; the nearest sizes are named.
        TypeError: on an argument of the wrong type.

    Warns:
        UserWarning: with ``"front"``, if a strided steerable layer breaks the front's symmetry.

    Source: the model of the poster "EqCvT"; Wu et al., arXiv:2103.15808; Weiler and Cesa,
    arXiv:1911.08251.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 2,
        image_size: int = 129,
        group: str = "C4",
        fields: int = 10,
        invariance: str = "front",
        *,
        kernel_size: int = 7,
        padding: int = 1,
        lift_depth: int = 1,
        lift_stride: int = 1,
        mask: bool = True,
        mask_margin: float = 1.0,
        mask_sigma: float = 2.0,
        blur_sigma: float | None = 0.66,
        blur_stride: int = 1,
        stages: Sequence[Stage | dict[str, Any]] = AUTHOR_STAGES,
        head_hidden: int | None = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.group = Group.from_name(group)
        _check.choice("invariance", invariance, INVARIANCES)
        for name, value in (
            ("fields", fields),
            ("kernel_size", kernel_size),
            ("lift_depth", lift_depth),
            ("lift_stride", lift_stride),
            ("blur_stride", blur_stride),
        ):
            _check.integer(name, value)
        _check.integer("padding", padding, 0)
        _check.boolean("mask", mask)
        for name, real in (("mask_margin", mask_margin), ("mask_sigma", mask_sigma)):
            _check.number(name, real)
        if blur_sigma is not None and not _check.number("blur_sigma", blur_sigma) > 0:
            raise ValueError(f"blur_sigma must be positive or None, got {blur_sigma}")
        if not mask_sigma > 0 or not 0 <= mask_margin < 100:
            raise ValueError(
                f"mask_sigma must be positive and mask_margin in [0, 100) percent, "
                f"got {mask_sigma} and {mask_margin}"
            )
        self._configure(
            in_channels=in_channels,
            num_classes=num_classes,
            image_size=image_size,
            group=self.group.name,
            fields=fields,
            invariance=invariance,
            kernel_size=kernel_size,
            padding=padding,
            lift_depth=lift_depth,
            lift_stride=lift_stride,
            mask=mask,
            mask_margin=mask_margin,
            mask_sigma=mask_sigma,
            blur_sigma=blur_sigma,
            blur_stride=blur_stride,
            stages=None,
            head_hidden=head_hidden,
            dropout=dropout,
        )
        tokens = self._stages(stages)
        size = self._check_size(tokens)
        self.lift = nn.ModuleList()
        for index in range(lift_depth):
            last = index == lift_depth - 1
            self.lift.append(
                SteerableLift(
                    self.group,
                    fields if index else in_channels,
                    fields,
                    kernel_size,
                    stride=1 if index else lift_stride,
                    padding=padding,
                    regular=index > 0,
                    mask_size=image_size if mask and not index else None,
                    mask_margin=mask_margin,
                    mask_sigma=mask_sigma,
                    blur_sigma=blur_sigma if last else None,
                    blur_stride=blur_stride,
                    pool=last,
                )
            )
        self._build(fields, size, tokens, self.group if invariance == "exact" else None)

    def _front_steps(self) -> list[tuple[int, int, int]]:
        c = self.config
        steps = [
            (c["kernel_size"], c["lift_stride"] if index == 0 else 1, c["padding"])
            for index in range(c["lift_depth"])
        ]
        if c["blur_sigma"] is not None:
            steps.append((len(blur_line(c["blur_sigma"])), c["blur_stride"], 0))
        return steps

    def _check_size(self, stages: list[Stage]) -> int:
        """Return the size of the pooled maps; raise or warn where a stride breaks the symmetry."""
        size, invariance = self.config["image_size"], self.config["invariance"]
        front = self._front_steps()
        after = _walk(size, front)
        if after is None:
            smallest = next(s for s in range(size + 1, size + 10_000) if _walk(s, front))
            raise ValueError(
                f"image_size={size} is too small for the steerable front; "
                f"the smallest is {smallest}"
            )
        rest = []
        for stage in stages:
            rest.append((stage.embed_kernel, stage.embed_stride, stage.padding))
            rest.append((0, stage.kv_stride, 0))
        steps = front if invariance == "front" else front + rest
        if invariance == "exact" and self.group.grid_symmetries.order == 1:
            raise ValueError(
                f"invariance='exact' needs a group that shares turns or mirrors with the pixel "
                f"grid, {self.group.name} shares none; the nearest are 'C4' and 'D1'"
            )
        if _keeps_grid(size, steps):
            return after
        good = [s for d in range(1, 65) for s in (size - d, size + d) if s > 0]
        convolutions = front + [step for step in rest if step[0]]
        near = sorted([s for s in good if _walk(s, convolutions) and _keeps_grid(s, steps)][:4])
        nearest = f"the nearest sizes that keep it are {', '.join(map(str, near))}" if near else ""
        part = "the steerable front" if invariance == "front" else "the network"
        message = (
            f"at image_size={size} a strided layer of {part} breaks the symmetry of "
            f"{self.group.name}, because its stride does not divide what it walks over"
        )
        if invariance == "exact":
            raise ValueError(f"{message}; {nearest or 'change the strides or kernel sizes'}")
        warnings.warn(f"{message}; {nearest or 'change the strides'}", UserWarning, stacklevel=3)
        return after

    def front(self, x: Tensor) -> Tensor:
        """Return the steerable front's maps ``[B, fields, H', W']``, which turn with the image."""
        self._check_input(x)
        for block in self.lift:
            x = block(x)
        return x


def _walk(size: int, steps: list[tuple[int, int, int]]) -> int | None:
    """Return the size after convolutions, or None if nothing is left."""
    for kernel, stride, padding in steps:
        size = conv_size(size, kernel, stride, padding)
        if size < 1:
            return None
    return size


def _keeps_grid(size: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether every stride divides what it walks over; kernel 0 stands for a strided projection."""
    for kernel, stride, padding in steps:
        if kernel == 0:  # keys and values: centred odd filters, and the queries' grid goes on
            if (size - 1) % stride:
                return False
            continue
        if (size + 2 * padding - kernel) % stride:
            return False
        size = conv_size(size, kernel, stride, padding)
    return True
