"""Sizes and options of a call of the steerable block's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """Sizes and options of a call."""

    batch: int = 2
    channels: int = 1
    height: int = 23
    width: int = 20
    fields: int = 3
    group: int = 4
    kernel: int = 5
    stride: int = 1
    padding: int = 1
    masked: bool = True
    blur: int = 5
    blur_stride: int = 1
    pool: bool = True

    @property
    def conv(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding}

    @property
    def options(self) -> dict[str, Any]:
        return {**self.conv, "blur_stride": self.blur_stride, "pool": self.pool}

    @property
    def fits(self) -> bool:
        size = (min(self.height, self.width) + 2 * self.padding - self.kernel) // self.stride + 1
        return size >= max(self.blur, 1)

    @property
    def sizes(self) -> list[int]:
        """As a launcher takes them."""
        return list(self[:7])

    @property
    def blurred_sizes(self) -> list[int]:
        """As a launcher takes those of the whole block."""
        return [*self.sizes, max(self.blur, 1), *self[7:9], self.blur_stride, self.pool]
