"""CvT: the Convolutional vision Transformer without a steerable front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eqcvt.models._base import VisionModel
from eqcvt.nn import Stage

BASELINE_STAGES = (
    Stage(dim=64, depth=2, heads=2, embed_kernel=7, embed_stride=4),
    Stage(dim=128, depth=1, heads=3),
)
CVT_13_STAGES = (
    Stage(
        dim=64,
        depth=1,
        heads=1,
        embed_kernel=7,
        embed_stride=4,
        embed_padding=2,
        separate_kv=True,
        projection_bias=True,
    ),
    Stage(dim=192, depth=2, heads=3, separate_kv=True, projection_bias=True),
    Stage(dim=384, depth=10, heads=6, separate_kv=True, projection_bias=True),
)


class CvT(VisionModel):
    """The Convolutional vision Transformer, reference implementation.

    With the defaults it is the two-stage baseline that EqCvT was compared with. The original
    13-layer layout is ``create_model("cvt_13")``; it classifies the average of the last tokens,
    where the original appends a class token.

    Args:
        in_channels: image channels.
        num_classes: classes; 0 for features.
        image_size: height and width in pixels.
        stages: the stages, each a :class:`eqcvt.nn.Stage` or a dictionary of its fields.
        head_hidden: width of the classifier's hidden layer; None for layer norm and one linear map.
        dropout: dropout probability in the transformer blocks.

    Raises:
        ValueError: on a value that is not allowed.
        TypeError: on an argument of the wrong type.

    Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", arXiv:2103.15808.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        image_size: int = 129,
        *,
        stages: Sequence[Stage | dict[str, Any]] = BASELINE_STAGES,
        head_hidden: int | None = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self._configure(
            in_channels=in_channels,
            num_classes=num_classes,
            image_size=image_size,
            stages=None,
            head_hidden=head_hidden,
            dropout=dropout,
        )
        self._build(in_channels, image_size, self._stages(stages))
