"""One training run's settings: checked when made, read from TOML or YAML, saved beside the run."""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import tomli_w
import torch
import yaml

from eqcvt._check import AMP, amp_dtype, boolean, choice, fraction, integer, number, plain
from eqcvt._files import write_text
from eqcvt.data import MODES
from eqcvt.models import list_models

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("onecycle", "cosine", "step", "constant")
SPLIT_SEED = 1337
FLOAT32_MAX = float(torch.finfo(torch.float32).max)

RECIPES: dict[str, dict[str, Any]] = {
    "ours": {},
    "poster": {
        "optimizer": "adam",
        "lr": 1e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 1e-7,
        "schedule": "constant",
        "epochs": 40,
        "augment": "rotate",
        "supersample": 3,
        "label_smoothing": 0.0,
        "amp": "off",
        "ema": 0.0,
        "clip": 0.0,
        "recalibrate": 0,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a run; the defaults are the recipe "ours" (Adam, one cycle to 1e-3).

    Args:
        data: training images: an ``.npz`` file, a folder of shards or a folder of images (png,
            jpg, npy, fits) for each class. uint8 is divided by 255, any other image scaled from
            its own minimum to its maximum: clip hot pixels first.
        val_data: validation images; without it the folder's own ``val`` part, or else
            ``val_fraction`` of every class of ``data`` (split seed 1337) is held out.
        out: the run folder.
        model: a name from ``eqcvt.list_models()``.
        model_kwargs: arguments for the model; channels, size and classes come from the data. As
            TOML has no None, the text "none" stands for it.
        init: start from the weights of a trained model: a run folder, a checkpoint folder, or one
            of ``eqcvt.list_pretrained()``. It must be the same model; image size and classes may
            differ. A tenth of the usual ``lr`` keeps what it has learned.
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes together.
        optimizer: ``adam`` (L2 on every weight) or ``adamw`` (decoupled decay, which leaves out
            ``model.no_weight_decay()``).
        lr: peak learning rate.
        schedule: ``onecycle`` | ``cosine`` | ``step`` | ``constant``, see ``schedule.py``.
        warmup_epochs: epochs of rising rate; None means 30 % of the run for ``onecycle``, else 0.
        step_epochs, step_gamma: ``step`` multiplies the rate by gamma every so many epochs.
        clip: largest norm of the gradient, 0 for no clipping.
        amp: ``off`` | ``bf16`` | ``fp16`` (the last with loss scaling, on a GPU only).
        ema: decay of the averaged weights, per step, 0 for none. The averaged weights are then
            the ones validated and saved as the model.
        recalibrate: training batches on which the running statistics of batch norm are estimated
            anew before each validation, from images that are not augmented (but with ``mixed``,
            which has such images as well); 0 to keep the running ones. Those lag behind the weights
            in short runs, and belong to turned images, whose noise is smoother: validation then
            looks worse than the model is, and swings.
        early_stopping: epochs without a better validation result before stopping, 0 for never.
        augment: ``rotate`` (any angle, which smooths the noise) | ``dihedral`` (exact quarter turns
            and flips) | ``mixed`` (half of each batch by either) | ``none``.
        supersample: how many times larger the image is while ``rotate`` turns it.
        deterministic: refuse operations whose result depends on the order of threads.
        compile: run the model through ``torch.compile``.
        cuda_graph: replay every training step as one CUDA graph, see ``graph.py``: small batches
            gain most. Where that cannot be, steps are taken without it and the run says why.
        sync_batch_norm: batch norm over the images of all processes.
        device: ``auto`` | ``cpu`` | ``cuda`` | ``cuda:i``.

    Raises:
        TypeError, ValueError: naming the setting, what was given and what is allowed.
    """

    data: str
    val_data: str | None = None
    val_fraction: float = 0.1
    out: str = "runs/eqcvt"
    model: str = "eqcvt_c4"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    epochs: int = 40
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-7
    schedule: str = "onecycle"
    warmup_epochs: float | None = None
    step_epochs: int = 15
    step_gamma: float = 0.1
    label_smoothing: float = 0.0
    clip: float = 0.0
    amp: str = "off"
    ema: float = 0.0
    recalibrate: int = 32
    early_stopping: int = 0
    augment: str = "mixed"
    supersample: int = 3
    seed: int = 0
    deterministic: bool = False
    compile: bool = False
    cuda_graph: bool = False
    sync_batch_norm: bool = False
    tensorboard: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be below epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if self.device == "cpu":
            amp_dtype(self.amp, "cpu")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build a configuration from plain values; ``recipe`` names the set they start from.

        Raises:
            TypeError, ValueError: for an unknown key (naming the nearest), type or range.
        """
        names = [f.name for f in fields(cls)]
        given = dict(values)
        for key in given:
            if key not in names and key != "recipe":
                near = difflib.get_close_matches(str(key), [*names, "recipe"], n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
                raise ValueError(f"unknown training setting {key!r}{hint}")
        recipe = RECIPES[choice("recipe", given.pop("recipe", "ours"), RECIPES)]
        if "data" not in given:
            raise ValueError("the setting 'data' is missing: the path of the training images")
        return cls(**{**recipe, **given})

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Read a ``.toml``, ``.yaml`` or ``.yml`` file.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong in it.
        """
        path = Path(path)
        if path.suffix not in (".toml", ".yaml", ".yml"):
            raise ValueError(f"a configuration is a .toml, .yaml or .yml file, got {path}")
        if not path.is_file():
            raise FileNotFoundError(f"no configuration file {path}")
        try:
            text = path.read_text(encoding="utf-8")
            values = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
        except (ValueError, yaml.YAMLError) as error:  # YAML's dates raise a plain ValueError
            raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold named settings, got a {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return {**asdict(self), "betas": list(self.betas)}

    def save(self, path: str | Path) -> Path:
        """Write the settings as TOML, whole or not at all; settings that are None are left out."""
        values = {key: value for key, value in self.to_dict().items() if value is not None}
        values["model_kwargs"] = _none_as_text(self.model_kwargs)
        write_text(path, tomli_w.dumps(values))
        return Path(path)


def _yaml(text: str) -> Any:
    """Parse YAML, and undo two of its traps: ``1e-4`` is read as text and ``off`` as false."""
    values = yaml.safe_load(text)
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, str) and name in _FLOATS:
                try:
                    values[name] = float(value)
                except ValueError:
                    continue
        if values.get("amp") is False:
            values["amp"] = "off"
    return values


Check = Callable[[str, Any], Any]


def _one_of(allowed: tuple[str, ...]) -> Check:
    return lambda what, given: choice(what, given, allowed)


def _integer(minimum: int) -> Check:
    """A check for integers from a minimum to the largest that torch takes."""

    def check(what: str, given: Any) -> int:
        if (value := integer(what, given, minimum)) > sys.maxsize:
            raise ValueError(f"{what} must be at most {sys.maxsize}, got {value}")
        return value

    return check


def _model(what: str, given: Any) -> str:
    return choice(what, given, list_models())


def _number(low: float, *, open_below: bool = False, high: float = FLOAT32_MAX) -> Check:
    """A check for numbers in [low, high], or in (low, high]."""
    return partial(number, low=low, high=high, open_below=open_below)


def _path(what: str, given: Any) -> str:
    if not isinstance(given, (str, Path)):
        raise TypeError(f"{what} must be a path, got {type(given).__name__} {given!r}")
    if not str(given):
        raise ValueError(f"{what} must be a path, got an empty text")
    return os.path.expanduser(str(given))  # a shell does it, a file of settings does not


def _betas(what: str, given: Any) -> tuple[float, float]:
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise TypeError(f"{what} must be two numbers, got {given!r}")
    first, second = (fraction(f"{what}[{i}]", value) for i, value in enumerate(given))
    return first, second


def _model_kwargs(what: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise TypeError(f"{what} must be a table of named arguments, got {given!r}")
    return {key: _plain(f"{what}[{key!r}]", value) for key, value in given.items()}


def _plain(what: str, value: Any) -> Any:
    """Dataclasses (a model's stages) as tables, tuples as lists, NumPy's numbers as Python's.

    The text "none" becomes None.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(what, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(what, item) for item in value]
    value = plain(value)
    if not isinstance(value, (str, int, float, NoneType)):
        raise TypeError(f"{what} must be made of numbers and texts, got {type(value).__name__}")
    return None if value == "none" else value


def _none_as_text(value: Any) -> Any:
    """The other way round for TOML, which has no None."""
    if isinstance(value, dict):
        return {key: _none_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_none_as_text(item) for item in value]
    return "none" if value is None else value


def _device(what: str, given: Any) -> str:
    index = given.removeprefix("cuda:") if isinstance(given, str) else ""
    if index.isdecimal() and given == f"cuda:{int(index)}":
        return str(given)
    if given in ("auto", "cpu", "cuda"):
        return str(given)
    raise ValueError(
        f"{what} must be one of 'auto', 'cpu', 'cuda', 'cuda:0', 'cuda:1', ..., got {given!r}"
    )


def _optional(check: Check) -> Check:
    return lambda what, given: None if given is None else check(what, given)


_CHECKS: dict[str, Check] = {
    "data": _path,
    "val_data": _optional(_path),
    "val_fraction": _number(0, open_below=True, high=0.9),
    "out": _path,
    "model": _model,
    "model_kwargs": _model_kwargs,
    "init": _optional(_path),
    "epochs": _integer(1),
    "batch_size": _integer(2),
    "optimizer": _one_of(OPTIMIZERS),
    "lr": _number(0, open_below=True),
    "betas": _betas,
    "weight_decay": _number(0),
    "schedule": _one_of(SCHEDULES),
    "warmup_epochs": _optional(_number(0)),
    "step_epochs": _integer(1),
    "step_gamma": _number(0, open_below=True, high=1),
    "label_smoothing": fraction,
    "clip": _number(0),
    "amp": _one_of(tuple(AMP)),
    "ema": fraction,
    "recalibrate": _integer(0),
    "early_stopping": _integer(0),
    "augment": _one_of(MODES),
    "supersample": _integer(1),
    "seed": _integer(0),
    "deterministic": boolean,
    "compile": boolean,
    "cuda_graph": boolean,
    "sync_batch_norm": boolean,
    "tensorboard": boolean,
    "device": _device,
}
_FLOATS = frozenset(f.name for f in fields(TrainConfig) if "float" in str(f.type))
