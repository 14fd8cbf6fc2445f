"""Normalisation with returned statistics."""

from __future__ import annotations

import pytest
import torch

from eqcvt import nn, ops
from eqcvt.nn.norm import track
from eqcvt.ops.norm import affine


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 5, 6)])
def test_statistics_run_over_all_axes_but_the_second(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    scale, shift = torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    y, mean, variance = ops.batch_norm(x, scale, shift)
    flat = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1))
    torch.testing.assert_close(variance, flat.var(1))
    expected = (flat - flat.mean(1, True)) / (flat.var(1, unbiased=False)[:, None] + 1e-5).sqrt()
    expected = expected * scale[:, None] + shift[:, None]
    torch.testing.assert_close(y.transpose(0, 1).flatten(1), expected)


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: ops.batch_norm(*t)[0], (x, scale, shift))


def test_statistics_of_half_precision_are_float32() -> None:
    x = torch.randn(4, 3, 8, 8).bfloat16()
    y, mean, variance = ops.batch_norm(x, torch.ones(3), torch.zeros(3))
    assert y.dtype == torch.bfloat16
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_module_keeps_the_state_and_values_of_torch_s(momentum: float | None) -> None:
    ours = nn.BatchNorm(3, momentum=momentum).double()
    torchs = torch.nn.BatchNorm3d(3, momentum=momentum).double()
    torchs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = torch.randn(4, 3, 2, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(ours(x), torchs(x), atol=1e-12, rtol=0)
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, atol=1e-12, rtol=0)
    x = torch.randn(4, 3, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("momenta", [(0.1, 0.1), (0.1, 0.3), (0.1, None), (None, None)])
def test_norms_are_tracked_together_as_one_by_one(
    momenta: tuple[float | None, float | None],
) -> None:
    together = [nn.BatchNorm(3, momentum=m) for m in momenta]
    alone = [nn.BatchNorm(3, momentum=m) for m in momenta]
    for _ in range(2):
        statistics = [(torch.randn(3), torch.rand(3)) for _ in momenta]
        track(together, statistics)
        for norm, values in zip(alone, statistics, strict=True):
            norm.track(*values)
    track(together, [None, None])
    for one, other in zip(together, alone, strict=True):
        for key, value in one.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key])


def test_scale_and_shift_and_their_gradients() -> None:
    mean, weight, bias = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    leaves = [t.requires_grad_() for t in (mean, torch.rand_like(mean), weight, bias)]
    scale, shift = affine(*leaves, 0.1)
    torch.testing.assert_close(scale, weight / (leaves[1] + 0.1).sqrt())
    torch.testing.assert_close(shift, bias - mean * scale)
    assert torch.autograd.gradcheck(lambda *t: affine(*t, 0.1), leaves)


def test_layer_norm_runs_over_the_channels_of_each_token() -> None:
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    scale, shift = torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = expected * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    torch.testing.assert_close(ops.layer_norm(x, scale, shift), expected)


def test_a_model_without_batch_norms_cannot_be_synchronised() -> None:
    with pytest.raises(ValueError, match="Linear has no eqcvt batch norm to synchronise"):
        nn.set_sync_batch_norm(torch.nn.Linear(2, 2), None)


def test_one_value_per_channel_is_refused_in_training() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.batch_norm(torch.zeros(1, 3), torch.ones(3), torch.zeros(3))
