"""The choice between backends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import eqcvt
from eqcvt import fast, ops
from eqcvt.nn import set_backend
from eqcvt.ops import _backend


def test_a_call_holds_until_the_next_and_a_context_until_its_end() -> None:
    before = ops.current_backend()
    try:
        eqcvt.use_backend("reference")
        assert ops.current_backend() == "reference"
        with eqcvt.use_backend("native"):
            assert ops.current_backend() == "native"
        assert ops.current_backend() == "reference"
    finally:
        eqcvt.use_backend(before)


def test_a_choice_can_be_entered_again() -> None:
    choice = eqcvt.use_backend("reference")
    for _ in range(2):
        with choice:
            assert ops.current_backend() == "reference"
        assert ops.current_backend() == "auto"


@pytest.mark.parametrize("cls", [fast.EqCvT, fast.CvT])
def test_fast_models_compile_without_graph_breaks_at_their_first_call(
    cls: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eqcvt.ops._backend._refusals", set())
    model = cls(in_channels=1, image_size=33).eval()
    x = torch.rand(2, 1, 33, 33)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, model(x))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the native backend refuse the CPU, and forget what was said of it."""
    monkeypatch.setitem(_backend._REASONS, "native", lambda device: f"none for {device}")
    monkeypatch.setattr(_backend, "_refusals", set())


def _small() -> torch.nn.Module:
    return fast.EqCvT(1, image_size=33).eval()


@pytest.mark.usefixtures("refused")
def test_a_backend_that_cannot_serve_raises_with_its_reason() -> None:
    x = torch.rand(1, 1, 33, 33)
    message = "backend 'native' cannot serve lift on cpu: none for cpu; use_backend"
    with eqcvt.use_backend("native"), pytest.raises(ops.CannotServe, match=message):
        _small()(x)
    with eqcvt.use_backend("native"):
        eqcvt.EqCvT(1, image_size=33).eval()(x)  # the reference stays the reference


@pytest.mark.usefixtures("refused")
def test_the_automatic_choice_logs_each_refusal_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = _small(), torch.rand(1, 1, 33, 33)
    with caplog.at_level("INFO", "eqcvt"):
        model(x)
        model(x)
    said = [record.message for record in caplog.records if "not native" in record.message]
    assert sorted(said) == [f"{op} on cpu: not native, none for cpu" for op in sorted(_backend.OPS)]


@pytest.mark.needs("native")
def test_a_saved_graph_runs_where_nothing_was_chosen_before() -> None:
    call = (
        "import torch, eqcvt.ops; t = torch.ones; seed = torch.zeros(1, dtype=torch.int64);"
        "x = t(1, 2, 16), t(16), t(16), t(8, 16), t(8), t(16, 8), t(16), seed;"
        "torch.ops.eqcvt.mlp_block_forward(*x, dropout=0.0, eps=1e-5, backend={!r})"
    )
    subprocess.run([sys.executable, "-c", call.format("native")], check=True)
    elsewhere = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", call.format("triton")]
    run = subprocess.run(command, env=elsewhere, capture_output=True, text=True, check=False)
    assert "CannotServe: this graph needs backend 'triton' for mlp_block on cpu" in run.stderr


def test_explain_names_one_choice_for_each_op_and_device() -> None:
    rows = ops.explain(("cpu", "cuda"))
    assert {row.op for row in rows} == {"conv_attention", "lift", "mlp_block", "token_embed"}
    for op in {row.op for row in rows}:
        for device in ("cpu", "cuda"):
            mine = [row for row in rows if (row.op, row.device) == (op, device)]
            assert [row.chosen for row in mine].count(True) == 1
            assert mine[-1].backend == "reference"
            assert all(row.reason is not None for row in mine if not row.available)
            assert all(row.reason is None for row in mine if row.chosen)


def test_explain_tells_of_the_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with eqcvt.use_backend("reference"):
        rows = ops.explain(("cpu", "cuda"))
    assert {row.backend for row in rows if row.chosen} == {"reference"}
    left = [row.reason for row in rows if row.available and not row.chosen]
    assert set(left) <= {"'reference' is asked for"}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with eqcvt.use_backend("triton"):
        rows = ops.explain(("cpu",))
    assert not any(row.chosen for row in rows)
    assert [row.reason for row in rows if row.backend == "triton"] == ["it does not run on cpu"] * 4


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="got 'tritn'; did you mean 'triton'"):
        eqcvt.use_backend("tritn")
    with pytest.raises(ValueError, match=r"backend must be .* got 'nativ'; did you mean 'native'"):
        set_backend(fast.EqCvT(1, image_size=33), "nativ")
    sizes = (1, 2, 1, 1), (2,), (2,), (2, 2), (2,), (2, 2), (2,)
    with pytest.raises(ValueError, match=r"^backend must be one of .* got 'cuda'"):
        ops.mlp_block(*map(torch.ones, sizes), backend="cuda")


def test_an_unknown_backend_in_the_environment_is_named() -> None:
    code = "import torch, eqcvt.fast; eqcvt.fast.EqCvT(1, image_size=33)(torch.rand(2, 1, 33, 33))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"EQCVT_BACKEND": "cuda", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert run.returncode != 0
    assert "EQCVT_BACKEND must be one of 'auto', 'reference', 'native', 'triton', got 'cuda'" in (
        run.stderr
    )


@pytest.mark.needs("native")
def test_forward_mode_derivatives_are_never_zero_for_want_of_one() -> None:
    x = torch.randn(2, 16, 5, 5)
    parameters = [torch.randn(s) for s in ((16,), (16,), (8, 16), (8,), (16, 8), (16,))]

    def call(x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        with eqcvt.use_backend("auto"):
            return ops.mlp_block(x, *parameters, backend=backend)

    def along(backend: str) -> torch.Tensor:
        tangent: torch.Tensor
        _, tangent = torch.func.jvp(lambda t: call(t, backend), (x,), (torch.ones_like(x),))
        return tangent

    assert along("reference").abs().max() > 0.1
    torch.testing.assert_close(along("auto"), along("reference"))
    with pytest.raises(ops.CannotServe, match="no forward-mode derivatives of mlp_block"):
        along("native")
    assert call(x).grad_fn is None  # and the choice is the fast one again


@pytest.mark.needs("native")
def test_transforms_of_torch_func_are_those_of_plain_pytorch() -> None:
    stages = [{"dim": 8, "head_dim": 16}]
    model = fast.EqCvT(1, image_size=33, fields=2, stages=stages, head_hidden=None).eval()
    images = torch.rand(3, 1, 33, 33)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(model, parameters, (image[None],))
        return found.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    model(images).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, atol=1e-4, rtol=1e-4)
    match = r"backend 'native' has no torch.func transforms \(grad, vmap\) of lift"
    with eqcvt.use_backend("native"), pytest.raises(ops.CannotServe, match=match):
        torch.func.grad(loss)(parameters, images[0])
