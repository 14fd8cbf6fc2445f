"""The published models' keys, and which entry of ours each of them is."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

MASK, WEIGHTS, FILTER, BLUR = "block1.0.mask", "block1.1.weights", "block1.1.filter", "pool1.filter"
_FRONT_NORM = re.compile(r"block1\.2\.batch_norm_\[(\d+)\]\.")
_SAMPLED = re.compile(r"block1\.1\._basisexpansion\.block_expansion_\(.*\)\.sampled_basis")
_BLOCK = re.compile(r"layers\.(\d+)\.2\.layers\.(\d+)\.")
_SHOWN = 5


class Entry(NamedTuple):
    """Entries of ours that are one published tensor, joined along the first axis, and its form.

    ``form`` is "" for the same shape, "channels" for ``[D]`` stored as ``[1, D, 1, 1]``,
    "pointwise" for ``[E, D]`` stored as ``[E, D, 1, 1]``.
    """

    ours: tuple[str, ...]
    form: str = ""

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the published shape for the shapes of our entries."""
        joined = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        if self.form == "channels":
            return (1, *joined, 1, 1)
        return (*joined, 1, 1) if self.form == "pointwise" else joined


@dataclass(frozen=True)
class Layout:
    """What the keys of a published state dict tell.

    Args:
        order: elements of the front's group; None for a CvT, which has no front.
        depths: transformer blocks of each stage.
        sampled_basis: key of the front's stored basis, if it is there.
    """

    order: int | None
    depths: tuple[int, ...]
    sampled_basis: str | None = None

    @property
    def head(self) -> tuple[str, str, str]:
        """Prefixes of the head's hidden map, batch norm and classifier."""
        n = len(self.depths)
        return f"layers.{n + 2}", f"layers.{n + 3}", f"layers.{n + 5}"

    def entries(self) -> dict[str, Entry]:
        """Return our entries for each published key, but for the front's filters and constants."""
        table: dict[str, Entry] = {}

        def add(published: str, ours: str, names: str, form: str = "") -> None:
            for name in names.split():
                theirs, _, mine = name.partition("=")
                table[f"{published}.{theirs}"] = Entry((f"{ours}.{mine or theirs}",), form)

        norm = "weight bias running_mean running_var num_batches_tracked"
        if self.order is not None:
            add(f"block1.2.batch_norm_[{self.order}]", "lift.0.norm", norm)
        for s, depth in enumerate(self.depths):
            stage, embed = f"layers.{s}", f"stages.{s}.embed"
            add(f"{stage}.0", embed, "weight=filters.weight bias")
            add(f"{stage}.1", f"{embed}.norm", "g=weight b=bias", "channels")
            for i in range(depth):
                block, ours = f"{stage}.2.layers.{i}", f"stages.{s}.blocks.{i}"
                add(f"{block}.0.norm", f"{ours}.attention.norm", "g=weight b=bias", "channels")
                for theirs, mine in (("to_q", "q_conv"), ("to_kv", "k_conv")):
                    net = f"{block}.0.fn.{theirs}.net"
                    add(f"{net}.0", f"{ours}.attention.{mine}.filters", "weight")
                    add(f"{net}.1", f"{ours}.attention.{mine}.norm", norm)
                    products = (f"{ours}.attention.{c}.weight" for c in theirs.removeprefix("to_"))
                    table[f"{net}.2.weight"] = Entry(tuple(products), "pointwise")
                out = f"{block}.0.fn.to_out.0"
                add(out, f"{ours}.attention.out", "weight", "pointwise")
                add(out, f"{ours}.attention.out", "bias")
                add(f"{block}.1.norm", f"{ours}.mlp.norm", "g=weight b=bias", "channels")
                for theirs, mine in (("0", "fc1"), ("3", "fc2")):
                    add(f"{block}.1.fn.net.{theirs}", f"{ours}.mlp.{mine}", "weight", "pointwise")
                    add(f"{block}.1.fn.net.{theirs}", f"{ours}.mlp.{mine}", "bias")
        hidden, head_norm, classifier = self.head
        add(hidden, "head.hidden", "weight bias")
        add(head_norm, "head.norm", norm)
        add(classifier, "head.classifier", "weight bias")
        return table

    def modes(self) -> dict[str, str]:
        """Return the module of ours that has the mode of each norm and dropout."""
        parts = ((key.rpartition("."), entry.ours[0]) for key, entry in self.entries().items())
        table = {t[0]: o.removesuffix(".weight") for t, o in parts if o.endswith("norm.weight")}
        for s, depth in enumerate(self.depths):
            for i in range(depth):
                block, ours = f"layers.{s}.2.layers.{i}", f"stages.{s}.blocks.{i}"
                table[f"{block}.0.fn.to_out.1"] = f"{ours}.attention"
                table[f"{block}.1.fn.net.2"] = table[f"{block}.1.fn.net.4"] = f"{ours}.mlp"
        return table


def read_layout(state: dict[str, Tensor], source: str) -> Layout:
    """Find the layout from the keys of a state dict and check that they are all there, and no more.

    Index buffers (integers) are of no account, and dropped from ``state``; a front's pooling in a
    container of its own is renamed.

    Args:
        state: the state dict, changed in place.
        source: what errors call it.

    Raises:
        ValueError: on missing or unknown keys, which are named with the nearest.
    """
    for key, value in list(state.items()):
        if not value.is_floating_point() and not key.endswith(".num_batches_tracked"):
            del state[key]
    if "pool1.0.filter" in state:
        state[BLUR] = state.pop("pool1.0.filter")
    if any(key.startswith(("stages.", "head.", "lift.")) for key in state):
        raise ValueError(
            f"{source} has the keys of an eqcvt checkpoint, not of a published one; "
            f"eqcvt.load_model reads the folder that save_pretrained wrote"
        )
    blocks = [(int(m[1]), int(m[2])) for m in map(_BLOCK.match, state) if m]
    if not blocks:
        raise ValueError(
            f"{source} has no transformer blocks ('layers.0.2.layers.0...'), so it is neither an "
            f"EqCvT nor a CvT of the published layout; its first keys are "
            f"{', '.join(map(repr, list(state)[:_SHOWN]))}"
        )
    stages = range(max(s for s, _ in blocks) + 1)
    depths = tuple(max([i for s, i in blocks if s == stage], default=0) + 1 for stage in stages)
    front = any(key.startswith(("block1.", "pool1.")) for key in state)
    orders = [int(m[1]) for m in map(_FRONT_NORM.match, state) if m]
    sampled = next((key for key in state if _SAMPLED.fullmatch(key)), None)
    layout = Layout((orders or [4])[0] if front else None, depths, sampled)
    expected = set(layout.entries())
    optional = set()
    if front:
        expected |= {MASK, WEIGHTS, BLUR} | (set() if sampled else {FILTER})
        optional = {FILTER} | ({sampled} if sampled else set())
    missing = [key for key in sorted(expected) if key not in state]
    unknown = [key for key in sorted(state) if key not in expected | optional]
    if missing or unknown:
        parts = [
            *_describe("missing", missing, unknown or list(state), "nearest there"),
            *_describe("unknown", unknown, missing or [*expected, *optional], "nearest known"),
        ]
        name = "an EqCvT" if front else "a CvT"
        raise ValueError(f"{source} is not {name} of the published layout: {'; '.join(parts)}")
    return layout


def _describe(what: str, keys: list[str], others: list[str], nearest: str) -> list[str]:
    """Name keys, each with the nearest other one."""
    if not keys:
        return []
    texts = []
    for key in keys[:_SHOWN]:
        near = difflib.get_close_matches(key, others, n=1, cutoff=0.6)
        texts.append(f"{key!r}" + (f" ({nearest}: {near[0]!r})" if near else ""))
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return [f"{what} {', '.join(texts)}{more}"]
