"""Sizes that several ops compute."""

from __future__ import annotations


def conv_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the output size of a convolution."""
    return (size + 2 * padding - kernel) // stride + 1
