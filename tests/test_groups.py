"""The groups, their actions and the steerable basis, without escnn."""

from __future__ import annotations

import pytest
import torch

from eqcvt import groups
from eqcvt.groups import Group

NAMES = ("C1", "C3", "C4", "C8", "C16", "D1", "D4", "D8")


@pytest.mark.parametrize("name", NAMES)
def test_elements_form_a_group_that_matrices_represent(name: str) -> None:
    group = Group.from_name(name)
    assert group.name == name
    for a in range(group.order):
        assert group.compose(a, group.inverse(a)) == 0
        assert group.compose(a, 0) == a
        for b in range(group.order):
            product = torch.from_numpy(group.matrix(a) @ group.matrix(b))
            expected = torch.from_numpy(group.matrix(group.compose(a, b)))
            torch.testing.assert_close(product, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["C4", "D4", "D2"])
def test_the_action_on_images_and_regular_fields_is_a_homomorphism(name: str) -> None:
    group = Group.from_name(name)
    x = torch.randn(2, 3, group.order, 6, 6)
    for a in range(group.order):
        for b in range(group.order):
            both = group.act_on_regular(group.act_on_regular(x, b), a)
            assert torch.equal(both, group.act_on_regular(x, group.compose(a, b)))


def test_element_one_turns_an_image_counter_clockwise_and_mirrors_flip_left_and_right() -> None:
    x = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # a spot at the top right
    group = Group.from_name("D4")
    assert torch.equal(group.act_on_image(x, 1), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(group.act_on_image(x, 4), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(group.act_on_image(x, 3), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("shape", [(65, 65), (65, 45)])
def test_interpolated_turns_move_a_blob_where_the_matrix_says(shape: tuple[int, int]) -> None:
    group = Group.from_name("D8")
    y, x = torch.meshgrid(*(torch.arange(s) - (s - 1) / 2 for s in shape), indexing="ij")
    blob = torch.exp(-((x - 12) ** 2 + (-y - 5) ** 2) / 8)
    for g in range(group.order):
        image = group.act_on_image(blob, g)
        if image.shape != blob.shape:
            continue
        centre = torch.stack([(image * x).sum(), (image * -y).sum()]) / image.sum()
        expected = torch.from_numpy(group.matrix(g)).float() @ torch.tensor([12.0, 5.0])
        torch.testing.assert_close(centre, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(("name", "order"), [("C8", 4), ("D8", 8), ("C3", 1), ("D6", 4), ("C2", 2)])
def test_grid_symmetries_are_the_exact_elements(name: str, order: int) -> None:
    group = Group.from_name(name)
    assert group.grid_symmetries.order == order
    assert sum(group.is_exact(g) for g in range(group.order)) == order


@pytest.mark.parametrize(
    ("kernel_size", "count"),
    [(3, 6), (4, 5), (5, 11), (6, 12), (7, 18), (8, 25), (9, 31), (10, 40), (11, 46)],
)
@pytest.mark.parametrize("name", ["C4", "D4", "C8", "D8"])
def test_lifting_basis_is_complete_independent_and_turned(
    name: str, kernel_size: int, count: int
) -> None:
    group = Group.from_name(name)
    basis = groups.lifting_basis(name, kernel_size)
    assert basis.shape == (count, group.order, kernel_size, kernel_size)
    assert torch.linalg.matrix_rank(basis.flatten(1)) == count
    for g in range(group.order):
        if group.is_exact(g):
            turned = group.act_on_image(basis[:, 0], g)
            torch.testing.assert_close(basis[:, g], turned, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["C4", "D4", "C8"])
def test_regular_basis_is_constrained_as_an_equivariant_filter_must(name: str) -> None:
    group = Group.from_name(name)
    basis = groups.regular_basis(name, 5)
    assert torch.linalg.matrix_rank(basis.flatten(1)) == len(basis) == 11 * group.order
    for g in range(group.order):
        if group.is_exact(g):
            moved = group.act_on_image(basis, g)
            both = moved[:, group.permutation(g)][:, :, group.permutation(g)]
            torch.testing.assert_close(basis, both, atol=1e-12, rtol=0)


def test_initial_filters_have_unit_norm_on_average() -> None:
    for channels in (1, 3):
        basis = groups.lifting_basis("C4", 7)
        std = groups.lifting_std("C4", 7, channels)
        expected = channels * (basis.square().sum((1, 2, 3)) * std.square()).sum()
        assert expected.item() == pytest.approx(4.0)  # one per group element


def test_orbits_partition_the_filter() -> None:
    for name, size, count in (
        ("C4", 3, 3),
        ("D4", 3, 3),
        ("C4", 5, 7),
        ("D4", 5, 6),
        ("C8", 7, 13),
    ):
        orbits = groups.orbit_basis(name, size)
        assert len(orbits) == count
        assert torch.equal(orbits.sum(0), torch.ones(size, size, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Group.from_name("c4"), ValueError, "got 'c4'; did you mean 'C4'"),
        (lambda: Group.from_name("E4"), ValueError, "group must be one of 'C1', 'C2'"),
        (lambda: Group.from_name("C17"), ValueError, "17 elements, at most 16.*'C16'"),
        (lambda: Group.from_name("D9"), ValueError, "18 elements, at most 16.*'D8'"),
        (lambda: Group.from_name(4), TypeError, "a name such as 'C4', got int 4"),
        (lambda: groups.lifting_basis("C4", 2), ValueError, "3 to 11, got 2; the nearest is 3"),
        (lambda: groups.lifting_basis("C4", 13), ValueError, "3 to 11, got 13; the nearest is 11"),
        (lambda: Group(4).parts(4), ValueError, "C4 has elements 0 to 3, got 4"),
        (
            lambda: Group(4).act_on_regular(torch.zeros(1, 2, 8, 5, 5), 0),
            ValueError,
            r"a regular field of C4 is \[B, F, 4, H, W\], got \[1, 2, 8, 5, 5\]",
        ),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
