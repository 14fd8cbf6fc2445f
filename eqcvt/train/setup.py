"""What a run is made of: data, model, optimizer, TensorBoard's writer."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim import Adam, AdamW, Optimizer

from eqcvt.data import LensingImages, load, split
from eqcvt.data.folders import SPLITS
from eqcvt.models import VisionModel, create_model
from eqcvt.nn import set_backend
from eqcvt.train.config import SPLIT_SEED, TrainConfig


def load_data(config: TrainConfig) -> tuple[LensingImages, LensingImages]:
    """Training and validation images.

    Raises:
        FileNotFoundError, ValueError: from reading, when the two sets do not fit each other or
            share an image, or when a class has no training images or is the only one.
    """
    root, drawn = Path(config.data), False
    if config.val_data is not None:
        data, held_out = load(config.data), load(config.val_data)
    elif all((root / part).exists() or (root / f"{part}.npz").exists() for part in SPLITS):
        data, held_out = load(root, "train"), load(root, "val")
    else:
        data, held_out = split(load(config.data), config.val_fraction, SPLIT_SEED)
        drawn = True
    for name, part in (("training", data), ("validation", held_out)):
        if len(part) == 0:
            raise ValueError(f"there are no {name} images (data={config.data!r})")
    for what in ("classes", "channels", "size"):
        ours, theirs = getattr(data, what), getattr(held_out, what)
        if ours != theirs:
            raise ValueError(
                f"training and validation images differ in {what}: {ours} and {theirs}"
            )
    lacking = sorted(set(range(len(data.classes))) - set(np.unique(data.labels).tolist()))
    if lacking or len(data.classes) < 2:
        names = ", ".join(repr(data.classes[label]) for label in lacking) or "a second class"
        raise ValueError(f"there are no training images of {names} (data={config.data!r})")
    if twice := int(np.isin(held_out.hashes, data.hashes).sum()):
        text = f"{twice} of the {len(held_out)} validation images are training images too"
        if not drawn:
            where = f"data={config.data!r}, val_data={config.val_data!r}"
            raise ValueError(f"{text} ({where}): leave them out of one of the two")
        warnings.warn(f"{text}: {config.data} holds images twice", stacklevel=2)
    return data, held_out


def fingerprint(*sets: LensingImages) -> str:
    """A hash of images, labels and class names, to know the data again when a run goes on."""
    digest = hashlib.blake2b(digest_size=16)
    for data in sets:
        digest.update(repr((data.images.shape, str(data.images.dtype), data.classes)).encode())
        digest.update(np.ascontiguousarray(data.images).data)
        digest.update(np.ascontiguousarray(data.labels).data)
    return digest.hexdigest()


def make_model(config: TrainConfig, data: LensingImages) -> VisionModel:
    """The model of the configuration, with channels, size and classes of the data.

    Its ops take the backend in force, as those of ``eqcvt.fast``.

    Raises:
        TypeError, ValueError: when ``model_kwargs`` do not fit the model or contradict the data.
    """
    height, width = data.size
    if height != width:
        raise ValueError(f"the models take square images, got {height}x{width} pixels")
    known = {
        "in_channels": data.channels,
        "num_classes": len(data.classes),
        "image_size": height,
    }
    for key, value in known.items():
        if config.model_kwargs.get(key, value) != value:
            raise ValueError(
                f"model_kwargs says {key}={config.model_kwargs[key]!r}, the data has {value!r}"
            )
    model = create_model(config.model, **{**config.model_kwargs, **known})
    set_backend(model, None)
    return model


def make_optimizer(
    model: VisionModel, config: TrainConfig, *, capturable: bool = False
) -> Optimizer:
    """Adam with L2 on every weight, or AdamW without decay for ``model.no_weight_decay()``.

    Args:
        model: on its device; on a GPU all weights are updated by one kernel.
        config: the settings.
        capturable: whether a CUDA graph is to hold its steps.
    """
    fused = capturable or next(model.parameters()).is_cuda
    kind: dict[str, Any] = {"fused": fused or None, "capturable": capturable}
    if config.optimizer == "adam":
        decay = config.weight_decay
        return Adam(model.parameters(), config.lr, config.betas, weight_decay=decay, **kind)
    spared = model.no_weight_decay()
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if name not in spared]},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, config.lr, config.betas, weight_decay=config.weight_decay, **kind)


def summary_writer() -> Any:
    """TensorBoard's writer, a class to call with a folder.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'tensorboard=True needs TensorBoard: pip install "eqcvt[tensorboard]"'
        ) from error
    return SummaryWriter
