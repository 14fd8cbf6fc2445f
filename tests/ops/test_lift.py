"""The steerable block against its formula, group element by group element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqcvt import groups, ops
from tests.tolerance import assert_as_good

pytestmark = pytest.mark.usefixtures("backend")
GROUPS = ("C4", "D4", "C8", "D8")


def _inputs(
    group: str = "C4",
    batch: int = 2,
    channels: int = 2,
    fields: int = 3,
    size: int = 15,
    kernel: int = 5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    basis = groups.lifting_basis(group, kernel)
    weight = torch.randn(fields, channels, len(basis), dtype=torch.float64)
    bank = ops.filter_bank(weight, basis)
    x = torch.randn(batch, channels, size, size, dtype=torch.float64)
    scale = torch.rand(fields, dtype=torch.float64) + 0.5
    shift = torch.randn(fields, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, bank, scale, shift))


def test_bank_holds_the_turned_copies_of_each_filter() -> None:
    group = groups.Group.from_name("D4")
    _, bank, _, _ = _inputs("D4", kernel=7)
    for g in range(group.order):
        turned = group.act_on_image(bank[:, 0], g)
        torch.testing.assert_close(bank[:, g], turned, atol=1e-12, rtol=0)


def test_block_is_its_formula_written_out() -> None:
    x, bank, scale, shift = _inputs(size=11)
    mask, blur = ops.circular_mask(11), ops.blur_line(0.66)
    y, mean, variance = ops.lift(x, bank, scale, shift, None, mask, blur, padding=1)

    padded = F.pad(x * mask, (1, 1, 1, 1))
    patches = padded.unfold(2, 5, 1).unfold(3, 5, 1)
    u = torch.einsum("bchwij,fgcij->bfghw", patches, bank)
    axes = (0, 2, 3, 4)
    normalised = (u - u.mean(axes, keepdim=True)) / (
        u.var(axes, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    r = (normalised * scale.view(1, -1, 1, 1, 1) + shift.view(1, -1, 1, 1, 1)).clamp(min=0)
    expected = torch.einsum(
        "bfghwij,ij->bfghw", r.unfold(3, 5, 1).unfold(4, 5, 1), torch.outer(blur, blur)
    ).amax(2)

    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(mean, u.mean(axes), atol=1e-12, rtol=0)
    torch.testing.assert_close(variance, u.var(axes), atol=1e-12, rtol=0)


def test_running_statistics_replace_the_batch_s() -> None:
    x, bank, scale, shift = _inputs()
    _, mean, variance = ops.lift(x, bank, scale, shift)
    assert mean is not None
    assert variance is not None
    count = x.shape[0] * 4 * 11 * 11
    biased = variance * (count - 1) / count
    y, no_mean, no_variance = ops.lift(x, bank, scale, shift, (mean, biased))
    assert no_mean is None
    assert no_variance is None
    torch.testing.assert_close(y, ops.lift(x, bank, scale, shift)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("pool", [True, False])
def test_block_turns_with_the_image(name: str, pool: bool) -> None:
    group = groups.Group.from_name(name)
    x, bank, scale, shift = _inputs(name, size=17)
    mask, blur = ops.circular_mask(17), ops.blur_line(0.66)

    def block(images: Tensor) -> Tensor:
        return ops.lift(images, bank, scale, shift, None, mask, blur, padding=1, pool=pool)[0]

    y = block(x)
    for g in range(group.order):
        if not group.is_exact(g):
            continue
        turned = group.act_on_image(y, g) if pool else group.act_on_regular(y, g)
        error = (block(group.act_on_image(x, g)) - turned).abs().max().item()
        assert error < 1e-12, f"element {g} of {name}: {error}"


def test_quarter_turn_of_c8_block_survives_interpolated_45_degrees() -> None:
    group = groups.Group.from_name("C8")
    x, bank, scale, shift = _inputs("C8", batch=1, channels=1, size=65, kernel=7)
    x = F.avg_pool2d(F.pad(x, (8, 8, 8, 8)), 9, 1, 4)[..., 8:-8, 8:-8] * ops.circular_mask(65)
    bank = bank / bank.norm()
    running = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64) * 1e-3)

    def front(images: Tensor) -> Tensor:
        y = ops.lift(images, bank, scale, shift * 0, running, padding=3)[0]
        return y[..., 16:-16, 16:-16]

    y = front(x)
    turned = front(group.act_on_image(x, 1))
    full = ops.lift(x, bank, scale, shift * 0, running, padding=3)[0]
    expected = group.act_on_image(full, 1)[..., 16:-16, 16:-16]
    assert (turned - expected).norm() < 0.15 * expected.norm()
    assert (turned - y).norm() > 0.5 * y.norm()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("blurred", [True, False])
def test_gradients_are_those_of_finite_differences(stride: int, blurred: bool) -> None:
    x, bank, scale, shift = _inputs(channels=1, fields=2, size=9, kernel=3)
    blur = ops.blur_line(0.4) if blurred else None
    inputs = [t.requires_grad_() for t in (x, bank, scale, shift)]
    assert torch.autograd.gradcheck(
        lambda *t: ops.lift(*t, None, None, blur, stride=stride, blur_stride=stride)[0], inputs
    )


@settings(max_examples=25)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 4),
    fields=st.integers(1, 5),
    size=st.sampled_from([7, 8, 11, 13, 16, 23]),
    kernel=st.sampled_from([3, 4, 5, 7]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    name=st.sampled_from(GROUPS),
)
def test_any_size_gives_the_shape_of_the_formula(
    batch: int,
    channels: int,
    fields: int,
    size: int,
    kernel: int,
    stride: int,
    padding: int,
    name: str,
) -> None:
    x, bank, scale, shift = _inputs(name, batch, channels, fields, size, kernel, torch.float32)
    running = (torch.zeros(fields), torch.ones(fields))
    y, _, _ = ops.lift(x, bank, scale, shift, running, stride=stride, padding=padding)
    side = (size + 2 * padding - kernel) // stride + 1
    assert y.shape == (batch, fields, side, side)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_inputs_give_the_same_as_contiguous_ones(dtype: torch.dtype) -> None:
    x, bank, scale, shift = _inputs(dtype=torch.float32, size=14)
    exact = ops.lift(x.double(), bank.double(), scale.double(), shift.double())[0]
    x, bank = x.to(dtype), bank.to(dtype)
    reference = ops.lift(x, bank, scale, shift)[0]
    wide = torch.zeros(2, 4, 14, 20, dtype=dtype)
    wide[:, 1:3, :, 3:17] = x
    for other in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, 1:3, :, 3:17],
    ):
        assert not other.is_contiguous()
        assert_as_good(ops.lift(other, bank, scale, shift)[0], exact, reference)


def test_nan_reaches_every_element_it_should_and_no_other() -> None:
    x, bank, scale, shift = _inputs(size=17, kernel=3)
    running = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    x[0, 0, 8, 8] = float("nan")
    y, _, _ = ops.lift(x, bank, scale, shift, running, None, ops.blur_line(0.66))
    expected = torch.zeros(2, 3, 11, 11, dtype=torch.bool)
    expected[0, :, 2:9, 2:9] = True
    assert torch.equal(y.isnan(), expected)


def test_infinity_makes_batch_statistics_nan() -> None:
    x, bank, scale, shift = _inputs()
    x[0, 0, 7, 7] = float("inf")
    y, mean, _ = ops.lift(x, bank, scale, shift)
    assert mean is not None
    assert not torch.isfinite(mean).any()
    assert y.isnan().any()


def test_group_pool_of_nan_is_nan() -> None:
    u = torch.tensor([1.0, float("nan"), 3.0, 2.0]).reshape(1, 1, 4, 1, 1)
    assert ops.group_pool(u).isnan().all()


def test_compiles_without_graph_breaks_for_any_batch() -> None:
    x, bank, scale, shift = _inputs(dtype=torch.float32)
    compiled = torch.compile(
        lambda t: ops.lift(t, bank, scale, shift)[0], fullgraph=True, dynamic=True, backend="eager"
    )
    for batch in (2, 3, 5):
        images = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(compiled(images), ops.lift(images, bank, scale, shift)[0])


def test_two_runs_are_bit_equal() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        x, bank, scale, shift = _inputs(dtype=torch.float32)
        bank.requires_grad_()
        y = ops.lift(x, bank, scale, shift)[0]
        y.square().sum().backward()
        results.append((y, bank.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_mask_is_one_inside_and_falls_off_outside() -> None:
    mask = ops.circular_mask(21, margin=0.0, sigma=2.0)
    assert mask[10, 10] == 1
    assert mask[0, 10] == 1
    assert mask[0, 0].item() == pytest.approx(torch.tensor(-(200 - 100) / 4.0).exp().item())
    assert torch.equal(mask, mask.rot90())


def test_blur_kernel_is_a_normalised_gaussian() -> None:
    kernel = ops.blur_kernel(0.66)
    assert kernel.shape == (5, 5)
    assert kernel.sum().item() == pytest.approx(1.0)
    ratio = kernel[2, 3] / kernel[2, 2]
    assert ratio.item() == pytest.approx(torch.tensor(-1 / (2 * 0.66**2)).exp().item())


@pytest.mark.parametrize(
    ("shape", "kernel", "message"),
    [
        ((2, 3, 9, 9), 3, r"same C, got \[2, 3, 9, 9\] and \[3, 4, 2, 3, 3\]"),
        ((2, 9, 9), 3, r"x \[B, C, H, W\]"),
        ((2, 2, 4, 4), 7, r"4x4 pixels is too small for 7x7 filters with padding 0"),
    ],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], kernel: int, message: str) -> None:
    _, bank, scale, shift = _inputs(kernel=kernel)
    with pytest.raises(ValueError, match=message):
        ops.lift(torch.zeros(shape, dtype=torch.float64), bank, scale, shift)


def test_a_blur_without_a_middle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a line \[k\] with odd k, got \[4\]"):
        ops.lift(*_inputs(), None, None, torch.ones(4) / 4)


def test_a_mask_or_blur_that_learns_has_its_gradient_from_plain_pytorch() -> None:
    x, bank, line = torch.rand(1, 1, 9, 9), torch.rand(2, 4, 1, 3, 3), torch.ones(2)
    for name in ("mask", "blur"):
        chosen = {"mask": torch.rand(9, 9), "blur": torch.rand(3)}
        chosen[name].requires_grad_()
        y, _, _ = ops.lift(x, bank, line, line, None, **chosen)
        y.sum().backward()
        assert chosen[name].grad is not None
        with pytest.raises(
            ops.CannotServe, match="are constants, and one of them needs a gradient"
        ):
            ops.lift(x, bank, line, line, None, **chosen, backend="native")
