"""What a live model of the published layout does beyond what its state dict tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eqcvt.convert.author import AuthorModel
from eqcvt.convert.build import Settings
from eqcvt.convert.layout import Layout

# The front's modules, named as in escnn and e2cnn, with what ours cannot vary.
_FRONT: dict[str, tuple[str, dict[str, object]]] = {
    "block1.0": ("MaskModule", {}),
    "block1.1": ("R2Conv", {"dilation": 1, "groups": 1, "padding_mode": "zeros"}),
    "block1.2": ("InnerBatchNorm", {}),
    "block1.3": ("ReLU", {}),
    "pool1": ("PointwiseAvgPoolAntialiased", {"padding": 0}),
    "gpool": ("GroupPooling", {}),
}
_ATTENTION = re.compile(r"layers\.\d+\.2\.layers\.\d+\.0\.fn\.\w+")
_FREE = ("training", "inplace")


def _part(module: nn.Module, path: str, source: str) -> nn.Module:
    if path == "pool1" and "0" in getattr(module, "pool1", nn.Module())._modules:
        path = "pool1.0"  # in a container of its own
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{source} has no module {path!r}") from None


def _plain(value: object) -> object:
    """Return the one number of a pair, and anything else as it is."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def live_settings(
    module: nn.Module, layout: Layout, image_size: int | None, source: str
) -> Settings:
    """Read what the state dict does not tell from the modules of a live model.

    Args:
        module: a model of the published layout.
        layout: its layout.
        image_size: what the caller gave; None for the module's attribute, if it has one.
        source: what errors call it.

    Raises:
        ValueError: if blocks differ in what our models have one value for.
    """

    def number(path: str, attribute: str) -> int:
        value = _plain(getattr(_part(module, path, source), attribute, None))
        if not isinstance(value, int):
            raise ValueError(f"{source}: {path}.{attribute}={value!r} is not one number")
        return value

    front: dict[str, int] = {}
    if layout.order is not None:
        front = {
            "padding": number("block1.1", "padding"),
            "lift_stride": number("block1.1", "stride"),
            "blur_stride": number("pool1", "stride"),
        }
    elif image_size is None:
        image_size = getattr(module, "image_size", None)
    embed_stride, kv_stride, heads, rates = [], [], [], set()
    for s, depth in enumerate(layout.depths):
        embed_stride.append(number(f"layers.{s}.0", "stride"))
        for i in range(depth):
            block = f"layers.{s}.2.layers.{i}"
            attention = _part(module, f"{block}.0.fn", source)
            stride = number(f"{block}.0.fn.to_kv.net.0", "stride")
            width = len(module.get_parameter(f"{block}.0.fn.to_q.net.2.weight"))
            count = int(getattr(attention, "heads", max(width // 64, 1)))
            if i == 0:
                kv_stride.append(stride)
                heads.append(count)
            elif (stride, count) != (kv_stride[s], heads[s]):
                raise ValueError(f"{source}: {block} has other strides or heads than block 0")
            paths = (f"{block}.0.fn.to_out.1", f"{block}.1.fn.net.2", f"{block}.1.fn.net.4")
            drops = [_part(module, path, source) for path in paths]
            rates |= {float(getattr(drop, "p", 0.0)) for drop in drops}
            if len({drop.training for drop in drops[1:] if getattr(drop, "p", 0.0)}) > 1:
                raise ValueError(
                    f"{source}: {paths[1]} and {paths[2]} are one dropout in ours, and must be in "
                    f"one mode, got training={drops[1].training} and {drops[2].training}"
                )
    if len(rates) != 1:
        raise ValueError(f"{source} has several dropout rates, {sorted(rates)}; ours have one")
    return Settings(
        image_size=image_size,
        heads=heads,
        embed_stride=embed_stride,
        kv_stride=kv_stride,
        dropout=rates.pop(),
        **front,
    )


def check_modules(module: nn.Module, layout: Layout, config: dict[str, Any], source: str) -> None:
    """Raise a ValueError if a module of a live model computes something else than the layout's.

    Modules of torch are held to those that :func:`eqcvt.convert.to_escnn` would build, setting by
    setting. Of the model's own classes only settings are seen, not what their forward does.

    Args:
        module: a model of the published layout.
        layout: its layout.
        config: the configuration of our model made of it.
        source: what errors call it.
    """
    channels = config.get("fields", config["in_channels"])
    with torch.device("meta"):  # nothing is allocated, and no random number drawn
        twin = AuthorModel({**config, "architecture": "CvT", "in_channels": channels})
        parts = dict(twin.layers.named_modules(prefix="layers"))
        if layout.order is not None:
            parts[f"block1.2.batch_norm_[{layout.order}]"] = nn.BatchNorm3d(channels)
    given = {path: _part(module, path, source) for path in parts}
    for path, part in parts.items():
        if not _runs_as(given[path], part):
            raise ValueError(
                f"{source}: {path} must be {part} with torch's own forward, got {given[path]}"
            )
        _demand(given[path], path, vars(part), source)
    # A module may have two names, as one Dropout for all.
    inner = given["layers"].named_modules(prefix="layers", remove_duplicate=False)
    more = [(path, part) for path, part in inner if not part._modules]
    if layout.order is not None:
        for path, (kind, settings) in _FRONT.items():
            part = _part(module, path, source)
            forward = getattr(part.forward, "__func__", None)
            name = getattr(forward, "__qualname__", "").removesuffix(".forward").removesuffix("2D")
            if name != kind or forward.__module__.partition(".")[0] not in ("escnn", "e2cnn"):
                raise ValueError(f"{source}: {path} must be escnn's or e2cnn's {kind}, got {part}")
            _demand(part, path, settings, source)
        for path in ("block1", "pool1"):
            children = module.get_submodule(path)._modules
            more += [(f"{path}.{name}", child) for name, child in children.items() if child]
    for path, part in more:
        if path not in {"pool1.0", *_FRONT, *parts} and not _is_idle(part, path):
            raise ValueError(
                f"{source}: {path} is {part}, and the published layout has nothing there; take it "
                f"out, or put nn.Identity() in its place"
            )


def _runs_as(given: nn.Module, wanted: nn.Module) -> bool:
    """Whether a module runs the forward of one of torch's; containers and own classes go unseen."""
    if wanted._modules or not type(wanted).__module__.startswith("torch."):
        return True
    if isinstance(wanted, nn.Dropout) and type(given) is nn.Identity:
        return True
    if isinstance(wanted, nn.Flatten) and type(given).__module__.startswith("einops."):
        return True
    if isinstance(given, nn.SyncBatchNorm) and isinstance(wanted, nn.BatchNorm2d | nn.BatchNorm1d):
        return not given.training  # when it is a batch norm like any other
    return getattr(given.forward, "__func__", None) is type(wanted).forward


def _demand(given: nn.Module, path: str, settings: Mapping[str, object], source: str) -> None:
    """Raise a ValueError if a module has another value of a setting that it has."""
    for name, wanted in settings.items():
        value = getattr(given, name, wanted)
        if not name.startswith("_") and name not in _FREE and _plain(value) != _plain(wanted):
            raise ValueError(
                f"{source}: {path}.{name} must be {_plain(wanted)!r}, got {_plain(value)!r}"
            )


def _is_idle(part: nn.Module, path: str) -> bool:
    """Whether a module beyond the layout's changes nothing, or is attention's softmax."""
    if isinstance(part, nn.Softmax):
        return part.dim in (-1, 3) and _ATTENTION.fullmatch(path) is not None
    dropping = isinstance(part, nn.Dropout) and part.p > 0 and part.training
    return isinstance(part, nn.Identity | nn.Dropout) and not dropping
