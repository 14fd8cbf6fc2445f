"""Learning rates against torch's schedulers and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, StepLR

from eqcvt.train import TrainConfig
from eqcvt.train.schedule import learning_rate

STEPS, EPOCHS = 7, 10


def ours(schedule: str, warmup: float | None = None, **more: float) -> list[float]:
    config = TrainConfig.from_dict(
        {
            "data": "x",
            "schedule": schedule,
            "epochs": EPOCHS,
            "lr": 0.5,
            "warmup_epochs": warmup,
            **more,
        }
    )
    return [learning_rate(config, step, STEPS) for step in range(EPOCHS * STEPS)]


def torchs(kind: type[LRScheduler], every: int = 1, **arguments: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = kind(optimizer, **arguments)  # type: ignore[arg-type]
    rates = []
    for step in range(EPOCHS * STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0 and step + 1 < EPOCHS * STEPS:
            schedule.step()
    return rates


@pytest.mark.parametrize(("warmup", "share"), [(None, 0.3), (2.0, 0.2), (0.5, 0.05)])
def test_onecycle_is_torchs(warmup: float | None, share: float) -> None:
    total = EPOCHS * STEPS
    expected = torchs(
        OneCycleLR, max_lr=0.5, total_steps=total, pct_start=share, cycle_momentum=False
    )
    assert ours("onecycle", warmup) == pytest.approx(expected, rel=1e-9)


def test_cosine_is_torchs() -> None:
    expected = torchs(CosineAnnealingLR, T_max=EPOCHS * STEPS)
    assert ours("cosine") == pytest.approx(expected, rel=1e-9)


def test_step_is_torchs() -> None:
    expected = torchs(StepLR, every=STEPS, step_size=3, gamma=0.2)
    assert ours("step", step_epochs=3, step_gamma=0.2) == pytest.approx(expected, rel=1e-9)


def test_warmup_rises_linearly_to_the_top() -> None:
    rates = ours("constant", warmup=2)
    assert rates[:14] == pytest.approx([0.5 * (step + 1) / 14 for step in range(14)])
    assert set(rates[14:]) == {0.5}
    cosine = ours("cosine", warmup=2)
    assert cosine[:15] == pytest.approx([*rates[:14], 0.5])
    assert cosine[42] == pytest.approx(0.25)
    assert cosine == sorted(cosine[:14]) + sorted(cosine[14:], reverse=True)


def test_one_step_run() -> None:
    config = TrainConfig.from_dict({"data": "x", "epochs": 1})
    assert learning_rate(config, 0, 1) == config.lr
