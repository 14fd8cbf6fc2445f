"""CvT's modules: token embedding, attention with convolutional projections, MLP block, stage."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from eqcvt import _check, ops
from eqcvt.groups import Group
from eqcvt.nn.filters import Filters
from eqcvt.nn.norm import BatchNorm, LayerNorm, track
from eqcvt.nn.parts import check_parts


@dataclass(frozen=True)
class Stage:
    """One stage of a CvT: its token embedding and its transformer blocks.

    Args:
        dim: channels of a token.
        depth: transformer blocks.
        heads: attention heads.
        head_dim: channels of a head.
        embed_kernel: filter size of the token embedding in pixels.
        embed_stride: its step.
        embed_padding: zeros it adds on each side; None for ``embed_kernel // 2``.
        mlp_ratio: hidden channels of the MLP over ``dim``, rounded to a whole number of channels.
        kernel_size: filter size of the depthwise projections, odd.
        kv_stride: step of the key and value projections.
        separate_kv: whether keys and values have a depthwise filter each (the original CvT).
        projection_bias: whether the query, key and value products have biases (the original CvT).
    """

    dim: int
    depth: int = 1
    heads: int = 1
    head_dim: int = 64
    embed_kernel: int = 3
    embed_stride: int = 2
    embed_padding: int | None = None
    mlp_ratio: float = 4.0
    kernel_size: int = 3
    kv_stride: int = 2
    separate_kv: bool = False
    projection_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "head_dim", "embed_kernel", "embed_stride"):
            _check.integer(f"stage {name}", getattr(self, name))
        _check.integer("stage kv_stride", self.kv_stride)
        if _check.integer("stage kernel_size", self.kernel_size) % 2 == 0:
            raise ValueError(
                f"stage kernel_size must be odd so that queries keep their grid, got "
                f"{self.kernel_size}; the nearest are {self.kernel_size - 1} and "
                f"{self.kernel_size + 1}"
            )
        if self.embed_padding is not None:
            _check.integer("stage embed_padding", self.embed_padding, 0)
        for name in ("separate_kv", "projection_bias"):
            _check.boolean(f"stage {name}", getattr(self, name))
        if not _check.number("stage mlp_ratio", self.mlp_ratio) * self.dim >= 1:
            raise ValueError(
                f"stage mlp_ratio must leave a hidden channel of dim={self.dim}, "
                f"got {self.mlp_ratio}"
            )

    @staticmethod
    def of(stage: Stage | dict[str, object]) -> Stage:
        """Return a stage from itself or from a dictionary of its fields."""
        if isinstance(stage, Stage):
            return stage
        if not isinstance(stage, dict):
            raise TypeError(f"a stage is a Stage or a dict, got {type(stage).__name__} {stage!r}")
        names = [f.name for f in fields(Stage)]
        for key in stage:
            _check.choice("stage field", key, names)
        if "dim" not in stage:
            raise ValueError(f"a stage needs the field 'dim', got {sorted(stage)}")
        return Stage(**stage)  # type: ignore[arg-type]

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return round(self.mlp_ratio * self.dim)

    @property
    def padding(self) -> int:
        """Padding of the token embedding."""
        return self.embed_kernel // 2 if self.embed_padding is None else self.embed_padding


class TokenEmbed(nn.Module):
    """Strided convolution and layer norm, :func:`eqcvt.ops.token_embed`.

    Args:
        in_channels: input channels.
        stage: the stage's numbers.
        symmetry: group whose grid symmetries the filters have; None for free filters.
    """

    backend: str | None = "reference"

    def __init__(self, in_channels: int, stage: Stage, symmetry: Group | None = None) -> None:
        super().__init__()
        self.stride, self.padding = stage.embed_stride, stage.padding
        self.filters = Filters(stage.dim, in_channels, stage.embed_kernel, symmetry)
        bound = (in_channels * stage.embed_kernel**2) ** -0.5
        self.bias = nn.Parameter(torch.empty(stage.dim).uniform_(-bound, bound))
        self.norm = LayerNorm(stage.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to tokens ``[B, D, H', W']``."""
        check_parts(self, "norm")
        return ops.token_embed(
            x,
            self.filters(),
            self.bias,
            self.norm.weight,
            self.norm.bias,
            stride=self.stride,
            padding=self.padding,
            eps=self.norm.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}"


class DepthwiseProjection(nn.Module):
    """A depthwise filter per channel and the batch norm behind it; applied by the attention op.

    Args:
        dim: channels.
        kernel_size: filter size in pixels.
        symmetry: group whose grid symmetries the filters have; None for free filters.
    """

    def __init__(self, dim: int, kernel_size: int, symmetry: Group | None = None) -> None:
        super().__init__()
        self.filters = Filters(dim, 1, kernel_size, symmetry)
        self.norm = BatchNorm(dim)

    def forward(self) -> ops.Depthwise:
        """Return the tensors the op takes."""
        check_parts(self, "norm")
        norm = self.norm
        return ops.Depthwise(self.filters(), norm.weight, norm.bias, norm.running)


class ConvAttention(nn.Module):
    """Pre-norm attention with convolutional projections, :func:`eqcvt.ops.conv_attention`.

    Args:
        stage: the stage's numbers.
        dropout: probability of dropping an entry of the output.
        symmetry: group whose grid symmetries the depthwise filters have; None for free filters.
    """

    backend: str | None = "reference"

    def __init__(self, stage: Stage, dropout: float, symmetry: Group | None = None) -> None:
        super().__init__()
        dim, width, bias = stage.dim, stage.heads * stage.head_dim, stage.projection_bias
        self.heads, self.kv_stride, self.dropout = stage.heads, stage.kv_stride, dropout
        self.norm = LayerNorm(dim)
        self.q_conv = DepthwiseProjection(dim, stage.kernel_size, symmetry)
        self.k_conv = DepthwiseProjection(dim, stage.kernel_size, symmetry)
        self.v_conv = (
            DepthwiseProjection(dim, stage.kernel_size, symmetry) if stage.separate_kv else None
        )
        self.q = nn.Linear(dim, width, bias)
        self.k = nn.Linear(dim, width, bias)
        self.v = nn.Linear(dim, width, bias)
        self.out = nn.Linear(width, dim)

    def _projections(self) -> list[DepthwiseProjection]:
        return [p for p in (self.q_conv, self.k_conv, self.v_conv) if p is not None]

    def _eps(self) -> float:
        given = [p.norm.eps for p in self._projections()]
        if any(eps != given[0] for eps in given):
            raise ValueError(f"the norms of the projections must have one eps, got {given}")
        return given[0]

    def _norm(self) -> ops.Norm:
        return ops.Norm(self.norm.weight, self.norm.bias, self.norm.eps)

    def _pointwise(self) -> ops.Pointwise:
        q, k, v, out = self.q, self.k, self.v, self.out
        return ops.Pointwise(
            q.weight, k.weight, v.weight, out.weight, q.bias, k.bias, v.bias, out.bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, D, H, W]`` to tokens, the residual included."""
        check_parts(self, "norm", "q", "k", "v", "out")
        y, statistics = ops.conv_attention(
            x,
            x,
            self.q_conv(),
            self.k_conv(),
            None if self.v_conv is None else self.v_conv(),
            self._pointwise(),
            norm=self._norm(),
            heads=self.heads,
            kv_stride=self.kv_stride,
            dropout=self.dropout if self.training else 0.0,
            eps=self._eps(),
            process_group=self.q_conv.norm.process_group,
            backend=self.backend,
        )
        track([projection.norm for projection in self._projections()], statistics)
        return y

    def weights(self, x: Tensor) -> Tensor:
        """Return the softmax weights ``[B, heads, N, M]`` for tokens ``[B, D, H, W]``."""
        return ops.attention_weights(
            x,
            self.q_conv(),
            self.k_conv(),
            self._pointwise(),
            norm=self._norm(),
            heads=self.heads,
            kv_stride=self.kv_stride,
            eps=self._eps(),
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_stride={self.kv_stride}, dropout={self.dropout}"


class MlpBlock(nn.Module):
    """Pre-norm MLP with residual, :func:`eqcvt.ops.mlp_block`.

    Args:
        stage: the stage's numbers.
        dropout: probability of dropping an entry after the GELU and after the second map.
    """

    backend: str | None = "reference"

    def __init__(self, stage: Stage, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = LayerNorm(stage.dim)
        self.fc1 = nn.Linear(stage.dim, stage.hidden)
        self.fc2 = nn.Linear(stage.hidden, stage.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, D, H, W]`` to tokens, the residual included."""
        check_parts(self, "norm", "fc1", "fc2")
        return ops.mlp_block(
            x,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            dropout=self.dropout if self.training else 0.0,
            eps=self.norm.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class Block(nn.Module):
    """One transformer block: attention, then MLP.

    Args:
        stage: the stage's numbers.
        dropout: dropout probability.
        symmetry: group whose grid symmetries the depthwise filters have; None for free filters.
    """

    def __init__(self, stage: Stage, dropout: float, symmetry: Group | None = None) -> None:
        super().__init__()
        self.attention = ConvAttention(stage, dropout, symmetry)
        self.mlp = MlpBlock(stage, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, D, H, W]`` to tokens."""
        y: Tensor = self.mlp(self.attention(x))
        return y


class TransformerStage(nn.Module):
    """Token embedding and the transformer blocks of one stage.

    Args:
        in_channels: channels of the feature maps read.
        stage: the stage's numbers.
        dropout: dropout probability.
        symmetry: group whose grid symmetries all filters have; None for free filters.
    """

    def __init__(
        self, in_channels: int, stage: Stage, dropout: float, symmetry: Group | None = None
    ) -> None:
        super().__init__()
        self.embed = TokenEmbed(in_channels, stage, symmetry)
        self.blocks = nn.ModuleList(Block(stage, dropout, symmetry) for _ in range(stage.depth))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to tokens ``[B, D, H', W']``."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x
