"""What a trained model predicts, how good that is, and how much it changes when the image turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eqcvt.data import Batches, LensingImages, to_unit
from eqcvt.data import rotate as interpolated_rotation
from eqcvt.groups import Group
from eqcvt.models import evaluating
from eqcvt.train.distributed import resolve_device
from eqcvt.train.metrics import classification

ANGLES = tuple(45.0 * i for i in range(8))
# None of these moves pixels exactly: all of them smooth the noise alike.
BETWEEN = tuple(angle + 22.5 for angle in ANGLES)


def evaluate(
    model: nn.Module,
    data: LensingImages,
    *,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    rotations: bool = True,
) -> dict[str, Any]:
    """Measure accuracy, calibration and, if asked, how far the logits move under rotations.

    Args:
        model: maps [B, C, H, W] to logits [B, K]; evaluated in its own precision.
        data: images and labels.
        device: where to compute; the model is moved there.
        batch_size: images per forward pass.
        rotations: add the key ``rotation``; costs 16 forward passes and one for each
            mirror that the group shares with the pixel grid.

    Returns:
        A JSON-able dictionary: what ``metrics.classification`` and ``rotation_robustness`` return.

    Raises:
        ValueError: when the images do not fit the model, or there are none; when logits are NaN.
    """
    logits = predict_logits(model, data, device=device, batch_size=batch_size)
    labels = torch.from_numpy(data.labels).long()
    _same_classes(logits, data)
    result = classification(logits, labels, data.classes)
    if rotations:
        result["rotation"] = rotation_robustness(model, data, device=device, batch_size=batch_size)
    return result


def predict_logits(
    model: nn.Module,
    data: LensingImages,
    *,
    device: str | torch.device = "auto",
    batch_size: int = 64,
) -> Tensor:
    """The logits of every image, [N, K] on the CPU, in the order of ``data``.

    Raises:
        ValueError: when the images do not fit the model, or there are none.
    """
    batches = _batches(model, data, device, batch_size)
    with evaluating(model):
        return torch.cat([model(model_input(model, images)).cpu() for images, _ in batches])


def logits_over_angles(model: nn.Module, images: Tensor, angles_degrees: Sequence[float]) -> Tensor:
    """The logits of turned images.

    Args:
        model: maps [B, C, H, W] to [B, K].
        images: [B, H, W] or [B, C, H, W] as stored, on the model's device.
        angles_degrees: counter-clockwise angles A.

    Returns:
        [A, B, K]. Multiples of 90 degrees move pixels exactly; others interpolate bilinearly.
    """
    with evaluating(model):
        x = model_input(model, images)
        return torch.stack([model(rotate(x, angle)) for angle in angles_degrees])


def rotation_robustness(
    model: nn.Module,
    data: LensingImages,
    *,
    device: str | torch.device = "auto",
    batch_size: int = 64,
) -> dict[str, Any]:
    """How far the logits move when the images turn.

    std_45 is the poster's figure: for every image and logit the standard deviation (divided by 8)
    over the rotations by multiples of 45 degrees, averaged over images and logits. Four of them
    move pixels exactly, the others interpolate, which takes a third off the noise of the pixels: a
    model that looks at the noise moves for that reason alone. std_22 is the same over rotations by
    22.5 degrees and multiples of 45 more, which all interpolate alike, and accuracy_22 the share of
    images so turned that are classified right. std_group is the standard deviation over the
    symmetries of the pixel grid in the model's group: its turns by multiples of 90 degrees and, for
    D groups, its mirrors; residual_group is the largest |logit(g x) - logit(x)| over them. A model
    without a group is measured as C4.

    Returns:
        std_45, std_22, accuracy_22, std_group, residual_group, angles (8, degrees), logits_mean
        ([8][K], mean over the images at each angle), group.
    """
    batches = _batches(model, data, device, batch_size)
    group = str(getattr(model, "config", {}).get("group", "C4"))
    symmetries = Group.from_name(group).grid_symmetries
    mirrors = range(symmetries.n, symmetries.order)
    parts: list[Tensor] = []
    between: list[Tensor] = []
    mirrored: list[Tensor] = []
    with evaluating(model):
        for images, _ in batches:
            x = model_input(model, images)
            for angles, into in ((ANGLES, parts), (BETWEEN, between)):
                into.append(torch.stack([model(rotate(x, angle)).double() for angle in angles]))
            if mirrors:
                flipped = [symmetries.act_on_image(x, element) for element in mirrors]
                mirrored.append(torch.stack([model(image).double() for image in flipped]))
    turned = torch.cat(parts, dim=1)
    halfway = torch.cat(between, dim=1)
    right = halfway.argmax(dim=-1) == torch.from_numpy(data.labels).to(halfway.device)
    orbit = turned[:: len(ANGLES) // symmetries.n]
    if mirrored:
        orbit = torch.cat([orbit, torch.cat(mirrored, dim=1)])
    return {
        "std_45": float(turned.std(dim=0, correction=0).mean()),
        "std_22": float(halfway.std(dim=0, correction=0).mean()),
        "accuracy_22": float(right.double().mean()),
        "std_group": float(orbit.std(dim=0, correction=0).mean()),
        "residual_group": float((orbit - orbit[0]).abs().max()),
        "angles": list(ANGLES),
        "logits_mean": turned.mean(dim=1).tolist(),
        "group": group,
    }


def rotate(x: Tensor, angle: float) -> Tensor:
    """Turn [B, C, H, W] counter-clockwise about the centre; what comes from outside is 0."""
    if angle % 90 == 0 and (angle % 180 == 0 or x.shape[-1] == x.shape[-2]):
        return x.rot90(int(angle // 90) % 4, (-2, -1))
    degrees = torch.full((len(x),), float(angle), dtype=x.dtype, device=x.device)
    return interpolated_rotation(x, degrees, supersample=1)


def model_input(model: nn.Module, images: Tensor) -> Tensor:
    """Stored images as the model takes them: [B, C, H, W] in [0, 1], in the model's dtype."""
    first = next(model.parameters(), None)
    return to_unit(images).to(torch.float32 if first is None else first.dtype)


def check_fit(
    model: nn.Module, data: LensingImages, name: str = "the model", *, classes: bool = True
) -> None:
    """Refuse images whose channels, size or, if asked, classes are not the model's.

    Raises:
        ValueError: naming both.
    """
    config = getattr(model, "config", {})
    side = config.get("image_size")
    for what, given, taken in (
        ("channels", data.channels, config.get("in_channels")),
        ("classes", len(data.classes), config.get("num_classes") if classes else None),
        ("pixels", "x".join(map(str, data.size)), side and f"{side}x{side}"),
    ):
        if taken not in (None, given):
            raise ValueError(f"{name} takes images with {taken} {what}, the data have {given}")


def _batches(
    model: nn.Module, data: LensingImages, device: str | torch.device, batch_size: int
) -> Batches:
    if not isinstance(data, LensingImages):
        raise TypeError(
            f"what is evaluated is a LensingImages, got {type(data).__name__}: "
            "eqcvt.data.load(path) reads one"
        )
    if len(data) == 0:
        raise ValueError("there are no images to evaluate")
    check_fit(model, data, classes=False)
    chosen = resolve_device(device)
    model.to(chosen)
    return Batches(data, batch_size, device=chosen)


def _same_classes(logits: Tensor, data: LensingImages) -> None:
    if logits.shape[1] != len(data.classes):
        raise ValueError(
            f"the model has {logits.shape[1]} outputs, the data has {len(data.classes)} classes "
            f"({', '.join(data.classes)})"
        )
