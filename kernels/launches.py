"""How every kernel is launched: one table, by device class, kernel, bits of the dtype and shape.

``launches.json`` beside this file holds the table, one launch a line::

    "sm90 lift_conv 16 K256": {"BLOCK_X": 64, "num_warps": 8, "num_stages": 2, "RESIDENT": 1}

A device takes, launch by launch, the entry of the highest class that is not above its own compute
capability, so 8.6, 8.9 and a class nobody has tuned are served too; Triton's interpreter takes the
highest there is. Nothing is tuned at import and nothing depends on what ran before: processes that
read the same files launch the same. :func:`install` lays a tuned table over the shipped one.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Launch = dict[str, int]
INTERPRETER = 10_000
FILE = Path(__file__).parent / "launches.json"

TILE = (16, 32, 64, 128)
WARPS = {"num_warps": (1, 2, 4, 8)}
STAGES = {"num_stages": (1, 2, 3, 4)}
RESIDENT = {"RESIDENT": (1, 2, 3, 4)}
LIMIT = {"REGISTERS": (0, 64, 72, 80, 96, 128, 168)}
LANES = {"BLOCK_T": (1, 2, 4, 8, 16, 32, 64), "ROWS": (4, 8, 16, 32, 64)}
# By the power of two that channels are padded to, of taps in a block, of columns to be summed.
WIDTHS = ("D32", "D64", "D128")
TAPS = ("K64", "K256")
COLUMNS = ("few", "many")


class Kernel(NamedTuple):
    """What a launch says: fields with the values they may have, and the keys it has entries for.

    BLOCK_* and other capitals are sizes of a tile, RESIDENT is programs per multiprocessor, HALVES
    whether TF32 products are made of bfloat16 ones, PRODUCTS of how many bfloat16 exponentials one
    is made by multiplications (0: none), STEP how many of the rows fetched together are multiplied
    at a time, RELOADED whether a program reads back what it wrote rather than keep it, REGISTERS
    how many a thread may have (0: as many as the assembler likes); the rest are Triton's options.
    ``rows`` counts the rows of a matrix product whose result enters the next one, or is the field
    that does: there Triton stacks all warps.
    """

    fields: dict[str, tuple[int, ...]]
    shapes: tuple[str, ...] = ("any",)
    bits: tuple[int, ...] = (16, 32)
    rows: str | int = 0


# ``lift_plan`` is no kernel: it says how filters and taps fill the tiles of conv and sums.
KERNELS = {
    "lift_plan": Kernel({"ROWS": (64, 128), "TAPS": (16, 64, 128, 256, 512), "CHUNK": (32, 64)}),
    "lift_prepare": Kernel({"BLOCK": (256, 512, 1024, 2048), **WARPS}),
    "lift_bank": Kernel({"BLOCK": (256, 512, 1024, 2048), **WARPS}),
    "lift_conv": Kernel(
        {"BLOCK_M": (64, 128), "BLOCK_X": TILE, **WARPS, **STAGES, **RESIDENT}, TAPS
    ),
    "lift_input": Kernel({"BLOCK_P": TILE, **WARPS, **STAGES}),
    "lift_sums": Kernel(
        {"BLOCK_M": (64, 128), "BLOCK_X": TILE, "HALVES": (0, 1), **WARPS, **STAGES, **RESIDENT},
        TAPS,
        rows="BLOCK_M",
    ),
    "lift_gram": Kernel(
        {"BLOCK_X": TILE, "HALVES": (0, 1), **WARPS, **STAGES, **RESIDENT},
        ("K128", "K256"),
        rows=64,
    ),
    "lift_gram_fold": Kernel(
        {"BLOCK_R": (8, 16, 32, 64), "BLOCK_T": (16, 32, 64, 128), **WARPS}, bits=(32,)
    ),
    "lift_gram_finish": Kernel(
        {"BLOCK_R": (16, 32), "BLOCK_T": (32, 64, 128, 256), **WARPS}, bits=(32,)
    ),
    "lift_finish": Kernel(
        {
            "BLOCK": (256, 512, 1024),
            "BLOCK_N": (8, 16, 32, 64),
            "BLOCK_T": (16, 32, 64),
            **WARPS,
        },
        bits=(32,),
    ),
    **{
        f"lift_{name}": Kernel({"BLOCK": (32, 64, 128, 256, 512, 1024), **WARPS}, bits=(32,))
        for name in ("norm", "norm_bwd", "scale_bwd", "moments_bwd")
    },
    "lift_blur": Kernel({"BLOCK": (32, 64, 128, 256), "ROWS": (4, 8, 16), **LIMIT, **WARPS}),
    "lift_unblur": Kernel(
        {"BLOCK": (32, 64, 128, 256), "ROWS": (16, 32, 48, 64, 128), **LIMIT, **WARPS}
    ),
    "conv_attention_project_fwd": Kernel({**LANES, **LIMIT, **WARPS}, WIDTHS),
    "conv_attention_moments": Kernel(
        {"BLOCK_ROWS": (64, 128, 256, 512), "BLOCK_C": (4, 8, 16), **WARPS}, bits=(32,)
    ),
    "conv_attention_project_bwd": Kernel({**LANES, **LIMIT, **WARPS}, WIDTHS),
    "conv_attention_fold": Kernel(
        {"BLOCK_E": (16, 32, 64), "BLOCK_D": (16, 32, 64), **WARPS}, bits=(32,)
    ),
    "conv_attention_fold_bwd": Kernel(
        {"BLOCK_E": (16, 32, 64), "BLOCK_D": (16, 32, 64), **WARPS}, bits=(32,)
    ),
    "conv_attention_keys": Kernel({"BLOCK_M": (32, 64, 128), **WARPS}, WIDTHS),
    "conv_attention_attend_fwd": Kernel(
        {"BLOCK_N": TILE, "BLOCK_M": TILE, "PRODUCTS": (0, 2, 4), **LIMIT, **WARPS, **STAGES},
        WIDTHS,
        rows="BLOCK_N",
    ),
    "conv_attention_attend_bwd_queries": Kernel(
        {"BLOCK_N": TILE, "BLOCK_M": TILE, "RELOADED": (0, 1), **LIMIT, **WARPS, **STAGES},
        WIDTHS,
        rows="BLOCK_N",
    ),
    "conv_attention_attend_bwd_keys": Kernel(
        {
            "BLOCK_M": TILE,
            "BLOCK_N": TILE,
            "STEP": (32, 64),
            **LIMIT,
            **WARPS,
            **STAGES,
            "RESIDENT": (1, 2, 3, 4, 5, 6),
        },
        WIDTHS,
        rows="BLOCK_M",
    ),
    "conv_attention_attend_bwd_finish": Kernel({"BLOCK_M": (8, 16, 32, 64), **WARPS}),
    "conv_attention_weights_bwd": Kernel(
        {"BLOCK_N": TILE, "BLOCK_C": (32, 64, 128), **LIMIT, **WARPS, **STAGES, **RESIDENT}, WIDTHS
    ),
    "mlp_block_fwd": Kernel(
        {"BLOCK_N": TILE, "BLOCK_E": TILE, **LIMIT, **WARPS, **STAGES, **RESIDENT},
        WIDTHS,
        rows="BLOCK_N",
    ),
    "mlp_block_bwd": Kernel(
        {"BLOCK_N": TILE, "BLOCK_E": TILE, **LIMIT, **WARPS, **STAGES, **RESIDENT},
        WIDTHS,
        rows="BLOCK_N",
    ),
    "mlp_block_bwd_tokens": Kernel(
        {"BLOCK_N": TILE, "BLOCK_E": TILE, **WARPS, **STAGES}, WIDTHS, rows="BLOCK_N"
    ),
    "token_embed_fwd": Kernel(
        {"BLOCK_P": (*TILE, 256), "BLOCK_K": TILE, **LIMIT, **WARPS, **STAGES},
        WIDTHS,
        rows="BLOCK_P",
    ),
    "token_embed_bwd": Kernel(
        {"BLOCK_P": (*TILE, 256), "BLOCK_K": TILE, **WARPS, **STAGES, **RESIDENT},
        WIDTHS,
        rows="BLOCK_P",
    ),
    "token_embed_bwd_filters": Kernel(
        {"BLOCK_P": (*TILE, 256), "BLOCK_K": TILE, **WARPS, **STAGES, **RESIDENT}, WIDTHS
    ),
    "token_embed_bwd_input": Kernel(
        {"BLOCK_P": (*TILE, 256), "BLOCK_C": (16, 32, 64), **WARPS, **STAGES}, WIDTHS
    ),
    "sum_rows": Kernel(
        {"BLOCK_ROWS": (32, 64, 128, 256), "BLOCK_COLUMNS": TILE, **WARPS}, COLUMNS, bits=(32,)
    ),
}

_installed: dict[str, Launch] = {}


def find(kernel: str, x: Tensor, shape: str = "any") -> Launch:
    """Return a copy of how ``kernel`` is launched on the device and for the dtype of ``x``."""
    capability = INTERPRETER if x.device.type == "cpu" else properties(x.device).capability
    launch = dict(nearest(kernel, 8 * x.dtype.itemsize, shape, capability))
    if registers := launch.pop("REGISTERS", 0):
        launch["maxnreg"] = registers  # Triton's name; it takes no 0
    return launch


class Properties(NamedTuple):
    """What launches ask of a GPU: its class, 80 for compute capability 8.0, and its size."""

    capability: int
    multiprocessors: int


def properties(device: torch.device) -> Properties:
    """Return the properties of a GPU, asked of torch once: some fifty launches a step want them."""
    return _properties(device) if device.index is None else _properties_of(device.index)


@functools.cache
def _properties_of(index: int) -> Properties:
    return _properties(index)


def _properties(device: torch.device | int) -> Properties:
    major, minor = torch.cuda.get_device_capability(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Properties(10 * major + minor, count)


@functools.cache
def nearest(kernel: str, bits: int, shape: str, capability: int) -> Launch:
    """Return the launch of the highest class up to ``capability``, 80 for 8.0; else the lowest."""
    entries = table()
    key = f"{kernel} {bits} {shape}"
    classes = sorted(class_of(k) for k in entries if k.endswith(f" {key}"))
    if not classes:
        raise KeyError(f"{FILE.name} has no launch for {key!r}")
    below = [c for c in classes if c <= capability]
    return entries[f"sm{below[-1] if below else classes[0]} {key}"]


def table() -> dict[str, Launch]:
    """Return the table in force: what is installed over what is shipped."""
    return _shipped() | _installed


def install(entries: Mapping[str, Any]) -> None:
    """Lay entries over the shipped table, in place of those laid there before.

    Raises:
        ValueError: as :func:`validated`.
    """
    global _installed
    _installed = validated(entries)
    nearest.cache_clear()


@contextmanager
def installed(entries: Mapping[str, Any]) -> Iterator[None]:
    """Add entries to those in force, until the block ends."""
    before = _installed
    install(before | dict(entries))
    try:
        yield
    finally:
        install(before)


def width_class(width: int) -> str:
    """Return the shape class of tiles with up to ``width`` channels."""
    return "D32" if width <= 32 else "D64" if width <= 64 else "D128"


def validated(entries: Mapping[str, Any]) -> dict[str, Launch]:
    """Return entries that are launches of this version's kernels.

    Raises:
        ValueError: if a key or a field is unknown or missing, or a value is not one it may have;
            the message names it, and what may stand there.
    """
    for key, launch in entries.items():
        device, kernel, bits, shape, *rest = [*str(key).split(" "), "", "", ""]
        if not re.fullmatch(r"sm\d+", device) or any(rest):
            raise ValueError(
                f"a launch is named by device class, kernel, bits and shape as in "
                f"'sm90 lift_conv 16 K256', got {key!r}"
            )
        known = KERNELS[_one_of(f"{key!r}: the kernel", kernel, KERNELS)]
        _one_of(f"{key!r}: bits", bits, map(str, known.bits))
        _one_of(f"{key!r}: the shape class", shape, known.shapes)
        if not isinstance(launch, dict) or launch.keys() != known.fields.keys():
            for field in launch if isinstance(launch, dict) else ():
                _one_of(f"{key!r}: a field", field, known.fields)
            raise ValueError(f"{key!r} needs the fields {', '.join(known.fields)}, got {launch!r}")
        for field, value in launch.items():
            if type(value) is not int or value not in known.fields[field]:
                allowed = ", ".join(map(str, known.fields[field]))
                raise ValueError(f"{key!r}: {field} must be one of {allowed}, got {value!r}")
        if why := too_few_rows(kernel, launch, class_of(key)):
            raise ValueError(f"{key!r}: {why}")
    return {key: dict(launch) for key, launch in entries.items()}


def too_few_rows(kernel: str, launch: Launch, capability: int) -> str | None:
    """Return why Hopper's matrix unit would read beyond a tile's rows, or None.

    It takes 16 rows for each warp, whole groups of 4. Triton stacks the warps of chained products
    whether there are as many rows or not, and its program then read illegal addresses on an H100
    or gave wrong gradients. Tiles of less than 64 rows go to the older unit, which is right.
    """
    known = KERNELS[kernel].rows
    rows = launch[known] if isinstance(known, str) else known
    if 90 <= capability < 100 and 64 <= rows < 16 * launch["num_warps"]:
        return (
            f"{launch['num_warps']} warps need {known if isinstance(known, str) else 'rows'} of "
            f"{16 * launch['num_warps']} or more on this class, got {rows}"
        )
    return None


@functools.cache
def _shipped() -> dict[str, Launch]:
    return validated(json.loads(FILE.read_text(encoding="utf-8")))


def class_of(key: str) -> int:
    """Return the device class of an entry, 90 for ``"sm90 ..."``."""
    return int(key.split(" ")[0].removeprefix("sm"))


def _one_of(what: str, given: str, allowed: Any) -> str:
    names = list(allowed)
    if given in names:
        return given
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what} must be one of {', '.join(map(repr, names))}, got {given!r}{hint}")
