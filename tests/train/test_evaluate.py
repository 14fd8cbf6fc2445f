"""Metrics against values worked out by hand; robustness of toys whose answer is known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eqcvt
from eqcvt.data import LensingImages
from eqcvt.train import evaluate, logits_over_angles, predict_logits
from eqcvt.train.evaluate import rotate
from eqcvt.train.metrics import aucs, classification
from tests.train.rings import SIZE, TINY, rings


class Toy(nn.Module):
    """Logits (s, -s), with s the brightness under a fixed template."""

    def __init__(self, template: Tensor, group: str = "C4") -> None:
        super().__init__()
        self.template = nn.Parameter(template.double())
        self.config: dict[str, Any] = {"group": group, "in_channels": 1}

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.template).sum((1, 2, 3))
        return torch.stack([score, -score], dim=1)


def probabilities(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows).double().log()


def test_binary_metrics_by_hand() -> None:
    logits = probabilities((0.9, 0.1), (0.4, 0.6), (0.3, 0.7), (0.2, 0.8), (0.55, 0.45))
    labels = torch.tensor([0, 0, 1, 1, 1])
    result = classification(logits, labels, ("a", "b"))
    assert result["accuracy"] == pytest.approx(0.6)
    assert result["confusion"] == [[1, 1], [1, 2]]
    # Of the 6 pairs only (0.6, 0.45) is in the wrong order.
    assert result["auc"] == pytest.approx([5 / 6, 5 / 6])
    loss = -sum(map(math.log, (0.9, 0.4, 0.7, 0.8, 0.45))) / 5
    assert result["loss"] == pytest.approx(loss)
    # One image in each of the 15 bins: |right - confidence|.
    assert result["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.2 + 0.55) / 5)
    # By falling probability of b: b, b, a, b, a. No corner is left out.
    assert result["roc"][1]["fpr"] == pytest.approx([0, 0, 0.5, 0.5, 1])
    assert result["roc"][1]["tpr"] == pytest.approx([0, 2 / 3, 2 / 3, 1, 1])
    assert (result["n"], result["classes"], result["notes"]) == (5, ["a", "b"], [])


def test_three_classes_by_hand() -> None:
    logits = probabilities((0.5, 0.3, 0.2), (0.1, 0.65, 0.25), (0.2, 0.5, 0.3), (0.6, 0.35, 0.05))
    labels = torch.tensor([0, 1, 2, 1])
    result = classification(logits, labels, ("a", "b", "c"))
    assert result["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert result["accuracy"] == 0.5
    # a: 0.5 against 0.1, 0.2, 0.6. b: 0.65 and 0.35 against 0.3 and 0.5. c: 0.3 beats all.
    assert result["auc"] == pytest.approx([2 / 3, 3 / 4, 1])


def test_sure_predictions_keep_their_order() -> None:
    logits = torch.tensor([[0.0, 30.0], [0.0, 40.0], [0.0, 50.0]])
    result = classification(logits, torch.tensor([0, 1, 1]), ("a", "b"))
    assert result["auc"][1] == 1.0


@pytest.mark.parametrize("classes", [2, 3])
def test_the_order_of_very_sure_predictions_counts(classes: int) -> None:
    from torchmetrics.functional.classification import binary_auroc

    torch.manual_seed(0)
    logits, labels = torch.randn(400, classes).double(), torch.randint(classes, (400,))
    logits[range(400), labels] += 1
    names = "abc"[:classes]
    wanted = classification(logits, labels, names)
    for k in range(classes):
        other = binary_auroc(logits.softmax(1)[:, k], (labels == k).long())
        assert wanted["auc"][k] == pytest.approx(float(other), abs=1e-6)
    # All are sure of the first class: the order of its odds stays, and of two classes that of both.
    sure = classification(logits + 45 * torch.eye(classes)[0], labels, names)
    same = range(classes if classes == 2 else 1)
    assert [(sure["auc"][k], sure["roc"][k]) for k in same] == [
        (wanted["auc"][k], wanted["roc"][k]) for k in same
    ]


def test_a_roc_curve_has_corners_only() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    result = classification((torch.randn(300, 3) + 2 * torch.eye(3)[labels]), labels, "abc")
    for curve, area in zip(result["roc"], result["auc"], strict=True):
        x, y = torch.tensor(curve["fpr"]).double(), torch.tensor(curve["tpr"]).double()
        assert float(torch.trapezoid(y, x)) == pytest.approx(area, abs=1e-6)
        a, b = x.diff(), y.diff()
        assert ((a[:-1] * b[1:] - a[1:] * b[:-1]).abs() > 1e-6).all()
    tied = classification(torch.zeros(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]), "ab")
    assert (tied["auc"], tied["roc"][0]) == ([0.5, 0.5], {"fpr": [0, 1], "tpr": [0, 1]})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    logits = torch.zeros(5, 2)
    logits[1:3, 0] = value
    labels = torch.tensor([0, 1, 0, 1, 1])
    with pytest.raises(ValueError, match="logits of 2 of 5 images are NaN or infinite"):
        aucs(logits, labels)
    with pytest.raises(ValueError, match=r"logits of 2 of 5 images are NaN or infinite.* image 1"):
        classification(logits, labels, "ab")
    logits[1:3] = torch.tensor([-math.inf, 0])
    result = classification(logits, torch.tensor([0, 1, 1, 0, 0]), "ab")
    assert result["auc"] == [1, 1]


def test_single_class_has_no_auc_and_says_so() -> None:
    data = rings(8)
    data = data.subset(data.labels == 1)
    result = evaluate(Toy(torch.ones(1, SIZE, SIZE)), data, device="cpu", rotations=False)
    assert result["auc"] == [None, None]
    assert result["roc"] == [{"fpr": [], "tpr": []}] * 2
    assert result["notes"] == [
        "AUC and ROC of class 'no_sub' are undefined: 0 of 4 images belong to it",
        "AUC and ROC of class 'sub' are undefined: 4 of 4 images belong to it",
    ]
    assert "rotation" not in result
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("group", ["C4", "D4"])
def test_invariant_toy_does_not_move(group: str) -> None:
    disc = (torch.hypot(*torch.meshgrid(*[torch.arange(SIZE) - 16.0] * 2, indexing="ij")) < 9)[None]
    # A sum of whole grey values is exact in any order.
    model = Toy(disc * 255.0, group)
    robust = evaluate(model, rings(5), device="cpu", batch_size=2)["rotation"]
    assert robust["residual_group"] < 1e-9
    assert robust["std_group"] < 1e-9
    assert robust["std_45"] > 0.1
    assert robust["group"] == group


def test_constant_toy_gives_zero() -> None:
    robust = evaluate(Toy(torch.zeros(1, SIZE, SIZE)), rings(3), device="cpu")["rotation"]
    assert {robust[k] for k in ("std_45", "std_22", "std_group", "residual_group")} == {0}
    assert robust["logits_mean"] == [[0.0, 0.0]] * 8
    assert robust["angles"] == [0, 45, 90, 135, 180, 225, 270, 315]


def corner_images() -> LensingImages:
    """One image black but for its upper left corner."""
    images = np.zeros((1, SIZE, SIZE), np.uint8)
    images[0, 0, 0] = 255
    return LensingImages(images, np.zeros(1, np.uint8))


def test_corner_toy_by_hand() -> None:
    template = torch.zeros(1, SIZE, SIZE)
    template[0, 0, 0] = 8.0
    robust = evaluate(Toy(template), corner_images(), device="cpu")["rotation"]
    # The logit is +-8 unturned; quarter turns take the bright corner away from the template, and
    # turns by 45 degrees out of the image.
    assert robust["residual_group"] == 8
    assert robust["std_group"] == pytest.approx(8 * math.sqrt(1 / 4 - 1 / 16))
    assert robust["std_45"] == pytest.approx(8 * math.sqrt(1 / 8 - 1 / 64))
    assert robust["logits_mean"][0] == [8, -8]


def test_what_looks_at_the_noise_alone_moves_where_some_turns_interpolate() -> None:
    class Noise(Toy):
        def forward(self, x: Tensor) -> Tensor:
            middle = x[..., 8:25, 8:25]  # which no turn mixes with what comes from outside
            return middle.flatten(1).std(1)[:, None] * torch.tensor([1.0, -1.0])

    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE), np.uint8)
    data = LensingImages(images, np.zeros(4, np.uint8))
    robust = evaluate(Noise(torch.zeros(1, SIZE, SIZE)), data, device="cpu")["rotation"]
    assert robust["std_45"] > 5 * robust["std_22"]


def test_the_accuracy_of_turned_images_is_theirs() -> None:
    class Sharp(Toy):
        """Takes pixels with all of their noise for class 0, smoothed ones for class 1."""

        def forward(self, x: Tensor) -> Tensor:
            noise = x[..., 8:25, 8:25].flatten(1).std(1)
            return torch.stack([8 * noise, torch.full_like(noise, 2.0)], 1)

    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE), np.uint8)
    for label, right in ((0, 0.0), (1, 1.0)):
        data = LensingImages(images, np.full(4, label, np.uint8), ("no_sub", "sub"))
        found = evaluate(Sharp(torch.zeros(1, SIZE, SIZE)), data, device="cpu")
        assert found["accuracy"] == 1 - right
        assert found["rotation"]["accuracy_22"] == right


def test_mirrors_count_for_d_groups_only() -> None:
    # A pinwheel: the same after a quarter turn, another in the mirror.
    blade = torch.zeros(SIZE, SIZE)
    blade[2, 10] = 8.0
    template = sum((blade.rot90(k, (0, 1)) for k in range(4)), torch.zeros(SIZE, SIZE))[None]
    images = np.zeros((1, SIZE, SIZE), np.uint8)
    images[0, 2, 10] = 255
    data = LensingImages(images, np.zeros(1, np.uint8))
    only_turns = evaluate(Toy(template, "C4"), data, device="cpu")["rotation"]
    mirrors = evaluate(Toy(template, "D4"), data, device="cpu")["rotation"]
    assert (only_turns["residual_group"], mirrors["residual_group"]) == (0, 8)
    assert mirrors["std_group"] == pytest.approx(4)
    assert mirrors["std_45"] == only_turns["std_45"]


@pytest.mark.parametrize("angle", [0, 90, 180, 270, -90, 450])
def test_quarter_turns_are_exact_and_counter_clockwise(angle: float) -> None:
    x = torch.rand(2, 1, SIZE, SIZE)
    assert torch.equal(rotate(x, angle), x.rot90(int(angle) // 90, (2, 3)))
    interpolated = rotate(x, angle + 1e-4)
    torch.testing.assert_close(interpolated, rotate(x, angle), rtol=0, atol=1e-3)


def test_logits_over_angles() -> None:
    model, data = Toy(torch.rand(1, SIZE, SIZE)), rings(3)
    images = torch.from_numpy(data.images)
    logits = logits_over_angles(model, images, [0, 30, 90])
    assert logits.shape == (3, 3, 2)
    torch.testing.assert_close(logits[0], predict_logits(model, data, device="cpu"))
    x = images.double()[:, None] / 255
    torch.testing.assert_close(logits[2], model(x.rot90(1, (2, 3))).detach(), rtol=1e-6, atol=0)
    assert not torch.allclose(logits[1], logits[0], rtol=1e-3)


def test_exact_model_is_invariant_and_front_is_not() -> None:
    residual = {}
    for name in ("eqcvt_c4_exact", "eqcvt_c4"):
        model = eqcvt.create_model(name, in_channels=1, image_size=SIZE, **TINY).double()
        robust = evaluate(model, rings(4), device="cpu", batch_size=3)["rotation"]
        residual[name] = robust["residual_group"]
    assert residual["eqcvt_c4_exact"] < 1e-12 < 1e-6 < residual["eqcvt_c4"]


@pytest.mark.parametrize("group", ["C2", "C8", "D1", "D2"])
def test_the_group_s_own_symmetries_of_the_grid_are_those_measured(group: str) -> None:
    model = eqcvt.EqCvT(1, 2, SIZE, group=group, invariance="exact", **TINY).double()
    robust = evaluate(model, rings(4), device="cpu")["rotation"]
    assert robust["residual_group"] < 1e-12
    assert robust["std_45"] > 1e-6


def test_model_is_left_in_its_mode_and_batches_do_not_matter() -> None:
    model = eqcvt.create_model("cvt", image_size=SIZE, stages=[{"dim": 8}], head_hidden=8).double()
    model.head.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits = predict_logits(model, rings(5), device="cpu", batch_size=2)
    torch.testing.assert_close(predict_logits(model, rings(5), device="cpu"), logits)
    assert model.training
    assert not model.head.training
    assert not logits.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_images_that_do_not_fit_are_refused() -> None:
    toy = Toy(torch.ones(1, SIZE, SIZE))
    with pytest.raises(TypeError, match=r"LensingImages, got str: eqcvt\.data\.load\(path\) reads"):
        evaluate(toy, "test.npz", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are no images to evaluate"):
        evaluate(toy, rings(0), device="cpu")
    with pytest.raises(ValueError, match=r"model has 2 outputs, the data has 3 classes \(no_sub, "):
        evaluate(toy, rings(3, classes=3), device="cpu")
    toy.config["in_channels"] = 3
    with pytest.raises(ValueError, match="takes images with 3 channels, the data have 1"):
        predict_logits(toy, rings(3), device="cpu")
    toy.config["in_channels"] = 1
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:i, got 'gpu'"):
        predict_logits(toy, rings(3), device="gpu")
