"""Models as ``torch.export`` programs and ONNX graphs, each checked against the model."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eqcvt import use_backend
from eqcvt._check import choice
from eqcvt._files import replacing
from eqcvt.models import VisionModel, unwrapped

FORMATS = {".pt2": "torch.export", ".onnx": "ONNX"}
CHECKED_BATCHES = (1, 2, 5)
INPUT = (
    "float32 [B, C, H, W], grey values in [0, 1]: bytes divided by 255; other numbers scaled in "
    "each image from its own minimum to its own maximum over all channels"
)


@dataclass(frozen=True)
class Exported:
    """A written file and how far its outputs are from the model's.

    Attributes:
        path: the file.
        format: ``"torch.export"`` or ``"ONNX"``.
        difference: largest absolute difference of a logit over the checked batches.
        scale: largest absolute logit there.
    """

    path: Path
    format: str
    difference: float
    scale: float


def export(model: VisionModel, path: str | Path, *, tolerance: float = 1e-4) -> Exported:
    """Write ``model`` in eval mode with a free batch size, and check what was written.

    The file takes float32 images ``[B, C, H, W]`` in [0, 1] and gives logits ``[B, K]``. The plain
    PyTorch reference is exported, so that the file needs nothing of eqcvt. The model's
    configuration goes in as JSON (``config.json`` in a ``.pt2``, the property ``eqcvt`` in ONNX),
    its class names too if it has them (``classes.json``, ``classes``), and what its input is
    (``input.txt``, ``input``).

    Args:
        model: an ``EqCvT`` or ``CvT``; it stays as it is.
        path: ends in ``.pt2`` (``torch.export``) or ``.onnx``.
        tolerance: largest difference of a logit allowed; a class's probability then differs by
            at most half of it. Compared on images of rings, as noise gives larger logits than any
            lens does, and so larger roundings.

    Returns:
        The path, the format and the difference found on these images.

    Raises:
        TypeError: what is no ``EqCvT`` or ``CvT``, such as one in a ``DataParallel``.
        ValueError: another ending.
        ImportError: ``.onnx`` without the extra ``export``.
        RuntimeError: the file's outputs differ by more than ``tolerance``, or they or the model's
            are not finite; nothing is written.
    """
    path = Path(path)
    kind = FORMATS[choice("the export's ending", path.suffix, FORMATS)]
    model = unwrapped(model)
    channels, side = model.config["in_channels"], model.config["image_size"]
    frozen = copy.deepcopy(model).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    draw = partial(_rings, channels=channels, side=side, generator=generator)
    write = _write_program if path.suffix == ".pt2" else _write_onnx
    with replacing(path) as temporary, torch.no_grad(), use_backend("reference"):
        about = {"eqcvt": json.dumps(model.config), "input": INPUT}
        if model.classes:
            about["classes"] = json.dumps(model.classes)
        run = write(frozen, draw(2), temporary, about)
        difference = scale = 0.0
        for batch in CHECKED_BATCHES:
            images = draw(batch)
            expected, found = frozen(images), run(images)
            for whose, logits in (("model", expected), (f"{kind} file", found)):
                if not logits.isfinite().all():
                    raise RuntimeError(
                        f"the {whose} gives logits that are not finite; nothing was written"
                    )
            difference = max(difference, float((found - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
        if not difference <= tolerance:
            raise RuntimeError(
                f"the {kind} file gives logits {difference:.3g} away from the model's, allowed "
                f"{tolerance:.3g} (largest logit {scale:.3g}); nothing was written"
            )
    return Exported(path, kind, difference, scale)


def _rings(batch: int, channels: int, side: int, generator: torch.Generator) -> Tensor:
    """Draw in each channel a thin ring near the centre, from 0 to 1."""
    x, y, radius = torch.rand((3, batch, channels, 1, 1), generator=generator) / 5
    axis = torch.linspace(-1, 1, side)
    distance = torch.hypot(axis + 0.1 - x, axis[:, None] + 0.1 - y)
    return torch.exp(-(((distance - 0.3 - radius) / 0.05) ** 2))


def _write_program(
    model: VisionModel, images: Tensor, path: Path, about: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    """Write a ``torch.export`` program and return the reloaded one as a function."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    names = {"eqcvt": "config.json", "classes": "classes.json", "input": "input.txt"}
    extra = {names[key]: text for key, text in about.items()}
    torch.export.save(program, buffer, extra_files=extra)
    path.write_bytes(buffer.getvalue())
    module = torch.export.load(path).module()
    return lambda x: torch.as_tensor(module(x))


def _write_onnx(
    model: VisionModel, images: Tensor, path: Path, about: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    """Write an ONNX graph and return it, loaded by onnxruntime, as a function."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'ONNX export needs the package {error.name}: pip install "eqcvt[export]"'
        ) from error
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
        )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own warnings, which concern its internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
