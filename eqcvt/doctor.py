"""What this installation can do: versions, devices, threads, and the backend each op takes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from eqcvt._machine import usable_cores

REQUIRED = ("torch", "numpy", "safetensors", "huggingface_hub", "torchmetrics")
EXTRAS = {
    "sim": ("caustics",),
    "fits": ("astropy",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "tensorboard": ("tensorboard",),
}
FAST = ("triton",)


def report() -> dict[str, Any]:
    """Return everything ``eqcvt doctor`` shows, ready for JSON.

    Returns:
        ``versions`` (package -> version or None), ``platform`` and ``executable``, ``extras``
        (extra -> what is missing), ``devices`` (rows of device, name and capability, for GPUs also
        memory_bytes and bf16), ``threads``, ``variables`` (those of ours that are set), ``native``
        (see :func:`eqcvt.native.build_info`), ``proofs`` (per kind of GPU the file of ``eqcvt
        tune`` and its state), ``backend`` (the one in force) and ``backends`` (rows of op, device,
        backend, available, chosen and the reason against).

    Raises:
        ImportError: if the compiled extension is there and cannot be loaded.
        FileNotFoundError: if EQCVT_TUNED names a file that is not there.
        ValueError: if the file that it names is not one of ``eqcvt tune``, or EQCVT_BACKEND names
            no backend.
    """
    import eqcvt
    from eqcvt import native
    from eqcvt.ops import _proof, current_backend, explain

    packages = (*REQUIRED, *FAST, *(p for group in EXTRAS.values() for p in group))
    versions: dict[str, str | None] = {
        "eqcvt": eqcvt.__version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }
    return {
        "versions": versions,
        "platform": platform.platform(),
        "executable": sys.executable,
        "extras": {
            extra: [p for p in group if versions[p] is None] for extra, group in EXTRAS.items()
        },
        "devices": _devices(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("EQCVT_") or name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        },
        "native": native.build_info(),
        "proofs": _proof.report(),
        "backend": current_backend(),
        "backends": [row._asdict() for row in explain()],
    }


def _version(package: str) -> str | None:
    """Return the installed version of ``package``, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """Return the processor and every accelerator torch sees."""
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": about.name,
                "memory_bytes": about.total_memory,
                "capability": f"sm_{about.major}{about.minor}",
                "bf16": torch.cuda.is_bf16_supported(),
            }
        )
    return devices
