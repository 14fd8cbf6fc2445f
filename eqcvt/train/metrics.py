"""Classification metrics of logits, computed by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CALIBRATION_BINS = 15


def aucs(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Area under the ROC curve of each class against the rest.

    Args:
        logits: [N, K].
        labels: integers [N].

    Returns:
        K values; None for a class that no image, or every image, belongs to.

    Raises:
        ValueError: where logits are NaN or infinite, so that they are no probabilities.
    """
    from torchmetrics.functional.classification import binary_auroc

    _probabilities(logits)
    return [
        float(binary_auroc(_ranks(logits, k), (labels == k).long()))
        if _defined(labels, k)
        else None
        for k in range(logits.shape[1])
    ]


def mean_auc(logits: Tensor, labels: Tensor) -> float | None:
    """Mean over the classes whose AUC is defined; None where none is."""
    defined = [value for value in aucs(logits, labels) if value is not None]
    return sum(defined) / len(defined) if defined else None


def classification(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """All metrics of a classifier as JSON-able values.

    Args:
        logits: [N, K].
        labels: integers [N] below K.
        classes: K names.

    Returns:
        accuracy, loss (mean cross-entropy, nats), auc (K values, None where undefined), confusion
        (K rows of true class, K columns of predicted class), ece (expected calibration error, 15
        equal bins, Guo et al. 2017), roc (per class ``fpr`` and ``tpr``, empty where undefined),
        n, classes, notes (sentences about what is undefined and why).

    Raises:
        ValueError: where logits are NaN or infinite, so that they are no probabilities.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    size = logits.shape[1]
    probabilities = _probabilities(logits)
    area = aucs(logits, labels)
    return {
        "accuracy": float(multiclass_accuracy(probabilities, labels, size, average="micro")),
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "auc": area,
        "confusion": multiclass_confusion_matrix(probabilities, labels, size).tolist(),
        "ece": float(
            multiclass_calibration_error(probabilities, labels, size, n_bins=CALIBRATION_BINS)
        ),
        "roc": [_roc(logits, labels, k) for k in range(size)],
        "n": len(labels),
        "classes": list(classes),
        "notes": [
            f"AUC and ROC of class {classes[k]!r} are undefined: "
            f"{int((labels == k).sum())} of {len(labels)} images belong to it"
            for k in range(size)
            if area[k] is None
        ],
    }


def _probabilities(logits: Tensor) -> Tensor:
    probabilities = logits.double().softmax(dim=1)
    bad = probabilities.isnan().any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the logits of {len(bad)} of {len(logits)} images are NaN or infinite, the first are "
            f"those of image {bad[0]}: the model's weights or the images are damaged"
        )
    return probabilities


def _defined(labels: Tensor, k: int) -> bool:
    return 0 < int((labels == k).sum()) < len(labels)


def _ranks(logits: Tensor, k: int) -> Tensor:
    """Scores in [0, 1) in the order in which images are taken for class ``k``, equal where tied.

    The order is that of the log odds, z_k - log sum exp of the others: the probabilities of sure
    predictions round to 1, and their order would be lost.
    """
    z = logits.double()
    others = torch.cat([z[:, :k], z[:, k + 1 :]], dim=1)
    rank: Tensor = torch.unique(z[:, k] - others.logsumexp(dim=1), return_inverse=True)[1]
    return rank.double() / len(z)


def _roc(logits: Tensor, labels: Tensor, k: int) -> dict[str, list[float]]:
    """The ROC curve's corners; points inside straight stretches are left out."""
    from torchmetrics.functional.classification import binary_roc

    if not _defined(labels, k):
        return {"fpr": [], "tpr": []}
    belongs = (labels == k).long()
    fpr, tpr, _ = binary_roc(_ranks(logits, k), belongs)
    # By whole numbers of images, as the rates are rounded.
    x = (fpr.double() * (1 - belongs).sum()).round().diff()
    y = (tpr.double() * belongs.sum()).round().diff()
    keep = F.pad(x[1:] * y[:-1] != x[:-1] * y[1:], (1, 1), value=True)
    return {"fpr": fpr[keep].tolist(), "tpr": tpr[keep].tolist()}
