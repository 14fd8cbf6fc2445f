"""Training curves of the fast models are the reference's: to rounding, and within seed noise.

Without dropout the two differ by rounding alone, which these short runs do not blow up: each curve
is held to the tolerance rule, with a float64 run of the reference as the truth. With dropout the
kernels draw masks of their own, so curves of one seed differ as far as other masks take them. That,
like a rounding that moves an image over the border, must stay below what another seed does: the
root mean square of the differences below the standard deviation over seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from eqcvt import create_model, use_backend
from eqcvt.train import setup, train
from tests.tolerance import assert_as_good
from tests.train.rings import TINY, config, rings

pytestmark = pytest.mark.needs("native")

SEEDS, EPOCHS = range(3), 4
METRICS = ("train_loss", "val_loss", "val_accuracy", "val_auc")
Curves = Callable[..., Tensor]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """A function that trains with a backend and returns ``[seeds, epochs, metrics]``."""
    folder = tmp_path_factory.mktemp("curves")
    for name, count in (("train", 48), ("val", 64)):
        rings(count, seed=count, noise=120.0).save(folder / f"{name}.npz")

    @cache
    def run(backend: str, amp: str, dropout: float, double: bool = False) -> Tensor:
        stages = [{"dim": 16, "head_dim": 16, "heads": 2, "mlp_ratio": 2}]
        model = {**TINY, "stages": stages, "dropout": dropout}
        rows = []
        with pytest.MonkeyPatch.context() as patch, use_backend(backend):
            if double:
                patch.setattr(setup, "create_model", lambda *a, **k: create_model(*a, **k).double())
            for seed in SEEDS:
                out = folder / f"{backend}-{amp}-{dropout}-{double}-{seed}"
                settings = {"model_kwargs": model, "amp": amp, "seed": seed, "out": out}
                # Without decay Adam would not see a gradient that is too long or too short.
                settings |= {"epochs": EPOCHS, "lr": 3e-3, "recalibrate": 2, "weight_decay": 0.01}
                history = train(config(folder, **settings), quiet=True).history
                rows.append([[row[metric] for metric in METRICS] for row in history])
        return torch.tensor(rows, dtype=torch.float64)

    return run


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_losses_differ_from_the_reference_s_by_rounding(curves: Curves, amp: str) -> None:
    exact = curves("reference", "off", 0.0, double=True)[..., :2]
    actual, reference = (curves(b, amp, 0.0)[..., :2].float() for b in ("native", "reference"))
    assert_as_good(actual, exact, reference)


@pytest.mark.parametrize(("amp", "dropout"), [("off", 0.0), ("bf16", 0.0), ("bf16", 0.1)])
def test_every_metric_agrees_within_seed_noise(curves: Curves, amp: str, dropout: float) -> None:
    actual, reference = (curves(backend, amp, dropout) for backend in ("native", "reference"))
    assert (reference[:, -1, 2] > 0.8).all()  # it learns, so that there is something to compare
    difference = (actual - reference).square().mean((0, 1)).sqrt()
    noise = reference.var(0).mean(0).sqrt()
    for metric, d, n in zip(METRICS, difference.tolist(), noise.tolist(), strict=True):
        assert d < n, f"{metric} differs by {d:.3g}, seeds by {n:.3g}"
