"""Graphed steps are plain steps: the same numbers, whatever is recorded, read anew or refused.

Without a GPU a recorder of torch operations stands in for the CUDA graph, see ``recorder.py``.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

import eqcvt
from eqcvt.data import Augment, Batches, to_unit
from eqcvt.train import GraphedStep, Step, TrainConfig, train
from eqcvt.train import graph as graph_module
from eqcvt.train import loop as training_loop
from eqcvt.train.average import Average
from eqcvt.train.distributed import Process
from tests.train.recorder import Recorded
from tests.train.rings import SIZE, TINY, config, rings, without_times


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The recorders made during the test, which work without a GPU."""
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(graph_module, "Recorder", Recorded)
    return Recorded.made


DATA = rings(24)


def tiny_model(device: str = "cpu", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"in_channels": 1, "image_size": SIZE, **TINY, **changes}
    return eqcvt.create_model("eqcvt_c4", **settings).to(device).train()


def make(
    kind: type[Step],
    model: nn.Module,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    *,
    decay: float = 0.0,
    augment: str = "none",
    **options: Any,
) -> tuple[Step, Batches]:
    """A step on places in ``DATA``, as the training loop makes it, and the batches it takes."""
    device = next(model.parameters()).device
    batches = Batches(DATA, 8, device=device, shuffle=True, drop_last=True)
    turn = Augment(augment)

    def prepare(places: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = batches.take(places)
        return turn(to_unit(images)), labels

    made = optimizer(model.parameters(), fused=True, capturable=kind is GraphedStep)  # type: ignore[call-arg]
    average = Average(model, decay) if decay else None
    return kind(model, made, prepare=prepare, average=average, **options), batches


def state_of(step: Step) -> dict[str, Tensor]:
    """Everything that steps change."""
    found = dict(step.model.state_dict())
    if step.average is not None:
        found |= {f"average.{k}": v for k, v in step.average.state_dict().items()}
    for index, values in step.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    if step.scaler.is_enabled():
        found["scale"] = torch.tensor(step.scaler.get_scale())
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def take(step: Step, batches: Batches, epochs: int = 3, rate: float = 2.0**-7) -> list[Tensor]:
    """Some epochs with a rate that halves at every step; the losses."""
    losses = []
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        batches.set_epoch(epoch)
        for places in batches.places():
            for group in step.optimizer.param_groups:
                group["lr"] = rate
            losses.append(step(places))
            rate /= 2
    return losses


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "random": {"augment": "rotate"},
    "quarter turns": {"augment": "dihedral"},
    "mixed": {"augment": "mixed"},
    "everything": {"optimizer": torch.optim.AdamW, "clip": 0.1, "decay": 0.75, "augment": "rotate"},
    "bf16": {"amp": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_replays_equal_plain_steps(recorded: list[Recorded], case: str) -> None:
    results = []
    for kind in (Step, GraphedStep):
        step, batches = make(kind, tiny_model(), **CASES[case])
        losses = take(step, batches)
        results.append({**state_of(step), "losses": torch.stack(losses)})
    assert_equal(*results)
    assert (recorded[0].runs, recorded[0].recordings, recorded[0].replays) == (3, 1, 6)
    assert len(set(results[0]["losses"].tolist())) == 9


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_loss_scaling_skips_steps_in_replays(recorded: list[Recorded], clip: float) -> None:
    results = []
    for kind in (Step, GraphedStep):
        # The first scale is too large for float32: steps are skipped until it has come down.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**121, growth_interval=4)
        step, batches = make(kind, tiny_model(), scaler=scaler, clip=clip)
        step.loss_fn = lambda logits, labels: 64 * cross_entropy(logits, labels)
        take(step, batches)
        results.append(state_of(step))
    assert_equal(*results)
    taken = results[0]["optimizer.0.step"]
    assert 3 < taken < 7
    assert recorded[0].replays == 6


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_loss_scaling_is_undone(clip: float) -> None:
    results = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        step, batches = make(Step, tiny_model(), scaler=scaler, clip=clip)
        take(step, batches, epochs=1)
        results.append(dict(step.model.named_parameters()))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_rates_are_read_anew(recorded: list[Recorded]) -> None:
    """Set by value, or by torch's schedulers through the tensor that the rate becomes."""
    results = []
    for kind in (Step, GraphedStep):
        step, batches = make(kind, tiny_model())
        step.optimizer.param_groups[0]["lr"] = 2.0**-6
        schedule = torch.optim.lr_scheduler.ExponentialLR(step.optimizer, 0.5)
        for places in [*batches.places()] * 3:
            step(places)
            schedule.step()
        results.append(state_of(step))
    assert recorded[0].replays == 6
    assert_equal(*results)


def test_warm_up_takes_no_step_of_its_own(recorded: list[Recorded]) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    step, batches = make(GraphedStep, model, warmup=5)
    assert_equal(before, model.state_dict())
    take(step, batches, epochs=2)
    assert (recorded[0].runs, recorded[0].replays) == (5, 1)
    assert step.optimizer.state_dict()["state"][0]["step"] == 6


def test_losses_do_not_change_afterwards(recorded: list[Recorded]) -> None:
    step, batches = make(GraphedStep, tiny_model())
    losses = take(step, batches)
    assert len({float(loss) for loss in losses}) == len(losses)
    assert not any(loss.requires_grad for loss in losses)


def test_smaller_batch_is_run_without_the_graph(recorded: list[Recorded]) -> None:
    results = []
    for kind in (Step, GraphedStep):
        step, _ = make(kind, tiny_model())
        step.optimizer.param_groups[0]["lr"] = 2.0**-7
        for start, size in enumerate([8, 8, 8, 8, 5, 8, 3, 8]):
            step(torch.arange(start, start + size))
        results.append(state_of(step))
    assert_equal(*results)
    assert (recorded[0].runs, recorded[0].recordings, recorded[0].replays) == (5, 1, 3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_other_batches_are_refused(recorded: list[Recorded], when: str) -> None:
    model = tiny_model()
    step = GraphedStep(model, torch.optim.Adam(model.parameters(), fused=True, capturable=True))
    images, labels = torch.rand(4, 1, SIZE, SIZE), torch.arange(4) % 2
    for _ in range(1 if when == "before" else 5):
        step(images, labels)
    before = copy.deepcopy(model.state_dict())
    takes = r"takes batches like float32 \[4, 1, 33, 33\], int64 \[4\], got "
    for batch, got in {
        (images[..., 1:], labels): r"float32 \[4, 1, 33, 32\], int64 \[4\]: make another",
        (images.double(), labels): r"float64 \[4, 1, 33, 33\], int64 \[4\]",
        (images,): r"float32 \[4, 1, 33, 33\]: ",
    }.items():
        with pytest.raises(ValueError, match=takes + got):
            step(*batch)
    with pytest.raises(ValueError, match=r"the model is on cpu, got a batch on meta: move it"):
        step(images.to("meta"), labels)
    assert_equal(before, model.state_dict())


def test_optimizers_that_cannot_be_recorded_are_refused(recorded: list[Recorded]) -> None:
    model = tiny_model()
    for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters())):
        with pytest.raises(ValueError, match=r"made with capturable=True.*got (Adam|SGD) without"):
            GraphedStep(model, optimizer)
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)
    with pytest.raises(ValueError, match=r"loss scaling .* made with fused=True"):
        GraphedStep(model, optimizer, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(TypeError, match=r"needs an eqcvt\.train\.Average.*got AveragedModel"):
        GraphedStep(model, optimizer, average=AveragedModel(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        GraphedStep(model, optimizer, warmup=0)


def test_model_that_is_not_on_a_gpu_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"needs a model on a GPU, got one on cpu: move it"):
        GraphedStep(model, torch.optim.Adam(model.parameters(), capturable=True))


CHANGES = {
    "optimizer": "where tensors lie",
    "model": "where tensors lie",
    "buffer": "where tensors lie",
    "mode": "which modules are in training mode",
    "frozen norm": "which modules are in training mode",
    "unfrozen": "which parameters are trained",
    "betas": "the optimizer's betas",
    "weight decay": "the optimizer's weight_decay",
    "group": "where tensors lie, which parameters are trained, the optimizer's",
}


@pytest.mark.parametrize("change", CHANGES)
def test_replaced_state_is_recorded_anew(
    recorded: list[Recorded], caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """A graph that kept on writing to memory nobody reads would train nothing, silently."""
    results = []
    for kind in (Step, GraphedStep):
        model = tiny_model()
        model.lift[0].requires_grad_(change != "unfrozen")
        step, batches = make(kind, model)
        take(step, batches, epochs=2)
        group = step.optimizer.param_groups[0]
        if change == "optimizer":
            step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        elif change == "mode":
            step.model.eval()
        elif change == "frozen norm":
            model.lift[0].norm.eval()
        elif change == "buffer":
            model.lift[0].norm.running_mean = torch.ones(2)
        elif change == "unfrozen":
            model.lift[0].requires_grad_(True)
        elif change == "betas":
            group["betas"] = (0.5, 0.9)
        elif change == "weight decay":
            group["weight_decay"] = 0.5
        elif change == "group":
            model.late = torch.nn.Parameter(torch.ones(4))
            model.late.grad = torch.ones(4)
            step.optimizer.add_param_group({"params": [model.late], "lr": 0.1})
        else:
            for parameter in step.model.parameters():
                parameter.data = parameter.data.clone()
        take(step, batches, epochs=2)
        results.append(state_of(step))
    assert_equal(*results)
    assert (recorded[0].runs, recorded[0].recordings) == (6, 2)
    assert f"recording the training step anew: {CHANGES[change]}" in caplog.text


def test_schedules_of_momentum_are_followed(recorded: list[Recorded]) -> None:
    losses: list[list[float]] = []
    for kind in (Step, GraphedStep):
        step, batches = make(kind, tiny_model())
        schedule = torch.optim.lr_scheduler.OneCycleLR(step.optimizer, 2.0**-7, 9)
        losses.append([])
        for places in [*batches.places()] * 3:
            losses[-1].append(float(step(places)))
            schedule.step()
    assert recorded[0].replays > 0
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_what_waits_for_the_device_is_noticed(recorded: list[Recorded]) -> None:
    """The stand-in sees what a CUDA graph would refuse, or the tests above would mean nothing."""
    step, batches = make(GraphedStep, tiny_model())
    step.loss_fn = lambda logits, labels: cross_entropy(logits, labels) * logits.max().item()
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense.* waits for the device"):
        take(step, batches, epochs=2)


def test_callers_autocast_does_not_keep_old_weights(recorded: list[Recorded]) -> None:
    results = []
    around = (nullcontext(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu"))
    for kind, context in zip((Step, Step, GraphedStep), around, strict=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 2))
        step, batches = make(kind, model, amp=torch.bfloat16)
        with context:
            take(step, batches)
        results.append(state_of(step))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


@pytest.fixture
def graphed_runs(recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Let ``train`` use the graph on the CPU."""
    monkeypatch.setattr(training_loop, "_no_graph", lambda config, process: None)
    return recorded


@pytest.mark.parametrize(
    "changes", [{"augment": "rotate"}, {"ema": 0.8, "optimizer": "adamw", "clip": 0.5}]
)
def test_run_with_the_graph_is_the_run_without(
    graphed_runs: list[Recorded], tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = config(tmp_path, epochs=3, out=tmp_path / "plain", recalibrate=2, **changes)
    expected = without_times(train(plain, quiet=True).history)
    assert not graphed_runs
    result = train(replace(plain, cuda_graph=True, out=str(tmp_path / "graphed")), quiet=True)
    assert graphed_runs[0].replays == 6
    for row, other in zip(without_times(result.history), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_run_goes_on_with_the_other_kind_of_step(
    graphed_runs: list[Recorded], tmp_path: Path, first: bool
) -> None:
    whole = config(tmp_path, epochs=4, schedule="constant", ema=0.8, out=tmp_path / "whole")
    expected = without_times(train(whole, quiet=True).history)
    half = replace(whole, epochs=2, cuda_graph=first, out=str(tmp_path / "half"))
    train(half, quiet=True)
    rest = replace(half, epochs=4, cuda_graph=not first)
    result = train(rest, resume=True, quiet=True)
    assert len(graphed_runs) == 1
    for row, other in zip(without_times(result.history), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_resumed_run_with_the_graph_is_bit_equal(
    graphed_runs: list[Recorded], tmp_path: Path
) -> None:
    whole = config(tmp_path, epochs=4, schedule="constant", augment="rotate", cuda_graph=True)
    expected = without_times(train(whole, quiet=True).history)
    half = replace(whole, out=str(tmp_path / "half"))
    train(replace(half, epochs=2), quiet=True)
    assert without_times(train(half, resume=True, quiet=True).history) == expected


def test_run_that_could_have_the_graph_is_told_of_it(
    graphed_runs: list[Recorded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for graph, told in ((False, True), (True, False)):
        train(config(tmp_path, epochs=1, out=tmp_path / str(graph), cuda_graph=graph))
        assert ("--cuda-graph" in capsys.readouterr().out) == told
    assert len(graphed_runs) == 1


def test_run_without_a_gpu_says_so_and_is_the_plain_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = config(tmp_path, epochs=1, out=tmp_path / "plain")
    expected = without_times(train(plain, quiet=True).history)
    reason = "cuda_graph is not used: it needs a GPU, and this run is on device 'cpu'"
    with caplog.at_level(logging.INFO, "eqcvt"):
        result = train(replace(plain, cuda_graph=True, out=str(tmp_path / "graphed")))
    assert without_times(result.history) == expected
    assert capsys.readouterr().out.splitlines()[0] == reason
    assert caplog.messages == [reason]


@pytest.mark.parametrize(
    ("changes", "processes", "reason"),
    [
        ({}, 1, None),
        ({"amp": "fp16", "clip": 1.0, "ema": 0.9, "deterministic": True}, 1, None),
        ({}, 2, "it holds the step of a single process, and this run has 2"),
        ({"compile": True}, 1, "it does not hold what compile makes"),
    ],
)
def test_reasons_on_a_gpu(changes: dict[str, Any], processes: int, reason: str | None) -> None:
    run = TrainConfig(data="images.npz", cuda_graph=True, **changes)
    found = training_loop._no_graph(run, Process(0, processes, torch.device("cuda", 0)))
    assert found == reason or (reason and found and found.startswith(reason))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_replays_equal_plain_steps_on_the_gpu(case: str, dropout: float) -> None:
    """Random numbers included: a graph draws from the same generator in the same order."""
    results = []
    for kind in (Step, Step, GraphedStep):
        step, batches = make(kind, tiny_model("cuda", dropout=dropout), **CASES[case])
        losses = take(step, batches, epochs=4)
        results.append({**state_of(step), "losses": torch.stack(losses)})
    plain, again, graphed = results
    for name, tensor in graphed.items():
        # Kernels that add in any order differ between plain runs too.
        spread = 4 * float((again[name].double() - plain[name].double()).abs().max())
        torch.testing.assert_close(
            tensor, plain[name], rtol=1e-4, atol=1e-5 + spread, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "random",
    [{"augment": "rotate"}, {"augment": "dihedral"}, {"augment": "mixed"}, {"dropout": 0.5}],
)
def test_every_replay_draws_new_numbers(random: dict[str, Any]) -> None:
    model = tiny_model("cuda", dropout=random.get("dropout", 0.0))
    step, _ = make(GraphedStep, model, augment=random.get("augment", "none"))
    step.optimizer.param_groups[0]["lr"] = 0.0
    losses = [float(step(torch.arange(8, device="cuda"))) for _ in range(9)]
    assert len(set(losses)) > 6


@pytest.mark.gpu
def test_loss_scaling_on_the_gpu() -> None:
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60, growth_interval=4)
    step, batches = make(GraphedStep, tiny_model("cuda"), amp=torch.float16, scaler=scaler)
    losses = take(step, batches, epochs=20, rate=2.0**-7)
    assert 0 < int(step.optimizer.state_dict()["state"][0]["step"]) < len(losses)
    assert all(bool(p.isfinite().all()) for p in step.model.parameters())


@pytest.mark.gpu
def test_replays_never_wait_for_the_device() -> None:
    step, batches = make(
        GraphedStep, tiny_model("cuda"), clip=0.1, decay=0.5, augment="rotate", amp=torch.bfloat16
    )
    take(step, batches, epochs=2)
    places = list(batches.places())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, part in enumerate(places):
            step.optimizer.param_groups[0]["lr"] = 1e-3 / (number + 1)
            step(part)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_run_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, device="cuda", epochs=3, ema=0.8, clip=0.5, augment="rotate")
    expected = without_times(train(replace(run, out=str(tmp_path / "p")), quiet=True).history)
    result = train(replace(run, cuda_graph=True))
    assert "cuda_graph is not used" not in capsys.readouterr().out
    for row, other in zip(without_times(result.history), expected, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
