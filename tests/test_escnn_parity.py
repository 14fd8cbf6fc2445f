"""Parity with live escnn: bases, actions, and every output, gradient and statistic of the model.

escnn samples its basis in float32. To compare everything else in float64 its sampled basis is first
shown to lie within float32 noise of our span, and then replaced by its projection onto that span;
the same projection maps weights and gradients of one parametrisation onto the other.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqcvt import EqCvT
from eqcvt.convert import to_escnn
from eqcvt.convert.layout import MASK, WEIGHTS, read_layout
from eqcvt.groups import (
    Group,
    lifting_basis,
    lifting_std,
    regular_basis,
    regular_covariance,
)
from eqcvt.nn import SteerableLift
from eqcvt.ops import blur_kernel, blur_line, circular_mask

pytestmark = pytest.mark.needs("escnn")

GROUPS = ("C4", "D4", "C8", "D8")
NOISE = 1e-6  # float32 noise of escnn's sampled bases
CLOSE = 1e-10  # float64, relative to the largest entry


def field_type(group: str, kind: str, count: int = 1) -> Any:
    """Return an escnn field type of ``count`` trivial or regular fields."""
    from escnn import gspaces
    from escnn import nn as enn

    g = Group.from_name(group)
    space = (gspaces.flipRot2dOnR2 if g.reflections else gspaces.rot2dOnR2)(g.n)
    return enn.FieldType(space, [getattr(space, f"{kind}_repr")] * count)


def escnn_conv(group: str, kind: str, kernel_size: int, channels: int = 1, fields: int = 1) -> Any:
    """Return escnn's convolution to regular fields, its basis not shared with other modules."""
    from escnn import nn as enn

    types_ = field_type(group, kind, channels), field_type(group, "regular", fields)
    return enn.R2Conv(
        *types_, kernel_size, padding=1, bias=False, recompute=True, initialize=channels < 4
    )


def expansion(conv: Any) -> Any:
    """Return the module of a convolution that holds its sampled basis ``[b, G, G_in, k * k]``."""
    (block,) = conv._basisexpansion.children()
    return block


def outside(vectors: Tensor, basis: Tensor) -> float:
    """Return the relative residual of vectors ``[n, d]`` in the span of ``basis`` ``[b, d]``."""
    solution = torch.linalg.lstsq(basis.T, vectors.T, driver="gelsd").solution
    return float((basis.T @ solution - vectors.T).norm() / vectors.norm())


def snap(conv: Any, group: str, kernel_size: int) -> Tensor:
    """Replace escnn's sampled basis by its float64 projection ``M @ ours``, and return ``M``."""
    block, ours = expansion(conv), lifting_basis(group, kernel_size).flatten(1)
    theirs = block.sampled_basis.double().flatten(1)
    matrix: Tensor = torch.linalg.lstsq(ours.T, theirs.T).solution.T
    projected = matrix @ ours
    assert (projected - theirs).abs().max() < NOISE
    block.sampled_basis = projected.reshape(block.sampled_basis.shape)
    return matrix


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = CLOSE, what: str = "") -> None:
    """Compare relative to the largest entry; entries below 1e-3 in all count as that large."""
    assert ours.shape == theirs.shape, what
    scale = max(float(theirs.detach().abs().max()), 1e-3)
    error = float((ours - theirs).detach().abs().max()) / scale
    assert error <= tolerance, f"{what}: relative difference {error:.3g}"


@pytest.fixture
def double_group_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make escnn's group pooling keep float64: it allocates its result as ``torch.float``."""
    from escnn.nn.modules.invariantmaps import gpool

    names = {"empty": torch.empty, "max": torch.max, "LongTensor": torch.LongTensor}
    monkeypatch.setattr(gpool, "torch", types.SimpleNamespace(float=torch.float64, **names))


@pytest.mark.parametrize("kernel_size", range(3, 12))
@pytest.mark.parametrize("group", GROUPS)
def test_lifting_basis_is_escnns(group: str, kernel_size: int) -> None:
    theirs = expansion(escnn_conv(group, "trivial", kernel_size)).sampled_basis
    ours = lifting_basis(group, kernel_size)
    theirs = theirs.double().reshape(ours.shape)
    if group[0] == "C":
        torch.testing.assert_close(ours, theirs, atol=NOISE, rtol=0)
    ours, theirs = ours.flatten(1), theirs.flatten(1)
    assert torch.linalg.matrix_rank(ours) == len(ours)
    assert outside(theirs, ours) < NOISE
    assert outside(ours, theirs) < NOISE


@pytest.mark.parametrize(
    ("group", "kernel_size"),
    [("C4", 3), ("C4", 4), ("C4", 5), ("C4", 7), ("D4", 3), ("D4", 5), ("C8", 5), ("D8", 3)],
)
def test_regular_basis_spans_escnns(group: str, kernel_size: int) -> None:
    conv = escnn_conv(group, "regular", kernel_size)
    theirs = expansion(conv).sampled_basis.double().flatten(1)
    ours = regular_basis(group, kernel_size)
    order = Group.from_name(group).order
    assert theirs.shape == (len(ours), order**2 * kernel_size**2)
    assert outside(theirs, ours.flatten(1)) < NOISE
    assert outside(ours.flatten(1), theirs) < NOISE


def initial_std(conv: Any) -> Tensor:
    """Return what escnn scales a convolution's initial weights with, first block only."""
    from escnn.nn import init

    std: Tensor = init._generalized_he_init_variances(conv.basisexpansion).double()
    return std[: len(expansion(conv).sampled_basis)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel_size", [4, 5, 7, 11])
@pytest.mark.parametrize("group", GROUPS)
def test_initial_covariance_is_escnns(group: str, kernel_size: int, channels: int) -> None:
    conv = escnn_conv(group, "trivial", kernel_size, channels)
    theirs = expansion(conv).sampled_basis.double().flatten(1) * initial_std(conv)[:, None]
    ours = lifting_basis(group, kernel_size).flatten(1)
    ours = ours * lifting_std(group, kernel_size, channels)[:, None]
    assert_near(ours.T @ ours, theirs.T @ theirs, 3 * NOISE)


@pytest.mark.parametrize(
    ("group", "kernel_size"),
    [("C4", 3), ("C4", 4), ("C4", 7), ("D4", 3), ("D4", 5), ("C8", 5), ("D8", 3), ("C3", 5)],
)
@pytest.mark.parametrize("in_fields", [1, 2])
def test_initial_covariance_between_regular_fields_is_escnns(
    group: str, kernel_size: int, in_fields: int
) -> None:
    conv = escnn_conv(group, "regular", kernel_size, in_fields)
    theirs = expansion(conv).sampled_basis.double().flatten(1) * initial_std(conv)[:, None]
    ours = regular_basis(group, kernel_size).flatten(1)
    covariance = regular_covariance(group, kernel_size, in_fields)
    assert_near(ours.T @ covariance @ ours, theirs.T @ theirs, 3 * NOISE)


@pytest.mark.parametrize("group", [*GROUPS, "C1", "C6", "D1", "D3"])
def test_group_actions_are_escnns(group: str) -> None:
    from escnn import nn as enn

    g = Group.from_name(group)
    images, fields = field_type(group, "trivial", 2), field_type(group, "regular", 2)
    x, u = torch.randn(1, 2, 9, 9), torch.randn(1, 2, g.order, 9, 9)
    elements = list(images.gspace.fibergroup.elements)
    assert len(elements) == g.order
    for a, element in enumerate(elements):
        permuted = enn.GeometricTensor(u.flatten(1, 2), fields).transform_fibers(element).tensor
        torch.testing.assert_close(
            u[:, :, g.permutation(a)].flatten(1, 2), permuted, atol=1e-6, rtol=0
        )
        assert elements[g.inverse(a)] == ~element
        assert [elements[g.compose(a, b)] for b in range(g.order)] == [
            element @ e for e in elements
        ]
        if not g.is_exact(a):
            continue
        turned = enn.GeometricTensor(x, images).transform(element).tensor
        torch.testing.assert_close(g.act_on_image(x, a), turned, atol=1e-6, rtol=0)
        both = enn.GeometricTensor(u.flatten(1, 2), fields).transform(element).tensor
        torch.testing.assert_close(g.act_on_regular(u, a).flatten(1, 2), both, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "margin", "sigma"), [(33, 1.0, 2.0), (40, 0.0, 1.5)])
def test_mask_is_escnns(size: int, margin: float, sigma: float) -> None:
    from escnn import nn as enn

    theirs = enn.MaskModule(field_type("C4", "trivial"), size, margin=margin, sigma=sigma).mask
    ours = circular_mask(size, margin=margin, sigma=sigma)
    torch.testing.assert_close(ours.float(), theirs[0, 0], atol=1e-7, rtol=0)


@pytest.mark.parametrize("sigma", [0.5, 0.66, 1.3])
def test_blur_is_escnns(sigma: float) -> None:
    from escnn import nn as enn

    theirs = enn.PointwiseAvgPoolAntialiased(field_type("C4", "regular"), sigma, 1, padding=0)
    ours = blur_kernel(sigma).float().expand_as(theirs.filter)
    torch.testing.assert_close(ours, theirs.filter, atol=1e-7, rtol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("group", "kernel_size"), [("C4", 7), ("D4", 7), ("C8", 5), ("D4", 4)])
@pytest.mark.usefixtures("double_group_pooling")
def test_lifting_block(group: str, kernel_size: int, channels: int, training: bool) -> None:
    from escnn import nn as enn

    images, fields = field_type(group, "trivial", channels), field_type(group, "regular", 2)
    conv = escnn_conv(group, "trivial", kernel_size, channels, 2)
    block1 = enn.SequentialModule(
        enn.MaskModule(images, 33, margin=1), conv, enn.InnerBatchNorm(fields), enn.ReLU(fields)
    )
    pool1 = enn.PointwiseAvgPoolAntialiased(fields, sigma=0.66, stride=1, padding=0)
    matrix = snap(conv, group, kernel_size)
    theirs = nn.ModuleList([block1, pool1, enn.GroupPooling(fields)]).double()
    ours: Any = SteerableLift(
        group, channels, 2, kernel_size, padding=1, mask_size=33, blur_sigma=0.66
    ).double()
    # Constants and basis of full precision on both sides; the float32 ones are compared above.
    ours.basis, ours.mask = lifting_basis(group, kernel_size), circular_mask(33)
    ours.blur = blur_line(0.66)
    norm = getattr(block1[2], f"batch_norm_[{ours.group.order}]")
    with torch.no_grad():
        block1[0].mask.copy_(ours.mask)
        pool1.filter.copy_(blur_kernel(0.66).expand_as(pool1.filter))
        weight = ours.weight @ torch.linalg.inv(matrix)
        conv.weights.copy_(weight.flatten())
        ours.norm.weight.copy_(torch.rand(2) + 0.5)
        ours.norm.bias.copy_(torch.randn(2) * 0.2)
        ours.norm.running_mean.copy_(torch.randn(2) * 0.2)
        ours.norm.running_var.copy_(torch.rand(2) + 0.5)
        norm.load_state_dict(ours.norm.state_dict())
    ours.train(training)
    theirs.train().train(training)

    x = torch.rand(2, channels, 33, 33, dtype=torch.float64, requires_grad=True)
    their_x = x.detach().clone().requires_grad_()
    y = ours(x)
    blurred = pool1(block1(images(their_x)))
    their_y = theirs[2](blurred).tensor
    assert their_y.dtype == torch.float64
    assert_near(y, their_y, what="output")
    ours.pool = False
    statistics = {name: value.clone() for name, value in ours.norm.state_dict().items()}
    assert_near(ours(x.detach()).flatten(1, 2), blurred.tensor, what="before group pooling")

    upstream = torch.randn_like(y)
    y.backward(upstream)
    their_y.backward(upstream)
    assert x.grad is not None
    assert their_x.grad is not None
    assert_near(x.grad, their_x.grad, what="input gradient")
    mapped = (ours.weight.grad @ matrix.T).flatten()
    assert_near(mapped, conv.weights.grad, what="weight gradient")
    assert_near(ours.norm.weight.grad, norm.weight.grad, what="scale gradient")
    assert_near(ours.norm.bias.grad, norm.bias.grad, what="shift gradient")
    for name, value in norm.state_dict().items():
        assert_near(statistics[name].double(), value.double(), what=name)
    assert statistics["num_batches_tracked"] == int(training)


def pair(group: str, channels: int, size: int = 33, **options: Any) -> tuple[Any, Any, Tensor]:
    """Return our model, escnn's with the same weights, both in float64, and the basis matrix."""
    options = {"fields": 4, "dropout": 0.0, "num_classes": 3, **options}
    ours: Any = EqCvT(channels, image_size=size, group=group, **options).double()
    for name, value in ours.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and value.dim() < 2:
            value.add_(torch.randn_like(value) * 0.2)
    lift = ours.lift[0]
    lift.basis, lift.mask = lifting_basis(group, 7), circular_mask(size)
    lift.blur = blur_line(0.66)
    theirs: Any = to_escnn(ours)
    matrix = snap(theirs.block1[1], group, 7)
    state = theirs.state_dict()
    state[MASK].copy_(lift.mask)
    state["pool1.filter"].copy_(blur_kernel(0.66).expand_as(state["pool1.filter"]))
    state[WEIGHTS].copy_((lift.weight.detach() @ torch.linalg.inv(matrix)).flatten())
    return ours, theirs, matrix


def compare_parameters(
    ours: nn.Module, theirs: nn.Module, matrix: Tensor, *, gradients: bool, tolerance: float
) -> None:
    """Compare every parameter and statistic, or every gradient, through the layout's table."""
    author = dict(theirs.named_parameters() if gradients else theirs.state_dict().items())
    mine = dict(ours.named_parameters() if gradients else ours.state_dict().items())

    def value(tensor: Tensor) -> Tensor:
        if gradients:
            assert tensor.grad is not None
            return tensor.grad
        return tensor.double()

    compared = {"lift.0.weight"}
    front = value(mine["lift.0.weight"])
    front = front @ (matrix.T if gradients else torch.linalg.inv(matrix))
    assert_near(front.flatten(), value(author[WEIGHTS]), tolerance, WEIGHTS)
    layout = read_layout(theirs.state_dict(), "escnn")
    for key, entry in layout.entries().items():
        if key not in author:
            assert "running" in key or "tracked" in key
            continue
        parts = [value(mine[name]) for name in entry.ours]
        both = torch.cat(parts) if len(parts) > 1 else parts[0]
        target = value(author[key])
        assert_near(both.reshape(target.shape), target, tolerance, key)
        compared |= set(entry.ours)
    assert compared == set(mine)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("group", ["C4", "D4"])
@pytest.mark.usefixtures("double_group_pooling")
def test_whole_model(group: str, channels: int, training: bool) -> None:
    ours, theirs, matrix = pair(group, channels)
    ours.train(training)
    theirs.train().train(training)
    x = torch.rand(3, channels, 33, 33, dtype=torch.float64, requires_grad=True)
    their_x = x.detach().clone().requires_grad_()
    labels = torch.tensor([0, 2, 1])
    y, their_y = ours(x), theirs(their_x)
    assert_near(y, their_y, what="logits")
    for logits in (y, their_y):
        torch.autograd.backward(F.cross_entropy(logits, labels))
    assert x.grad is not None
    assert their_x.grad is not None
    assert_near(x.grad, their_x.grad, what="input gradient")
    # The bias before the head's batch norm has no gradient in training but rounding errors.
    if training:
        for bias in (ours.head.hidden.bias, theirs.get_parameter("layers.3.bias")):
            assert bias.grad is not None
            assert bias.grad.abs().max() < 1e-11
    compare_parameters(ours, theirs, matrix, gradients=True, tolerance=1e-8)
    compare_parameters(ours, theirs, matrix, gradients=False, tolerance=CLOSE)
    assert ours.lift[0].norm.num_batches_tracked == int(training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("group", "channels", "size"), [("C4", 3, 129), ("D4", 1, 41)])
def test_whole_model_in_float32(group: str, channels: int, size: int, training: bool) -> None:
    ours = EqCvT(channels, image_size=size, group=group, dropout=0.0).train(training)
    theirs = to_escnn(ours)
    x = torch.rand(2, channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=0)
    statistics = theirs.state_dict()
    for name in ("running_mean", "running_var"):
        key = f"block1.2.batch_norm_[{ours.group.order}].{name}"
        torch.testing.assert_close(
            ours.state_dict()[f"lift.0.norm.{name}"], statistics[key], atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("optimiser", "options"),
    [
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
        (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 1e-7}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("double_group_pooling")
def test_three_optimiser_steps_stay_together(
    channels: int, optimiser: Any, options: dict[str, float]
) -> None:
    ours, theirs, matrix = pair("C4", channels)
    assert_near(matrix, torch.eye(18, dtype=torch.float64), NOISE)  # the same parametrisation
    models = (ours.train(), theirs.train())
    optimisers = [optimiser(model.parameters(), **options) for model in models]
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    for _ in range(3):
        x = torch.rand(4, channels, 33, 33, dtype=torch.float64)
        labels = torch.randint(0, 3, (4,))
        losses = []
        for model, step in zip(models, optimisers, strict=True):
            step.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            torch.autograd.backward(loss)
            step.step()
            losses.append(loss.detach())
        assert_near(losses[0], losses[1], 1e-6, "loss")
    compare_parameters(ours, theirs, matrix, gradients=False, tolerance=1e-6)
    moved = max(float((v - start[k]).abs().max()) for k, v in ours.state_dict().items())
    assert moved > 1e-3
    x = torch.rand(2, channels, 33, 33, dtype=torch.float64)
    assert_near(ours.eval()(x), theirs.eval()(x), 1e-6, "logits after training")
