"""The fast models: the same constructors, state dicts and results as :mod:`eqcvt`'s.

``from eqcvt.fast import EqCvT`` is the swap, :func:`accelerate` makes it in a model that exists.
Each op takes the fastest backend this version has for its device (``eqcvt doctor`` prints which,
and why not another), or the one that :func:`eqcvt.use_backend` asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, TypeVar, overload

from torch import nn

from eqcvt import convert, models
from eqcvt.nn import set_backend

__all__ = ["CvT", "EqCvT", "accelerate", "decelerate"]

M = TypeVar("M", bound=models.VisionModel)

# Their wrappers keep a graph, gradient buckets or shards of the parameters they were made for.
_WRAPPERS = ("torch._dynamo.", "torch.distributed.", "torch.nn.parallel.")


class EqCvT(models.EqCvT):
    """:class:`eqcvt.EqCvT` whose ops take the backend in force."""

    default_backend: ClassVar[str | None] = None


class CvT(models.CvT):
    """:class:`eqcvt.CvT` whose ops take the backend in force."""

    default_backend: ClassVar[str | None] = None


_FAST: dict[type, type] = {models.EqCvT: EqCvT, models.CvT: CvT}
_REFERENCE: dict[type, type] = {fast: reference for reference, fast in _FAST.items()}


@overload
def accelerate(model: M) -> M: ...


@overload
def accelerate(model: nn.Module) -> nn.Module: ...


def accelerate(model: nn.Module) -> nn.Module:
    """Make the models in a module the fast ones, in place, and return it.

    An ``eqcvt.EqCvT`` or ``eqcvt.CvT``, alone or anywhere in a module (a LightningModule, DDP, a
    compiled or an averaged model), stays the object it is and becomes an ``eqcvt.fast`` model. Its
    parameters are the same ones, so an optimiser made before goes on. A class derived from either
    stays that class, with fast ops.

    An escnn or e2cnn model of the published layout (what :func:`eqcvt.convert.from_escnn` takes)
    cannot stay the object it is: a new fast model of the same weights, device, dtype and mode takes
    its place in the module that holds it, or is returned if it is ``model`` itself. Its parameters
    are new: make the optimiser, and wrap the model, afterwards. The filters are converted in
    float32, and hooks are not carried over. A frozen model stays frozen.

    Args:
        model: a model, or a module with models among its submodules.

    Returns:
        ``model``, or for a whole escnn model the new one.

    Raises:
        TypeError: if there is nothing to accelerate.
        ValueError: if an escnn model has no counterpart here, is frozen in part, or is already
            wrapped for parallel training or compiled. Nothing has been changed then.

    Example:
        >>> import eqcvt
        >>> type(accelerate(eqcvt.EqCvT(1))).__module__
        'eqcvt.fast'
    """
    _check_module("accelerate", model)
    if convert.is_published(model) and not _wraps(model):
        return _converted(model)
    places = list(_published(model))
    new = {old: _converted(old) for old in dict.fromkeys(old for _, _, old in places)}
    for parent, name, old in places:
        setattr(parent, name, new[old])
    if not _switch(model, _FAST, None):
        raise TypeError(
            f"{type(model).__name__} holds nothing to accelerate: accelerate takes an EqCvT or CvT "
            f"of eqcvt, an escnn model of the published layout (eqcvt.convert.from_escnn says what "
            f"one lacks), or a module that holds such models"
        )
    return model


def decelerate(model: nn.Module) -> nn.Module:
    """Make the fast models in a module reference models again, in place, and return it.

    The inverse of :func:`accelerate`, parameters staying the same ones; a converted escnn model
    becomes the reference of its new form.

    Args:
        model: a model, or a module with models among its submodules.

    Raises:
        TypeError: if there is no EqCvT or CvT in it.
    """
    _check_module("decelerate", model)
    if not _switch(model, _REFERENCE, "reference"):
        raise TypeError(
            f"{type(model).__name__} holds nothing to decelerate: decelerate takes an EqCvT or CvT "
            f"of eqcvt, or a module that holds such models"
        )
    return model


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch module, got {type(model).__name__}")


def _switch(module: nn.Module, classes: Mapping[type, type], backend: str | None) -> bool:
    """Give every model in ``module`` its class in ``classes`` and a backend; False for no model."""
    found = [part for part in module.modules() if isinstance(part, models.VisionModel)]
    for model in found:
        model.__class__ = classes.get(type(model), type(model))
        set_backend(model, backend)
    return bool(found)


def _wraps(module: nn.Module) -> bool:
    return any(cls.__module__.startswith(_WRAPPERS) for cls in type(module).__mro__)


def _published(parent: nn.Module, wrapper: str = "") -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (module, name, child) wherever a child in ``parent`` has the published layout."""
    if _wraps(parent):
        wrapper = type(parent).__name__
    for name, child in parent._modules.items():  # named_children leaves out a second name
        if child is None:
            continue
        if _wraps(child) or not convert.is_published(child):
            yield from _published(child, wrapper)
        elif wrapper:
            raise ValueError(
                f"{type(child).__name__} would get new parameters, which the {wrapper} around it "
                f"does not know: accelerate the model first, then wrap it"
            )
        else:
            yield parent, name, child


def _converted(old: nn.Module) -> nn.Module:
    """Return the fast model of one of the published layout."""
    model = convert.from_escnn(old).to(next(old.parameters()).dtype)
    # escnn's mask is a parameter that nobody trains.
    trained = {p.requires_grad for name, p in old.named_parameters() if not name.endswith(".mask")}
    if len(trained) > 1:
        raise ValueError(
            f"{type(old).__name__} is frozen in part, and its parameters have no one-to-one "
            "counterparts here: accelerate the model first, then freeze parts of it"
        )
    model.requires_grad_(trained.pop())
    _switch(model, _FAST, None)
    return model
