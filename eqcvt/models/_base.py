"""What every model shares: its configuration, head, and saving to and loading from a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from eqcvt import _check, _files
from eqcvt.groups import Group
from eqcvt.nn import (
    BatchNorm,
    ConvAttention,
    LayerNorm,
    Stage,
    TransformerStage,
    set_backend,
)
from eqcvt.ops import conv_size, token_mean
from eqcvt.ops._register import as_autocast

WEIGHTS, CONFIG, CLASSES = "model.safetensors", "config.json", "classes.json"

M = TypeVar("M", bound="VisionModel")


class Head(nn.Module):
    """Classifier on pooled features: Linear, batch norm, ELU, Linear; or layer norm, Linear.

    Args:
        dim: features.
        hidden: width of the hidden layer; None for the layer norm form of the original CvT.
        num_classes: classes; 0 returns the features before the last linear map.
    """

    def __init__(self, dim: int, hidden: int | None, num_classes: int) -> None:
        super().__init__()
        self.hidden = None if hidden is None else nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(dim) if hidden is None else BatchNorm(hidden)
        self.width = dim if hidden is None else hidden
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Replace the last linear map by a new one."""
        parameter = self.norm.weight
        assert isinstance(parameter, Tensor)
        new: nn.Module = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()
        self.classifier = new.to(device=parameter.device, dtype=parameter.dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features ``[B, D]`` to logits ``[B, num_classes]``."""
        x = self.norm(x) if self.hidden is None else F.elu(self.norm(self.hidden(x)))
        if pre_logits:
            return x
        logits: Tensor = self.classifier(x)
        return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class VisionModel(nn.Module, PyTorchModelHubMixin):
    """Base of the models: a front, stages of a CvT, global average, head.

    Attributes:
        config: the constructor's arguments and the class name under ``"architecture"``, as JSON.
        classes: names of the classes of a model that was loaded from a folder, the package, a run
            or the Hub; None where they are not known.
        conversion_residual: for a converted model the relative residual of the filters in this
            package's basis; None otherwise.
        token_grids: for each stage the grid of its queries and of its keys, ``((H, W), (H, W))``.
    """

    default_backend: ClassVar[str | None] = "reference"
    classes: tuple[str, ...] | None = None
    conversion_residual: float | None = None
    config: dict[str, Any]
    token_grids: list[tuple[tuple[int, int], tuple[int, int]]]
    stages: nn.ModuleList
    head: Head

    def _configure(self, **arguments: Any) -> None:
        """Check and keep the constructor's arguments that all models share."""
        for name in ("in_channels", "image_size"):
            _check.integer(name, arguments[name])
        _check.integer("num_classes", arguments["num_classes"], 0)
        if arguments["head_hidden"] is not None:
            _check.integer("head_hidden", arguments["head_hidden"])
        _check.fraction("dropout", arguments["dropout"])
        values = {name: _check.plain(value) for name, value in arguments.items()}
        self.config = {"architecture": type(self).__name__, **values}
        self._hub_mixin_config = self.config

    @staticmethod
    def _stages(stages: Sequence[Stage | dict[str, Any]]) -> list[Stage]:
        if not isinstance(stages, Sequence) or isinstance(stages, (str, bytes)) or not stages:
            raise ValueError(f"stages must be a sequence of at least one Stage, got {stages!r}")
        return [Stage.of(stage) for stage in stages]

    def _build(
        self, channels: int, size: int, stages: list[Stage], symmetry: Group | None = None
    ) -> None:
        """Create stages and head behind feature maps of ``channels`` and ``size`` pixels."""
        dropout = self.config["dropout"]
        self.config["stages"] = [
            {name: _check.plain(value) for name, value in asdict(stage).items()} for stage in stages
        ]
        self.stages, self.token_grids = nn.ModuleList(), []
        for stage in stages:
            self.stages.append(TransformerStage(channels, stage, dropout, symmetry))
            channels = stage.dim
            size = conv_size(size, stage.embed_kernel, stage.embed_stride, stage.padding)
            keys = conv_size(size, stage.kernel_size, stage.kv_stride, stage.kernel_size // 2)
            if size < 1 or keys < 1:
                raise ValueError(
                    f"image_size={self.config['image_size']} leaves no tokens for stage "
                    f"{len(self.stages)}; use a larger image or fewer strides"
                )
            self.token_grids.append(((size, size), (keys, keys)))
        self.head = Head(channels, self.config["head_hidden"], self.config["num_classes"])
        self.num_features = channels
        set_backend(self, self.default_backend)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"images must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}; "
                f"torch.as_tensor makes one"
            )
        channels, size = self.config["in_channels"], self.config["image_size"]
        if x.dim() != 4 or tuple(x.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"this {type(self).__name__} takes images [B, {channels}, {size}, {size}], "
                f"got {list(x.shape)}; in_channels and image_size are set at construction"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"images must be floating point, got {x.dtype}; "
                f"eqcvt.data.to_unit turns grey values into numbers from 0 to 1"
            )
        weight = next(self.parameters(), x)  # DataParallel's copies have none
        if x.dtype != weight.dtype and as_autocast(x).dtype != as_autocast(weight).dtype:
            raise TypeError(
                f"this {type(self).__name__} is of {weight.dtype}, got images of {x.dtype}: "
                f"give it images.to({weight.dtype}), or make it one of theirs, "
                f"model.to({x.dtype})"
            )

    if TYPE_CHECKING:  # torch's own says nothing of the result

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        shown = ("in_channels", "num_classes", "image_size", "group", "invariance")
        return ", ".join(f"{name}={self.config[name]!r}" for name in shown if name in self.config)

    def _front_steps(self) -> list[tuple[int, int, int]]:
        """Return (kernel, stride, padding) of the front's layers."""
        return []

    @property
    def token_places(self) -> list[tuple[tuple[float, int], tuple[float, int]]]:
        """For each stage where its queries and its keys are, ``((first, step), (first, step))``.

        ``first`` is the row, and the column, of the pixel (from 0) on which the first is centred,
        ``step`` how many pixels further the next is.
        """
        first, step = 0.0, 1
        places = []
        stages = [Stage.of(stage) for stage in self.config["stages"]]
        embeds = [(stage.embed_kernel, stage.embed_stride, stage.padding) for stage in stages]
        for kernel, stride, padding in [*self._front_steps(), *embeds]:
            first, step = first + step * ((kernel - 1) / 2 - padding), step * stride
            places.append((first, step))
        return [
            (place, (place[0], place[1] * stage.kv_stride))  # keys' filters are odd and centred
            for place, stage in zip(places[-len(stages) :], stages, strict=True)
        ]

    def front(self, x: Tensor) -> Tensor:
        """Return the feature maps that the first stage reads: the images, if there is no front."""
        self._check_input(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the last stage's tokens ``[B, D, H', W']``."""
        x = self.front(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens ``[B, D, H', W']`` and classify: logits ``[B, num_classes]``.

        With ``pre_logits``, the features that the last linear map reads.
        """
        logits: Tensor = self.head(token_mean(x), pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, num_classes]``.

        Raises:
            ValueError: if the shape is not the one the model was built for.
            TypeError: if the images are no tensor, or not of the model's dtype; autocast takes any
                floating point but float64.
        """
        return self.forward_head(self.forward_features(x))

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """Return each transformer block's softmax weights ``[B, heads, N, M]`` for images ``x``.

        Computed as in evaluation, whatever mode the model is in.
        ``token_grids`` gives each stage's grids, by which ``N`` and ``M`` unfold into pictures.
        """
        maps = []
        with evaluating(self):
            x = self.front(x)
            for stage in self.stages:
                assert isinstance(stage, TransformerStage)
                x = stage.embed(x)
                for block in stage.blocks:
                    attention = block.attention
                    assert isinstance(attention, ConvAttention)
                    maps.append(attention.weights(x))
                    x = block(x)
        return maps

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear map by a new one for ``num_classes`` classes (0: none)."""
        self.config["num_classes"] = _check.integer("num_classes", num_classes, 0)
        self.classes = None
        self.head.reset(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last linear map."""
        return self.head.classifier

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.config["num_classes"])

    def name_classes(self, folder: Path) -> None:
        """Take the names of the classes that ``class_names`` finds, if there is one for each."""
        names = class_names(folder)
        self.classes = names if len(names) == self.num_classes else None

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that weight decay is best kept from: norms and biases."""
        norms = {
            f"{name}.weight"
            for name, module in self.named_modules()
            if isinstance(module, (BatchNorm, LayerNorm, nn.LayerNorm))
        }
        names = {name for name, _ in self.named_parameters()}
        return {n for n in names if n in norms or n.rpartition(".")[2] == "bias"}

    def changed_norms(self, **built: float) -> list[str]:
        """Name the norms' numbers, such as ``eps``, that are not those they are built with."""
        norms = (BatchNorm, LayerNorm, nn.LayerNorm)
        return [
            f"{name}.{number}={value!r}"
            for name, module in self.named_modules()
            if isinstance(module, norms)
            for number, expected in built.items()
            if (value := getattr(module, number, expected)) != expected
        ]

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any
    ) -> str | None:
        """Write ``model.safetensors`` and ``config.json`` to a folder, each whole or not at all.

        And ``classes.json``, where the model knows the names of its classes; an older one goes.

        Args:
            save_directory: the folder.
            push_to_hub: also upload it; further arguments go to ``huggingface_hub``.

        Raises:
            ValueError: if a norm's ``eps`` was changed, unless the model is of a class derived from
                ours with a constructor of its own. Nothing is written then. A changed ``momentum``,
                which a trained model needs no more, is not kept.
        """
        # A derived class's own constructor may set them again.
        own = not type(self).__init__.__module__.startswith("eqcvt.models.")
        if not own and (changed := self.changed_norms(eps=1e-5)):
            raise ValueError(
                f"a saved model has norms of eps=1e-05, got {', '.join(changed)}, "
                f"which loading would not bring back: set them back, or save model.state_dict()"
            )
        folder = Path(save_directory)
        config = json.dumps(self.config, indent=2) + "\n"
        with _files.replacing(folder / WEIGHTS) as path:
            state = {key: value.contiguous() for key, value in self.state_dict().items()}
            _files.write_tensors(path, state, {"format": "pt"})
            # New weights never stand beside the names of an older model's classes.
            (folder / CLASSES).unlink(missing_ok=True)
        _files.write_text(folder / CONFIG, config)
        if self.classes is not None:
            _files.write_text(folder / CLASSES, json.dumps(self.classes) + "\n")
        if push_to_hub:
            repo: str | None = self.push_to_hub(
                repo_id=kwargs.pop("repo_id", folder.name), config=self.config, **kwargs
            )
            return repo
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the model to the Hub (``kwargs`` are ``huggingface_hub``'s), as it is saved."""
        if self.classes is None:  # an older model's names do not stay
            kwargs.setdefault("delete_patterns", CLASSES)
        return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[M], pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> M:
        """Load a model of this class from a folder, the package, or the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder; where there is none, one of
                :func:`eqcvt.list_pretrained`, or ``owner/name`` on the Hub.
            kwargs: arguments of the constructor, ``map_location``, ``strict``, and those of
                ``huggingface_hub``.

        Raises:
            FileNotFoundError: if it looks like none of these.
            ValueError: if a file is damaged or holds another class.
        """
        from eqcvt.models.registry import list_pretrained, pretrained_folder

        name = str(pretrained_model_name_or_path)
        if not os.path.isdir(name):
            names = list_pretrained()
            hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
            if name in names:
                name = str(pretrained_folder(name))
            elif isinstance(pretrained_model_name_or_path, Path) or not hub:
                raise FileNotFoundError(
                    f"there is no folder {name} to load a model from; the trained models that come "
                    f"with eqcvt are {', '.join(names) or 'none'}, those of the Hub are owner/name"
                )
        model: M = super().from_pretrained(name, **kwargs)
        return model

    @classmethod
    def _from_pretrained(
        cls: type[M],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> M:
        def file(name: str) -> Path:
            if os.path.isdir(model_id):
                return Path(model_id, name)
            return Path(
                hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )

        config, weights = file(CONFIG), file(WEIGHTS)
        architecture = read_config(config)["architecture"]
        if architecture != cls.__name__:
            raise ValueError(
                f"{model_id} holds the architecture {architecture}, not {cls.__name__}; "
                f"eqcvt.load_model loads either"
            )
        model = cls(**model_kwargs).to(map_location)
        model.load_state_dict(read_weights(weights, str(map_location)), strict=strict)
        with suppress(EntryNotFoundError):  # a repository that does not name them
            model.name_classes(file(CLASSES).parent)
        return model.eval()


def unwrapped(model: nn.Module) -> VisionModel:
    """Return a model, or the one that ``torch.compile`` has wrapped.

    Raises:
        TypeError: what is no ``EqCvT`` or ``CvT``, such as one in a ``DataParallel``.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, VisionModel):
        raise TypeError(
            f"the model must be an EqCvT or CvT, got {type(model).__name__}: eqcvt.load_model "
            "loads one, and a DataParallel holds it as .module"
        )
    return inner


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of a model's classes, from its folder or its run's; none if not there.

    Raises:
        ValueError: if the file does not hold them.
    """
    for path in (folder / CLASSES, folder.parent / CLASSES):
        if path.is_file():
            names = _files.read_json(path)
            if not isinstance(names, list):
                raise ValueError(f"{path} must hold a list of class names, got {names!r}")
            return tuple(map(str, names))
        if folder.name not in ("best", "last"):  # of no run
            break
    return ()


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's ``config.json``; an error names the file."""
    folder = path.parent
    if not path.is_file():
        models = [
            folder / part for part in ("best", "last") if (folder / part / path.name).is_file()
        ]
        if models:
            raise FileNotFoundError(f"{folder} is a run: load {' or '.join(map(str, models))}")
        raise FileNotFoundError(
            f"{folder} is not a saved model: it has no {path.name} (save_pretrained writes one)"
        )
    config = _files.read_json(path)
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"{path} is not a model configuration: it has no 'architecture'")
    return config


def read_weights(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; raise a ValueError or FileNotFoundError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a saved model: it has no {path.name}")
    return _files.read_tensors(path, device)
