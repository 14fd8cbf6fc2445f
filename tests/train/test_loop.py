"""The training loop: what it writes, when it stops, and what each switch does."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import eqcvt
from eqcvt import ops
from eqcvt.data import LensingImages, load, to_unit
from eqcvt.nn import SteerableLift
from eqcvt.train import TrainConfig, evaluate, train
from eqcvt.train import loop as training_loop
from eqcvt.train.schedule import learning_rate
from tests.train.rings import config, rings, without_times


@pytest.fixture
def gradients() -> Iterator[list[float]]:
    """The norm of the whole gradient at each optimiser step of the test."""
    norms: list[float] = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))

    handle = register_optimizer_step_pre_hook(record)
    yield norms
    handle.remove()


def test_run_learns_and_leaves_a_whole_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path, epochs=12, batch_size=4, lr=0.01)
    result = train(run)
    assert result.best_accuracy == 1.0
    assert result.best_epoch == 1 + max(
        range(len(result.history)),
        key=lambda i: (result.history[i]["val_accuracy"], -result.history[i]["val_loss"]),
    )
    assert result.last_accuracy == result.history[-1]["val_accuracy"]
    keys = "epoch train_loss val_loss val_accuracy val_auc lr images_per_second seconds"
    assert [list(row) for row in result.history] == [keys.split()] * len(result.history)
    folder = result.folder
    assert folder == tmp_path / "run"
    assert json.loads((folder / "metrics.json").read_text()) == result.history
    assert TrainConfig.from_file(folder / "config.toml") == run
    assert {p.name for p in folder.iterdir()} == {
        "config.toml",
        "classes.json",
        "train.lock",
        "trained_on.safetensors",
        "metrics.json",
        "best",
        "last",
    }
    best = evaluate(eqcvt.load_model(folder / "best"), load(run.val_data or ""), device="cpu")
    row = result.history[result.best_epoch - 1]
    assert best["accuracy"] == row["val_accuracy"]
    assert best["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch  1/12  loss ")
    assert len([line for line in lines if line.startswith("epoch")]) == len(result.history)


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, epochs=1), quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "nothing.npz"},
        {"batch_size": 25},
        {"model_kwargs": {"fields": 0}},
        {"init": "nothing"},
        {"init": "RUN", "model": "cvt", "model_kwargs": {}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_that_cannot_start_leaves_the_one_it_replaces(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = config(tmp_path, epochs=1)
    train(run, quiet=True)

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    before = files()
    changes = {k: run.out if v == "RUN" else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError)):
        train(replace(run, **changes), overwrite=True, quiet=True)
    assert files() == before


def test_a_run_starts_from_the_one_it_replaces(tmp_path: Path) -> None:
    run = config(tmp_path, epochs=6, batch_size=4, lr=0.01)
    first = train(run, quiet=True)
    still = replace(run, init=run.out, lr=1e-9, epochs=1, recalibrate=0)
    second = train(still, overwrite=True, quiet=True)
    assert second.best_accuracy == first.best_accuracy
    assert len(second.history) == 1


def test_two_deterministic_runs_are_bit_equal(tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        run = config(tmp_path, out=tmp_path / name, deterministic=True, augment="rotate")
        torch.manual_seed(len(results))
        state = torch.get_rng_state()
        results.append(train(run, quiet=True))
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert without_times(results[0].history) == without_times(results[1].history)
    weights = [load_file(r.folder / "last" / "model.safetensors") for r in results]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    losses = [
        train(config(tmp_path, epochs=1, seed=s, out=tmp_path / str(s)), quiet=True).history
        for s in (0, 1)
    ]
    assert losses[0][0]["train_loss"] != losses[1][0]["train_loss"]


def test_clip_bounds_the_gradient(tmp_path: Path, gradients: list[float]) -> None:
    train(config(tmp_path, epochs=1), quiet=True)
    assert min(gradients) > 0.01
    gradients.clear()
    train(config(tmp_path, epochs=1, clip=0.01), overwrite=True, quiet=True)
    assert gradients == pytest.approx([0.01] * 3, rel=1e-3)


def test_average_follows_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decay = 0.7
    steps: list[dict[str, torch.Tensor]] = []
    step = training_loop._Run._step

    def record(self: Any, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        steps.append({k: v.double().clone() for k, v in self.state.model.state_dict().items()})
        return loss

    monkeypatch.setattr(training_loop._Run, "_step", record)
    train(config(tmp_path, epochs=1, ema=decay, recalibrate=0), quiet=True)
    saved = load_file(tmp_path / "run" / "last" / "model.safetensors")
    state = load_file(tmp_path / "run" / "last" / "training_state.safetensors")
    checked = 0
    for name, tensor in saved.items():
        if not tensor.is_floating_point():
            continue
        average = steps[0][name]
        for weights in steps[1:]:
            average = decay * average + (1 - decay) * weights[name]
        torch.testing.assert_close(tensor.double(), average, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state[f"model.{name}"].double(), steps[-1][name])
        checked += not torch.equal(tensor, state[f"model.{name}"])
    assert checked > 10


def test_recalibrated_statistics_of_mixed_images_are_those_of_both_kinds(tmp_path: Path) -> None:
    variances = {}
    for augment in ("none", "mixed", "rotate"):
        run = config(tmp_path, epochs=1, batch_size=12, augment=augment, recalibrate=99, lr=1e-9)
        train(run, quiet=True, overwrite=True)
        name = "lift.0.norm.running_var"
        variances[augment] = load_file(tmp_path / "run" / "last" / "model.safetensors")[name]
    assert torch.allclose(variances["rotate"], variances["none"], rtol=1e-3)
    assert (variances["mixed"] < 0.95 * variances["none"]).all()


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_recalibrated_statistics_are_those_of_the_training_images_as_stored(
    tmp_path: Path, ema: float
) -> None:
    run = config(tmp_path, batch_size=12, augment="rotate", recalibrate=99, ema=ema)
    train(run, quiet=True)
    model = eqcvt.load_model(tmp_path / "run" / "last")
    assert isinstance(model, eqcvt.EqCvT)
    block = model.lift[0]
    assert isinstance(block, SteerableLift)
    images = to_unit(torch.from_numpy(load(run.data).images)) * block.mask
    u = ops.lift_conv2d(images, block.bank(), padding=block.padding)
    torch.testing.assert_close(block.norm.running_mean, u.mean((0, 2, 3, 4)), rtol=1e-4, atol=1e-6)
    assert block.norm.num_batches_tracked == 2
    assert block.norm.momentum == 0.1


def test_best_epoch_and_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.from_numpy(load(config(tmp_path).val_data or "").labels).long()
    sign = 2.0 * torch.nn.functional.one_hot(labels, 2) - 1
    wrong = sign.clone()
    wrong[:3] *= -1
    # Accuracy, then loss: worse, best, same accuracy with a higher loss, with a lower one, worse...
    script = iter([wrong, sign, 0.5 * sign, 2 * sign, wrong, wrong, 3 * sign])
    monkeypatch.setattr(training_loop._Run, "_validate", lambda self: next(script).double())
    run = config(tmp_path, epochs=7, early_stopping=2, recalibrate=0)
    result = train(run, quiet=True)
    assert result.stopped_early
    assert (result.best_epoch, result.best_accuracy, len(result.history)) == (4, 1.0, 6)
    assert result.last_accuracy == pytest.approx(8 / 11)
    kept = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert int(kept["head.norm.num_batches_tracked"]) == 4 * 3
    assert train(run, resume=True, quiet=True).history == result.history
    patient = replace(run, early_stopping=3)
    assert train(patient, resume=True, quiet=True).best_epoch == 7


def test_rate_of_every_step_reaches_the_optimizer(tmp_path: Path) -> None:
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    run = config(tmp_path, schedule="cosine", warmup_epochs=0.5)
    history = train(run, quiet=True).history
    handle.remove()
    assert rates == [learning_rate(run, step, 3) for step in range(6)]
    assert len(set(rates)) > 3
    assert [row["lr"] for row in history] == [rates[2], rates[5]]


def test_adamw_spares_norms_and_biases(tmp_path: Path) -> None:
    # Rate times decay is 0.999: the one step all but erases decayed weights.
    run = config(tmp_path, epochs=1, optimizer="adamw", schedule="constant", lr=1e-6)
    run = replace(run, weight_decay=0.999e6, batch_size=24)
    train(run, quiet=True)
    model = eqcvt.load_model(tmp_path / "run" / "last")
    spared = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        norm_weight = name in spared and name.endswith("weight")
        if norm_weight:
            assert parameter.detach().min() > 0.9, name
        elif name not in spared:
            assert parameter.detach().abs().max() < 0.01, name
    assert any(name.endswith("weight") for name in spared)


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = config(tmp_path, lr=1e30, schedule="constant")
    message = r"the (training|validation) loss became .* in epoch 1.*after epoch 0 .*clip=1"
    with pytest.raises(FloatingPointError, match=message):
        train(run, quiet=True)
    state = load_file(tmp_path / "run" / "last" / "training_state.safetensors")
    assert all(bool(t.isfinite().all()) for t in state.values())


def test_step_of_the_first_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = training_loop._Run._step, []

    def broken(self: Any, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return step(self, *arguments) * (float("nan") if len(calls) >= 5 else 1)

    monkeypatch.setattr(training_loop._Run, "_step", broken)
    with pytest.raises(FloatingPointError, match="became nan at step 2 of 3 in epoch 2"):
        train(config(tmp_path), quiet=True)


def test_bf16_trains(tmp_path: Path) -> None:
    exact = train(config(tmp_path, epochs=1), quiet=True).history[0]["train_loss"]
    run = config(tmp_path, epochs=1, amp="bf16", out=tmp_path / "bf16")
    rounded = train(run, quiet=True).history[0]["train_loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_fp16_is_refused_where_auto_means_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="amp='fp16' needs a GPU; on the CPU use"):
        train(config(tmp_path, amp="fp16", device="auto"), quiet=True)


def test_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:99' \(GPU 99\) was asked for, but torch"):
        train(config(tmp_path, device="cuda:99"), quiet=True)


def test_compile_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    train(config(tmp_path, epochs=1), quiet=True)
    assert not compiled
    train(config(tmp_path, epochs=1, compile=True), overwrite=True, quiet=True)
    assert [type(model) for model in compiled] == [eqcvt.EqCvT]


@pytest.mark.needs("tensorboard")
def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(config(tmp_path, tensorboard=True), quiet=True).history
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("val_loss")]
    assert values == pytest.approx([row["val_loss"] for row in history], rel=1e-6)


def test_missing_tensorboard_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "eqcvt\[tensorboard\]"'):
        train(config(tmp_path, tensorboard=True), quiet=True)
    assert not (tmp_path / "run").exists()


def test_three_classes_and_a_cvt(tmp_path: Path) -> None:
    rings(30, classes=3).save(tmp_path / "three.npz")
    run = config(tmp_path, epochs=1, data=tmp_path / "three.npz", val_data=None, val_fraction=0.3)
    run = replace(
        run,
        model="cvt",
        model_kwargs={"stages": [{"dim": 8, "embed_stride": 4}], "head_hidden": "none"},
    )
    result = train(run, quiet=True)
    model = eqcvt.load_model(result.folder / "best")
    assert (model.config["num_classes"], model.config["head_hidden"]) == (3, None)
    assert TrainConfig.from_file(result.folder / "config.toml") == run
    assert result.history[0]["val_auc"] is not None


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    run = config(tmp_path, epochs=1)
    (tmp_path / "set").mkdir()
    for name in ("train", "val"):
        (tmp_path / f"{name}.npz").rename(tmp_path / "set" / f"{name}.npz")
    expected = without_times(
        train(
            replace(
                run,
                data=str(tmp_path / "set" / "train.npz"),
                val_data=str(tmp_path / "set" / "val.npz"),
            ),
            quiet=True,
        ).history
    )
    run = replace(run, data=str(tmp_path / "set"), val_data=None, out=str(tmp_path / "b"))
    assert without_times(train(run, quiet=True).history) == expected


def test_images_in_both_sets_are_refused_and_images_drawn_twice_are_said(tmp_path: Path) -> None:
    data = rings(24)
    data.subset([*range(4), 5, 5]).save(tmp_path / "some.npz")
    data.save(tmp_path / "data.npz")
    run = config(tmp_path, epochs=1, data=tmp_path / "data.npz", val_data=tmp_path / "some.npz")
    with pytest.raises(ValueError, match="6 of the 6 validation images are training images too"):
        train(run, quiet=True)
    data.subset([0, 1] * 12).save(tmp_path / "data.npz")
    with pytest.warns(UserWarning, match=r"training images too: .*data.npz holds images twice"):
        train(replace(run, val_data=None), quiet=True)


def test_validation_of_one_class_has_no_auc(tmp_path: Path) -> None:
    one = rings(8)
    one.subset(one.labels == 1).save(tmp_path / "one.npz")
    result = train(config(tmp_path, epochs=1, val_data=tmp_path / "one.npz"), quiet=True)
    assert result.history[0]["val_auc"] is None


def small() -> LensingImages:
    data = rings(6)
    return LensingImages(data.images[:, :29, :29], data.labels, data.classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 25}, "25 is more than the 24 training images: the largest allowed is 24"),
        ({"val_data": "small.npz"}, r"differ in size: \(33, 33\) and \(29, 29\)"),
        ({"val_data": "three.npz"}, r"differ in classes: \('no_sub', 'sub'\) and"),
        ({"data": "ones.npz"}, "there are no training images of 'no_sub' .*ones.npz"),
        ({"data": "one.npz", "val_data": "one.npz"}, "no training images of a second class"),
        ({"model_kwargs": {"in_channels": 3}}, "model_kwargs says in_channels=3, the data has 1"),
        ({"model_kwargs": {"num_classes": 3}}, "model_kwargs says num_classes=3, the data has 2"),
        ({"data": "flat.npz", "val_data": None}, "models take square images, got 33x29 pixels"),
        ({"model": "eqcvt_c4_exact", "data": "even.npz", "val_data": None}, "image_size=32"),
    ],
)
def test_data_and_model_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data = rings(24)
    small().save(tmp_path / "small.npz")
    rings(6, classes=3).save(tmp_path / "three.npz")
    replace(data, images=data.images[:, :, :29]).save(tmp_path / "flat.npz")
    replace(data, images=data.images[:, :32, :32]).save(tmp_path / "even.npz")
    ones = replace(data, labels=np.ones(24, np.uint8))
    ones.save(tmp_path / "ones.npz")
    replace(ones, labels=np.zeros(24, np.uint8), classes=("lens",)).save(tmp_path / "one.npz")
    for key in ("data", "val_data"):
        if changes.get(key):
            changes = {**changes, key: tmp_path / changes[key]}
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, **changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_missing_data_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.npz"):
        train(config(tmp_path, data=tmp_path / "nothing.npz", tensorboard=True), quiet=True)
    assert not (tmp_path / "run").exists()
