"""Live models of the published layout, built from ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eqcvt.convert import _escnn
from eqcvt.convert.filters import LARGEST_RESIDUAL, solve
from eqcvt.convert.layout import WEIGHTS, read_layout
from eqcvt.groups import Group, lifting_basis
from eqcvt.models import VisionModel
from eqcvt.nn import ConvAttention, MlpBlock, Stage
from eqcvt.ops import filter_bank


class _ChannelNorm(nn.Module):
    """Layer norm of tokens ``[B, D, H, W]`` over their channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) / (variance + self.eps).sqrt() * self.g + self.b


class _PreNorm(nn.Module):
    """A function of normalised tokens, and the residual."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = _ChannelNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fn(self.norm(x))
        return y


class _Projection(nn.Module):
    """Depthwise convolution, batch norm, pointwise convolution."""

    def __init__(self, dim: int, width: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, stride, padding, groups=dim, bias=False),
            nn.BatchNorm2d(dim),
            nn.Conv2d(dim, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class _Attention(nn.Module):
    """Attention with convolutional projections, one depthwise filter for keys and values."""

    def __init__(self, stage: Stage, dropout: float) -> None:
        super().__init__()
        width = stage.heads * stage.head_dim
        self.heads, self.scale = stage.heads, stage.head_dim**-0.5
        self.to_q = _Projection(stage.dim, width, stage.kernel_size, 1)
        self.to_kv = _Projection(stage.dim, 2 * width, stage.kernel_size, stage.kv_stride)
        self.to_out = nn.Sequential(nn.Conv2d(width, stage.dim, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        # [B, heads * d, H, W] to [B, heads, H * W, d]
        q, k, v = (
            t.unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3)
            for t in (self.to_q(x), *self.to_kv(x).chunk(2, 1))
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * self.scale, -1)
        y = (weights @ v).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        out: Tensor = self.to_out(y)
        return out


class _FeedForward(nn.Module):
    """The MLP of a transformer block."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv2d(hidden, dim, 1),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class _Transformer(nn.Module):
    """The transformer blocks of a stage."""

    def __init__(self, stage: Stage, dropout: float) -> None:
        super().__init__()
        dim, hidden = stage.dim, stage.hidden
        self.layers = nn.ModuleList(
            nn.Sequential(
                _PreNorm(dim, _Attention(stage, dropout)),
                _PreNorm(dim, _FeedForward(dim, hidden, dropout)),
            )
            for _ in range(stage.depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class AuthorModel(nn.Module):
    """A model with the layout, and so the keys, of the published ones.

    Args:
        config: the configuration of one of our models.

    Attributes:
        image_size: height and width of the images.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.image_size: int = config["image_size"]
        self._in_type: Any = None  # escnn's field type of the images
        channels, dropout = config["in_channels"], config["dropout"]
        if config["architecture"] == "EqCvT":
            self._build_front(config)
            channels = config["fields"]
        layers: list[nn.Module] = []
        for stage in map(Stage.of, config["stages"]):
            kernel, stride, dim = stage.embed_kernel, stage.embed_stride, stage.dim
            embed = nn.Conv2d(channels, dim, kernel, stride, stage.padding)
            layers.append(nn.Sequential(embed, _ChannelNorm(dim), _Transformer(stage, dropout)))
            channels = dim
        hidden = config["head_hidden"]
        self.layers = nn.Sequential(
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.BatchNorm1d(hidden),
            nn.ELU(),
            nn.Linear(hidden, config["num_classes"]),
        )

    def _build_front(self, c: dict[str, Any]) -> None:
        if why := _escnn.install():
            raise ImportError(f"to_escnn builds the steerable front of escnn's modules, but {why}")
        from escnn import gspaces
        from escnn import nn as enn

        group = Group.from_name(c["group"])
        space = (gspaces.flipRot2dOnR2 if group.reflections else gspaces.rot2dOnR2)(group.n)
        images = enn.FieldType(space, [space.trivial_repr] * c["in_channels"])
        fields = enn.FieldType(space, [space.regular_repr] * c["fields"])
        self._in_type = images
        self.block1 = enn.SequentialModule(
            enn.MaskModule(images, c["image_size"], margin=c["mask_margin"], sigma=c["mask_sigma"]),
            enn.R2Conv(
                images,
                fields,
                kernel_size=c["kernel_size"],
                padding=c["padding"],
                stride=c["lift_stride"],
                bias=False,
                initialize=False,
                # Modules of one kind share escnn's cached basis tensor, which .to() would replace.
                recompute=True,
            ),
            enn.InnerBatchNorm(fields),
            enn.ReLU(fields, inplace=True),
        )
        self.pool1 = enn.PointwiseAvgPoolAntialiased(
            fields, sigma=c["blur_sigma"], stride=c["blur_stride"], padding=0
        )
        self.gpool = enn.GroupPooling(fields)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        if self._in_type is not None:
            # escnn's group pooling gives float32 whatever it is given.
            x = self.gpool(self.pool1(self.block1(self._in_type(x)))).tensor.to(x.dtype)
        logits: Tensor = self.layers(x)
        return logits


def _check_exportable(model: VisionModel) -> None:
    """Raise a ValueError if the published layout has no place for a setting."""
    config, reasons = model.config, model.changed_norms(eps=1e-5, momentum=0.1)
    if config["head_hidden"] is None:
        reasons.append("head_hidden=None")
    if config["num_classes"] == 0:
        reasons.append("num_classes=0")
    if config["architecture"] == "EqCvT":
        if config["invariance"] != "front":
            reasons.append(f"invariance={config['invariance']!r}")
        if config["lift_depth"] != 1:
            reasons.append(f"lift_depth={config['lift_depth']}")
        if not config["mask"]:
            reasons.append("mask=False")
        if config["blur_sigma"] is None:
            reasons.append("blur_sigma=None")
    for s, stage in enumerate(map(Stage.of, config["stages"])):
        if stage.separate_kv:
            reasons.append(f"separate_kv of stage {s}")
        if stage.projection_bias:
            reasons.append(f"projection_bias of stage {s}")
        if stage.padding != stage.embed_kernel // 2:
            reasons.append(f"embed_padding={stage.padding} of stage {s}")
    if reasons:
        raise ValueError(
            f"the published layout has no place for {', '.join(reasons)}; it holds "
            f"invariance='front', lift_depth=1, mask and blur, shared key and value filters "
            f"without biases, norms of eps=1e-05 and momentum=0.1, and a head with a hidden layer"
        )


@torch.no_grad()
def export_model(model: VisionModel) -> AuthorModel:
    """Return the model of the published layout with the weights of ``model``."""
    _check_exportable(model)
    state = model.state_dict()
    parameter = next(model.parameters())
    author = AuthorModel(model.config).to(device=parameter.device, dtype=parameter.dtype)
    target = author.state_dict()
    layout = read_layout(dict(target), "the exported model")
    if layout.order is not None:
        config = model.config
        basis = lifting_basis(config["group"], config["kernel_size"])
        bank = filter_bank(state["lift.0.weight"].double().cpu(), basis)
        assert layout.sampled_basis is not None
        sampled = target[layout.sampled_basis].double().cpu()
        sampled = sampled.reshape(*sampled.shape[:2], *bank.shape[-2:])
        weight, residual = solve(bank, sampled)
        if not residual <= LARGEST_RESIDUAL:
            raise ValueError(
                f"escnn's basis of {config['group']} does not express our filters (relative "
                f"residual {residual:.2g}); this escnn differs from the version known here"
            )
        target[WEIGHTS].copy_(weight.flatten())
    for key, entry in layout.entries().items():
        parts = [state[name] for name in entry.ours]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        target[key].copy_(value.reshape(target[key].shape))
    # Entering either mode brings escnn's stored filter up to date: dropped, or expanded.
    author.train()
    author.train(model.training)
    for theirs, ours in layout.modes().items():
        part, given = author.get_submodule(theirs), model.get_submodule(ours)
        part.training = given.training
        if isinstance(part, nn.Dropout) and isinstance(given, (ConvAttention, MlpBlock)):
            part.p = given.dropout
    return author
