"""From a published state dict to a model of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eqcvt import _check
from eqcvt.convert.filters import fit_blur, fit_mask, solve_front
from eqcvt.convert.layout import Layout
from eqcvt.models import CvT, EqCvT
from eqcvt.nn import Stage

_HEAD_DIM, _IMAGE_SIZE = 64, 129


@dataclass(frozen=True)
class Settings:
    """What the shapes of a state dict do not tell, with the published models' values.

    Args:
        image_size: see :func:`eqcvt.convert.load_published`, as the next five.
        heads: see there.
        head_dim: see there.
        embed_stride: see there.
        kv_stride: see there.
        dropout: see there.
        padding: zeros around the input of the steerable convolution.
        lift_stride: its step.
        blur_stride: step of the blur.
    """

    image_size: int | None = None
    heads: int | Sequence[int] | None = None
    head_dim: int | None = None
    embed_stride: int | Sequence[int] | None = None
    kv_stride: int | Sequence[int] = 2
    dropout: float = 0.1
    padding: int = 1
    lift_stride: int = 1
    blur_stride: int = 1


def build_model(
    state: dict[str, Tensor], layout: Layout, settings: Settings, source: str
) -> EqCvT | CvT:
    """Build the model that a state dict of known layout belongs to, and load it.

    Args:
        state: a state dict with the keys that ``layout`` names.
        layout: from :func:`eqcvt.convert.layout.read_layout`.
        settings: what its shapes do not tell.
        source: what errors call it.

    Raises:
        ValueError: if shapes or settings do not fit.
    """
    hidden, _, classifier = layout.head
    (head_hidden, _), (num_classes, _) = (
        _dims(state, f"{prefix}.weight", "E D", source) for prefix in (hidden, classifier)
    )
    stages = _stages(state, layout, settings, source)
    channels = _dims(state, "layers.0.0.weight", "D C k k", source)[1]
    model: EqCvT | CvT
    if layout.order is None:
        residual = 0.0
        model = CvT(
            channels,
            num_classes,
            _IMAGE_SIZE if settings.image_size is None else settings.image_size,
            stages=stages,
            head_hidden=head_hidden,
            dropout=settings.dropout,
        )
    else:
        size, margin, sigma = fit_mask(state, source)
        if settings.image_size not in (None, size):
            raise ValueError(
                f"{source}: image_size={settings.image_size} was asked for, but its mask is for "
                f"images of {size}x{size} pixels"
            )
        solution = solve_front(state, layout, source)
        residual = solution.residual
        model = EqCvT(
            solution.weight.shape[1],
            num_classes,
            size,
            solution.group.name,
            len(solution.weight),
            kernel_size=solution.kernel_size,
            padding=settings.padding,
            lift_stride=settings.lift_stride,
            mask_margin=margin,
            mask_sigma=sigma,
            blur_sigma=fit_blur(state, source),
            blur_stride=settings.blur_stride,
            stages=stages,
            head_hidden=head_hidden,
            dropout=settings.dropout,
        )
        model.state_dict()["lift.0.weight"].copy_(solution.weight)
    _copy(state, layout, model, source)
    model.conversion_residual = residual
    return model


def _copy(state: dict[str, Tensor], layout: Layout, model: EqCvT | CvT, source: str) -> None:
    """Copy every entry of the table into the model."""
    ours = model.state_dict()
    for key, entry in layout.entries().items():
        targets = [ours[name] for name in entry.ours]
        value = state[key]
        shape = entry.shape([tuple(t.shape) for t in targets])
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{source}: {key!r} has the shape {list(value.shape)}, but {list(shape)} fits to "
                f"the other entries"
            )
        flat = value.reshape(len(targets), -1)
        for target, part in zip(targets, flat, strict=True):
            target.copy_(part.reshape(target.shape))


def _stages(
    state: dict[str, Tensor], layout: Layout, settings: Settings, source: str
) -> list[Stage]:
    """Return the stages, their sizes read from shapes."""
    count = len(layout.depths)
    strides = settings.embed_stride
    if strides is None:
        strides = [4 if layout.order is None and s == 0 else 2 for s in range(count)]
    embed_strides = _per_stage("embed_stride", strides, count)
    kv_strides = _per_stage("kv_stride", settings.kv_stride, count)
    heads = None if settings.heads is None else _per_stage("heads", settings.heads, count)
    wanted = None if settings.head_dim is None else _check.integer("head_dim", settings.head_dim)
    stages = []
    for s, depth in enumerate(layout.depths):
        block = f"layers.{s}.2.layers.0"
        dim, _, embed_kernel, _ = _dims(state, f"layers.{s}.0.weight", "D C k k", source)
        kernel = _dims(state, f"{block}.0.fn.to_q.net.0.weight", "D 1 k k", source)[2]
        width = _dims(state, f"{block}.0.fn.to_q.net.2.weight", "E D 1 1", source)[0]
        hidden = _dims(state, f"{block}.1.fn.net.0.weight", "E D 1 1", source)[0]
        if heads is None:
            head_dim = wanted or _HEAD_DIM
            split = max(width // head_dim, 1)
        else:
            split = heads[s]
            head_dim = wanted or width // split
        if split * head_dim != width:
            raise ValueError(
                f"{source}: the {width} attention channels of stage {s} are not "
                f"{split} heads of {head_dim}; give heads= or head_dim= that divide them"
            )
        stages.append(
            Stage(
                dim=dim,
                depth=depth,
                heads=split,
                head_dim=head_dim,
                embed_kernel=embed_kernel,
                embed_stride=embed_strides[s],
                mlp_ratio=hidden / dim,
                kernel_size=kernel,
                kv_stride=kv_strides[s],
            )
        )
    return stages


def _per_stage(name: str, value: int | Sequence[int], count: int) -> list[int]:
    """Return one value per stage."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"{name} must be one number or one for each of {count} stages, got {value}"
        )
    return [_check.integer(name, v) for v in values]


def _dims(state: dict[str, Tensor], key: str, form: str, source: str) -> torch.Size:
    """Return the shape of an entry, which has the axes that ``form`` names."""
    shape = state[key].shape
    if len(shape) != len(form.split()):
        raise ValueError(
            f"{source}: {key!r} has the shape {list(shape)}, expected [{', '.join(form.split())}]"
        )
    return shape
