"""The compiled extension: launchers of C++ and CUDA kernels, called with the tensors' addresses.

``eqcvt._native`` is loaded at the first use, and a GPU is touched by nothing but a launch on it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_STATUS = {
    -1: "there is not enough memory",
    -2: "the dtype is not supported",
    -3: "a size is not supported",
}


@functools.cache
def _module() -> ModuleType | None:
    """Return the extension, or None where this installation has none."""
    if importlib.util.find_spec("eqcvt._native") is None:
        return None
    module = importlib.import_module("eqcvt._native")
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        module.share_openmp(str(library))
    return module


def _why_not_built() -> str:
    """Return why there is no extension: left out on purpose, hidden by a checkout, or not built."""
    here = Path(__file__).parents[2]
    for found in importlib.metadata.distributions(name="eqcvt"):
        built = [f for f in found.files or () if f.match("eqcvt/_native*")]
        if built and Path(str(found.locate_file(built[0]))).exists():
            return (
                f"this is the source tree {here}, which has not built it; the eqcvt that pip "
                f"installed is in {found.locate_file('')}: start Python in another folder, or "
                "pip install -e . here"
            )
        if "Root-Is-Purelib: true" in (found.read_text("WHEEL") or ""):
            return "eqcvt was installed without it, as EQCVT_NATIVE=0 asked"
    return "it was not built; pip install -e . in the source tree builds it"


def _lacks(device_type: str) -> str | None:
    """Return why no kernel for a type of device was built, or None if one was."""
    module = _module()
    if module is None:
        return _why_not_built()
    if device_type not in ("cpu", "cuda"):
        return f"the native extension has no kernels for {device_type}"
    if device_type == "cuda" and module.build["cuda"] is None:
        return "the native extension was built without CUDA"
    return None


def unavailable(device_type: str) -> str | None:
    """Return why the extension cannot serve a type of device, or None if it can.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        ImportError: if the extension is there and cannot be loaded, or ``EQCVT_ISA`` names an
            instruction set that this machine lacks.
    """
    reason = _lacks(device_type)
    if reason is None and device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return reason


def refuses_dtype(x: Tensor) -> str | None:
    """Return why no kernel takes the dtype of activations on their device, or None."""
    taken = KERNEL_DTYPES.get(x.device.type, ())
    if x.dtype in taken:
        return None
    return f"the native extension has no kernel for {x.dtype} on {x.device.type}"


def build_info() -> dict[str, Any]:
    """Return what was built, ready for JSON.

    Returns:
        ``built``; without an extension the ``reason``; with it ``file``, ``version``, ``compiler``,
        ``instruction_sets`` (built), ``instruction_sets_here`` (those that run on this machine),
        ``instruction_set`` (the one in use, see ``EQCVT_ISA``), ``cuda`` (the toolkit's version)
        and ``cuda_archs``, None without CUDA.

    Raises:
        ImportError: as :func:`unavailable`.
    """
    module = _module()
    if module is None:
        return {"built": False, "reason": _why_not_built()}
    return {"built": True, "file": module.__file__, **module.build}


def launch(name: str, *args: Tensor | float | None, like: Tensor) -> None:
    """Call a launcher for the device and the dtype of ``like``; on a GPU, on the current stream.

    Args:
        name: the launcher's, such as ``"lift_apply"``.
        args: what stands in its C declaration between dtype and the last arguments: tensors, all
            contiguous and on the device of ``like``, None for a null pointer, and numbers.
        like: the activations.

    Raises:
        TypeError: if the dtype of ``like`` is none that launchers know, or an argument is not of
            the kind that the launcher takes.
        ValueError: if a tensor is not contiguous or is on another device.
        RuntimeError: if the extension cannot serve the device, or the launcher fails; the message
            names it, its status and the arguments.
    """
    device = like.device
    module, reason = _module(), _lacks(device.type)
    if module is None or reason is not None:
        raise RuntimeError(f"{name} cannot run on {device}: {reason}")
    if like.dtype not in _DTYPES:
        raise TypeError(f"{name} has no kernel for {like.dtype}")
    values: list[float] = [_DTYPES[like.dtype]]
    for position, argument in enumerate(args):
        if isinstance(argument, Tensor):
            if argument.device != device:
                raise ValueError(
                    f"{name}: argument {position} is on {argument.device}, and should be on "
                    f"{device}"
                )
            if not argument.is_contiguous():
                raise ValueError(
                    f"{name}: argument {position} must be contiguous; its shape is "
                    f"{list(argument.shape)}, its strides are {list(argument.stride())}"
                )
            values.append(argument.data_ptr())
        else:
            values.append(0 if argument is None else argument)
    if device.type == "cpu":
        status = getattr(module, f"cpu_{name}")(*values, torch.get_num_threads())
    else:
        status = _launch_cuda(module, name, values, device)
    if status:
        raise RuntimeError(_failure(module, name, status, args, like))


def _launch_cuda(module: ModuleType, name: str, values: list[float], device: torch.device) -> int:
    """Call a CUDA launcher with the workspace that it asks for, and return its status."""
    with torch.cuda.device(device):
        # torch's guard speaks to torch's CUDA runtime; the extension has one of its own.
        status: int = module.cuda_set_device(torch.cuda.current_device())
        if status == 0:
            status, size = getattr(module, f"cuda_{name}_workspace")(*values)
        if status == 0:
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            stream = torch.cuda.current_stream().cuda_stream
            status = getattr(module, f"cuda_{name}")(*values, workspace.data_ptr(), stream)
        return status


def _failure(
    module: ModuleType,
    name: str,
    status: int,
    args: tuple[Tensor | float | None, ...],
    like: Tensor,
) -> str:
    """Return the message for a status that is not zero."""
    known = status < 0 or like.device.type != "cuda"
    reason = _STATUS.get(status, "unknown") if known else module.cuda_error_string(status)
    given = [f"{_short(a.dtype)}{list(a.shape)}" if isinstance(a, Tensor) else a for a in args]
    return (
        f"{name} failed on {like.device} for {_short(like.dtype)}: {reason} (status {status}); "
        f"its arguments were {', '.join(map(str, given))}"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
