"""The token embedding by the native extension; the functions of ``tests/ops/primitives.py``.

Between forward and backward nothing is kept but the input: kernels make the tokens again, a row at
a time. Parameters and their gradients are float32 beside half-precision images; sums over tokens
are finished in float64.
"""

from __future__ import annotations

from torch import Tensor

from eqcvt.native import launch, refuses_dtype

# On a GPU a tile with its halo has to fit into shared memory.
LARGEST_FILTER, WIDEST = 13, 512
# On a CPU torch's convolution is the faster one for patches of more numbers.
PATCH_PAYS = 256


def supports(x: Tensor, filters: Tensor, *, padding: int) -> str | None:
    """Return why the extension cannot serve a call, or None if it can.

    Args:
        x: ``[B, C, H, W]``.
        filters: ``[D, C, k, k]``.
        padding: zeros on each side of ``x``.
    """
    reason = refuses_dtype(x)
    if reason is not None:
        return reason
    patch = filters[0].numel()
    if x.device.type == "cpu" and patch > PATCH_PAYS:
        return f"patches of {patch} values are faster in plain PyTorch (up to {PATCH_PAYS} are not)"
    if x.device.type == "cuda" and (filters.shape[2] > LARGEST_FILTER or len(filters) > WIDEST):
        return (
            f"{len(filters)} filters of {filters.shape[2]} pixels are more than the {WIDEST} of "
            f"{LARGEST_FILTER} that fit into a GPU's shared memory"
        )
    return None


def forward(
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    """Return the tokens ``[B, H', W', D]``, ``LN(filters * x + bias)``.

    Args:
        x: ``[B, C, H, W]``.
        filters: ``[D, C, k, k]``, dtype of parameters like all that follow.
        bias: ``[D]``.
        norm_weight: ``[D]``.
        norm_bias: ``[D]``.
        stride: step in pixels.
        padding: zeros added on each side.
        eps: added to the variance of the norm.
    """
    x = x.contiguous()
    D, _, k, _ = filters.shape
    rows, columns = ((n + 2 * padding - k) // stride + 1 for n in x.shape[2:])
    y = x.new_empty(x.shape[0], rows, columns, D)
    launch(
        "token_embed_forward",
        *(x, filters, bias, norm_weight, norm_bias),
        *(*x.shape, D, k, stride, padding, eps, y),
        like=x,
    )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
    input_gradient: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``x`` and of the parameters in their order, from that of the tokens.

    Arguments are those of :func:`forward`; without ``input_gradient`` the first result is empty.
    """
    x, dy = x.contiguous(), dy.contiguous()
    D, _, k, _ = filters.shape
    parameters = (filters, bias, norm_weight, norm_bias)
    dx = x.new_empty(x.shape if input_gradient else (0,))
    gradients = tuple(p.new_empty(p.shape) for p in parameters)
    launch(
        "token_embed_backward",
        *(dy, x, *parameters),
        *(*x.shape, D, k, stride, padding, eps, dx if input_gradient else None, *gradients),
        like=x,
    )
    return dx, *gradients
