"""Weights from and to escnn models of the published layout, and from published e2cnn state dicts.

The published models are a steerable front of e2cnn or escnn modules (``block1``, ``pool1``,
``gpool``) and a CvT (``layers``); a state dict of theirs does not say which model it belongs to, so
everything is read from its keys and shapes. Coefficients of different steerable bases are related
by the filters they expand to: with the stored filter :math:`F` and our basis :math:`\\psi_b`, the
weights are the least-squares solution of :math:`F = \\sum_b w_b \\psi_b`, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from eqcvt.convert.author import AuthorModel, export_model
from eqcvt.convert.build import Settings, build_model
from eqcvt.convert.files import read_state
from eqcvt.convert.layout import FILTER, read_layout
from eqcvt.convert.live import check_modules, live_settings
from eqcvt.models import CvT, EqCvT, VisionModel

__all__ = ["AuthorModel", "from_escnn", "is_published", "load_published", "to_escnn"]


def load_published(
    path: str | Path,
    *,
    image_size: int | None = None,
    heads: int | Sequence[int] | None = None,
    head_dim: int | None = None,
    embed_stride: int | Sequence[int] | None = None,
    kv_stride: int | Sequence[int] = 2,
    dropout: float = 0.1,
) -> EqCvT | CvT:
    """Return the model that a published state dict holds, in evaluation mode.

    Keys and shapes tell the architecture and its sizes; the arguments are what they do not tell,
    with the published models' values as defaults. Strides and heads are one number or one for each
    stage.

    Args:
        path: file written by ``torch.save`` of a state dict (alone or under ``"state_dict"``,
            ``"model_state_dict"`` or ``"model"``), or a ``.safetensors`` file of the same keys.
            Nothing is unpickled.
        image_size: height and width of the images; None for 129 (EqCvT's is read from its mask).
        heads: attention heads; None for the number that makes each ``head_dim`` wide.
        head_dim: channels of a head; None for 64, or with ``heads`` for their share of the width.
        embed_stride: step of the token embedding; None for 4 in the first stage of a CvT, else 2.
        kv_stride: step of the key and value projections.
        dropout: dropout probability, which matters only if the model is trained further.

    Returns:
        The model; its ``conversion_residual`` (float) is the norm of what our basis cannot express
        of the stored filters over their norm, 0 for a CvT.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no state dict of such a model (unknown, missing and misshapen
            entries are named), or its filters, mask or blur are outside of what the model has.

    Warns:
        UserWarning: if the stored filters are not those of the stored weights; the filters win.
    """
    source = str(path)
    state = read_state(Path(path))
    settings = Settings(
        image_size=image_size,
        heads=heads,
        head_dim=head_dim,
        embed_stride=embed_stride,
        kv_stride=kv_stride,
        dropout=dropout,
    )
    model = build_model(state, read_layout(state, source), settings, source)
    return model.eval()


def is_published(module: nn.Module) -> bool:
    """Whether a module has its transformer blocks where the published models have them.

    :func:`from_escnn` takes such a module, or says what of it has no counterpart here.
    """
    try:
        module.get_submodule("layers.0.2.layers.0.0.fn.to_q")
    except AttributeError:
        return False
    return True


def from_escnn(module: nn.Module, *, image_size: int | None = None) -> EqCvT | CvT:
    """Return our model with the weights and statistics of a live model of the published layout.

    Its modules and their settings are held to the published ones, but what the forward of its own
    classes does cannot be seen. The parameters are new and all trained; hooks are not carried over,
    nor from a model in evaluation what acts in training alone: dropout of attention weights,
    statistics that processes share.

    Args:
        module: the model, made of e2cnn or escnn modules or by :func:`to_escnn`.
        image_size: height and width of a CvT's images; None for the module's ``image_size``
            attribute, or 129. EqCvT's is its mask's.

    Returns:
        A float32 model on the module's device, with ``conversion_residual`` as
        :func:`load_published` gives it; each norm and dropout is in its mode (train or eval).

    Raises:
        TypeError: if ``module`` is not a module.
        ValueError: if its layout, a module or a setting has no counterpart here.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"from_escnn takes a torch module, got {type(module).__name__}")
    # Out of torch.compile and the data-parallel wrappers.
    while isinstance(
        inner := getattr(module, "_orig_mod", getattr(module, "module", None)), nn.Module
    ):
        module = inner
    source = type(module).__name__
    tensors = module.state_dict()
    state = {key: value.detach().cpu() for key, value in tensors.items()}
    if FILTER in state and module.get_submodule("block1.1").training:
        # In training the module expands its weights anew, and the stored filter is not its own.
        del state[FILTER]
    layout = read_layout(state, source)
    settings = live_settings(module, layout, image_size, source)
    model = build_model(state, layout, settings, source)
    check_modules(module, layout, model.config, source)
    model.to(next(iter(tensors.values())).device).train(module.training)
    for theirs, ours in layout.modes().items():
        model.get_submodule(ours).training = module.get_submodule(theirs).training
    return model


def to_escnn(model: VisionModel) -> AuthorModel:
    """Return a model of the published layout, with escnn's modules in front, of the same weights.

    It takes images ``[B, C, H, W]`` and has the published models' keys; a CvT becomes a model of
    torch's modules alone and needs no escnn.

    Args:
        model: an EqCvT (any C_n or D_n, ``invariance="front"``, ``lift_depth=1``) or a CvT with
            shared key and value filters.

    Returns:
        The model, of the same dtype and device, each norm and dropout in its mode (train or eval).

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: if the published layout has no place for one of its settings.
        ImportError: if escnn cannot be imported.
    """
    if not isinstance(model, VisionModel):
        raise TypeError(f"to_escnn takes an eqcvt EqCvT or CvT, got {type(model).__name__}")
    return export_model(model)
