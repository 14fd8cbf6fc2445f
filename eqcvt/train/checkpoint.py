"""Checkpoints: a folder with the model and, for resuming, the state of training.

    <folder>/model.safetensors, config.json        the validated model, for ``eqcvt.load_model``
    <folder>/training_state.safetensors            model.*, average.*, optimizer.<parameter>.*
    <folder>/training_state.json                   epoch, history, best, configuration, checksum

All random numbers of an epoch follow from (seed, epoch, process), see ``seed_epoch``, and the
learning rate from the step: neither needs a stored state, and no file holds pickled objects.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from eqcvt._files import read_tensors, replacing_folder, write_tensors
from eqcvt.models import VisionModel
from eqcvt.train.average import Average
from eqcvt.train.config import TrainConfig

FORMAT = 1
TENSORS, SCALARS = "training_state.safetensors", "training_state.json"

# What may differ when a run goes on: none of these changes the numbers of the epochs to come but by
# rounding, and by the masks of dropout, which device and compile draw in their own ways. The images
# themselves are compared by ``Progress.data``.
FREE = frozenset(
    {"out", "data", "val_data", "device", "tensorboard", "early_stopping", "compile", "cuda_graph"}
)


@dataclass
class Progress:
    """How far a run has come: finished epochs, their rows, and the best of them."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
    data: str = ""

    def improves(self, accuracy: float, loss: float) -> bool:
        """Whether a result is better than the best: by accuracy, and if equal by loss."""
        return (accuracy, -loss) > (self.best_accuracy, -self.best_loss)


@dataclass
class State:
    """Everything that training changes."""

    model: VisionModel
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    progress: Progress

    @property
    def validated(self) -> VisionModel:
        """The model that is validated and kept: the averaged one if there is an average."""
        return self.model if self.average is None else cast(VisionModel, self.average.module)


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed torch's generators for one epoch of one process.

    Dropout and augmentation draw from them. Seeding every epoch anew makes a resumed run equal to
    an unbroken one, and gives every process images turned by angles of its own.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def save_model(folder: Path, model: VisionModel) -> None:
    """Write a model that ``eqcvt.load_model`` reads, in place of what ``folder`` held."""
    with replacing_folder(folder) as new:
        model.save_pretrained(new)


def save(folder: Path, state: State, config: TrainConfig) -> None:
    """Write the model and the training state, in place of what ``folder`` held."""
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average.{k}": v for k, v in state.average.state_dict().items()}
    names = _optimized(state)
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{names[index]}.{k}": v for k, v in values.items()}
    # A copy each: safetensors refuses tensors that share memory.
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    with replacing_folder(folder) as new:
        state.validated.save_pretrained(new)
        write_tensors(new / TENSORS, tensors)
        scalars = {
            "format": FORMAT,
            "progress": {
                **vars(state.progress),
                "best_loss": state.progress.best_loss if state.progress.history else None,
            },
            "scaler": state.scaler.state_dict(),
            "config": config.to_dict(),
            "sha256": {TENSORS: _sha256(new / TENSORS)},
        }
        (new / SCALARS).write_text(json.dumps(scalars, indent=1), encoding="utf-8")


def load(folder: Path, state: State, config: TrainConfig) -> None:
    """Put the training state in ``folder`` into ``state``.

    Raises:
        FileNotFoundError: when ``folder`` holds no training state.
        ValueError: naming the file that is damaged, or the settings that differ.
    """
    scalars = _read_scalars(folder)
    _same_settings(folder, scalars["config"], config)
    if scalars["progress"]["data"] != state.progress.data:
        raise ValueError(
            f"cannot resume from {folder}: the images are not the ones it was trained on "
            f"(data={config.data!r}, val_data={config.val_data!r})"
        )
    if config.epochs < (done := scalars["progress"]["epoch"]):
        raise ValueError(
            f"cannot resume from {folder}: epochs must be at least the {done} that are done, got "
            f"{config.epochs}"
        )
    path = folder / TENSORS
    tensors = _read_tensors(path, scalars["sha256"][TENSORS])
    try:
        state.model.load_state_dict(_under("model.", tensors))
        if state.average is not None:
            state.average.load_state_dict(_under("average.", tensors))
        flat = {index: _under(f"optimizer.{n}.", tensors) for index, n in _optimized(state).items()}
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    loaded = state.optimizer.state_dict()
    loaded["state"] = {index: values for index, values in flat.items() if values}
    state.optimizer.load_state_dict(loaded)
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(scalars["scaler"])
    progress = scalars["progress"]
    if progress["best_loss"] is None:
        progress["best_loss"] = float("inf")
    state.progress = Progress(**progress)


def trained_on(folder: Path) -> str | None:
    """Return the fingerprint of the data behind a checkpoint; None where there is none."""
    if not (folder / SCALARS).is_file():
        return None
    data: str = _read_scalars(folder)["progress"]["data"]
    return data


def _optimized(state: State) -> dict[int, str]:
    """The name of each parameter, by its number in the optimizer's state."""
    names = {id(p): name for name, p in state.model.named_parameters()}
    ordered = [p for group in state.optimizer.param_groups for p in group["params"]]
    return {index: names[id(p)] for index, p in enumerate(ordered)}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_scalars(folder: Path) -> dict[str, Any]:
    path = folder / SCALARS
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    try:
        scalars = json.loads(path.read_text(encoding="utf-8"))
        if scalars["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {scalars['format']!r}; this version reads format {FORMAT}"
            )
        Progress(**scalars["progress"])
        for key in ("config", "scaler", "sha256"):
            dict(scalars[key])
        str(scalars["sha256"][TENSORS])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return dict(scalars)


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"cannot resume: {path} is missing")
    if _sha256(path) != sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the one in {SCALARS}")
    return read_tensors(path)


def _same_settings(folder: Path, stored: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with settings that would change what the finished epochs were part of.

    The number of epochs may change where the learning rate does not depend on it.
    """
    free = FREE | ({"epochs"} if config.schedule in ("step", "constant") else frozenset())
    # Through JSON, so that tuples and lists compare equal.
    asked = json.loads(json.dumps(config.to_dict()))
    differ = [
        f"{key} was {stored.get(key)!r}, now {asked[key]!r}"
        for key in asked
        if key not in free and stored.get(key) != asked[key]
    ]
    if differ:
        hint = ""
        if any(text.startswith("epochs ") for text in differ):
            hint = (
                f" (the {config.schedule} schedule depends on the number of epochs; another run "
                f"goes on from its weights: --init {shlex.quote(str(folder.parent))} --out NEW)"
            )
        raise ValueError(
            f"cannot resume from {folder} with other settings: {'; '.join(differ)}{hint}"
        )
