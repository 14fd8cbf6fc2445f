"""Sets of labelled lensing images: in memory, in ``.npz`` files and in folders of shards."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eqcvt._check import choice, integer
from eqcvt._check import fraction as check_fraction
from eqcvt._files import replacing
from eqcvt.data.pixels import check_shape, pixels, unmasked

_PARAMETER = "parameter_"
_COLUMNS = ("images", "labels", "classes", "config", "seed", "index")
_OBJECTS = "Object arrays"  # how np.load begins to refuse them
_SHARD = re.compile(r"^(?P<name>.+)-(?P<shard>\d{5})-of-(?P<shards>\d{5})\.npz$")


@dataclass(frozen=True, eq=False, repr=False)
class LensingImages:
    """Labelled images.

    Args:
        images: [N, H, W] (grey) or [N, C, H, W], of a type that ``pixels`` takes; kept as uint8 or
            float32.
        labels: index of the class, or its name, [N]; kept as uint8.
        classes: Names of the classes.
        parameters: Physical parameters by name, each [N]; may be empty.
        config: Configuration of the simulation; may be empty.
        seed: Seed of the simulation, or None.
        index: Index of each image in the simulated set, int64 [N], or None.

    Raises:
        TypeError, ValueError: Parts that do not fit each other.
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.uint8]
    classes: tuple[str, ...] = ("no_sub", "sub")
    parameters: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    index: npt.NDArray[np.int64] | None = None

    def __repr__(self) -> str:
        shape, classes = "x".join(map(str, self.images.shape)), ", ".join(self.classes)
        return f"LensingImages({shape} {self.images.dtype}, classes: {classes})"

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", pixels(unmasked(self.images)))
        check_shape(self.images.shape)
        labels = unmasked(self.labels, "labels")
        object.__setattr__(self, "labels", _labels(labels, self.classes)[0])
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must have different names, got {', '.join(self.classes)}")
        count = len(self.images)
        columns = {"labels": self.labels, **self.parameters}
        if self.index is not None:
            columns["index"] = self.index
        for name, column in columns.items():
            if column.shape != (count,):
                raise ValueError(f"{name} must have the shape [{count}], got {column.shape}")
        if count and self.labels.max() >= len(self.classes):
            raise ValueError(
                f"labels must lie in 0..{len(self.classes) - 1} for the classes "
                f"{', '.join(self.classes)}, got {self.labels.max()}"
            )
        if self.images.dtype == np.float32:
            bad = [i for i in range(count) if not np.isfinite(self.images[i]).all()]
            if bad:
                raise ValueError(
                    f"images must be finite: {len(bad)} of {count} hold NaN or infinity, "
                    f"the first is image {bad[0]}"
                )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return 1 if self.images.ndim == 3 else int(self.images.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.images.shape[-2]), int(self.images.shape[-1])

    @cached_property
    def hashes(self) -> npt.NDArray[np.int64]:
        """Eight bytes of a hash of each image, [N], to know it again in another set."""
        digests = (hashlib.blake2b(i.tobytes(), digest_size=8).digest() for i in self.images)
        return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)

    def subset(self, indices: Sequence[int] | npt.NDArray[Any]) -> LensingImages:
        """Return the images at these places, in this order (a boolean mask serves as well)."""
        places = np.asarray(indices)
        if places.dtype != np.bool_:
            places = places.astype(np.int64)
        return replace(
            self,
            images=self.images[places],
            labels=self.labels[places],
            parameters={name: column[places] for name, column in self.parameters.items()},
            index=None if self.index is None else self.index[places],
        )

    def save(self, path: str | Path, *, compressed: bool = True) -> Path:
        """Write one ``.npz`` file, whole or not at all; ``load`` reads it back."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"a set is saved as a .npz file, got {str(path)!r}")
        columns: dict[str, npt.NDArray[Any]] = {
            "images": self.images,
            "labels": self.labels,
            "classes": np.array(self.classes, dtype=np.str_),
            "config": np.array(json.dumps(self.config)),
        }
        if self.seed is not None:
            columns["seed"] = np.array(json.dumps(self.seed))
        if self.index is not None:
            columns["index"] = self.index
        columns.update({_PARAMETER + name: column for name, column in self.parameters.items()})
        with replacing(path) as temporary:
            write: Any = np.savez_compressed if compressed else np.savez
            write(temporary, **columns)
        return path


def load(path: str | Path, split: str | None = None) -> LensingImages:
    """Read a set of images.

    Args:
        path: One ``.npz`` file of ``images`` and ``labels`` (whole numbers, or names of classes),
            perhaps ``classes`` (their names) and ``parameter_...``; a folder of ``.npz`` shards
            (their union, sorted by index); or a folder of ML4SCI's layout, one folder of
            ``.png``, ``.jpg``, ``.npy`` or FITS images per class, with or without ``train`` and
            ``val`` above.
        split: ``train`` or ``val``: read ``path/split`` or ``path/split.npz`` alone. None reads
            all there is.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError, TypeError: A file that cannot be read or does not fit; it is named. A folder
            with a set by the name of ``test``, ``valid`` or ``validation`` beside others.
    """
    from eqcvt.data.folders import HELD_OUT, SPLITS, read_folder

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}{_nearest(path)}")
    if split is not None:
        found = [p for p in (path / split, path / f"{split}.npz") if p.exists()]
        if split not in SPLITS or not found:
            there = [name for name in SPLITS if (path / name).exists()]
            there += [name for name in SPLITS if (path / f"{name}.npz").exists()]
            raise ValueError(
                f"{path} has no split {split!r}; it has {', '.join(there) or 'none'}: "
                "leave split out to read all images"
            )
        path = found[0]
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(
                f"cannot read {path}: a set is a .npz file, a folder of .npz shards or a folder "
                "with one folder of images per class"
            )
        return _read_npz(path)
    shards = sorted(p for p in path.glob("*.npz") if p.name[0] != "." and not p.is_dir())
    sets = shards or sorted(path / name for name in (*SPLITS, *HELD_OUT) if (path / name).is_dir())
    apart = next((p for p in sets if p.stem.lower() in HELD_OUT), None)
    if apart is not None and len(sets) > 1:
        other = next(p for p in sets if p != apart)
        raise ValueError(
            f"{path} is not one set: by its name {apart.name} is kept apart from {other.name}. "
            f"Name one of them, such as {other}"
        )
    return _join_shards(path, shards) if shards else read_folder(path)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def read_array(path: Path) -> Any:
    """Read a ``.npy`` or ``.npz`` file without unpickling; errors name the file."""
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:  # numpy fails in many ways on damaged files
        with path.open("rb") as file:
            start = file.read(1)
        # np.load calls a pickle whatever does not begin as one of its own files.
        if start == b"\x80" or _OBJECTS in str(error):
            raise ValueError(
                f"{path} holds pickled Python objects, which are not read because they can run "
                "code; save it as a plain array"
            ) from error
        why = "" if "pickle" in str(error) else f" ({error})"
        raise ValueError(f"cannot read {path}: truncated or not a numpy file{why}") from error


def _read_npz(path: Path) -> LensingImages:
    archive = read_array(path)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"cannot read {path}: a .npy file under the name of a .npz file")
    columns: dict[str, npt.NDArray[Any]] = {}
    with archive:
        missing = [name for name in _COLUMNS[:2] if name not in archive.files]
        if missing:
            raise ValueError(
                f"{path} lacks {' and '.join(map(repr, missing))}; it holds "
                f"{', '.join(archive.files) or 'nothing'}"
            )
        known = [n for n in archive.files if n in _COLUMNS or n.startswith(_PARAMETER)]
        _refuse_or_name(path, [n for n in archive.files if n not in known], known)
        for name in known:
            try:
                columns[name] = archive[name]
            except Exception as error:
                what = "holds pickled Python objects"
                if _OBJECTS not in str(error):
                    too_large = "too large for the memory, or " * isinstance(error, MemoryError)
                    what = f"is {too_large}truncated or damaged ({error})"
                raise ValueError(f"{path}: {name!r} {what}") from error
    try:
        return _from_columns(columns)
    except (ValueError, TypeError, OverflowError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error


def _refuse_or_name(path: Path, unknown: list[str], known: list[str]) -> None:
    """Refuse an array whose name is nearly one that would be read; warn of all others."""
    free = [name for name in _COLUMNS if name not in known]
    for name in unknown:
        if near := difflib.get_close_matches(name, free, n=1):
            raise ValueError(f"{path}: did you mean {near[0]!r} by {name!r}? Rename or remove it")
    if unknown:
        warnings.warn(
            f"{path}: not read: {', '.join(unknown)}; numbers, one for each image, are kept under "
            f"a name such as {_PARAMETER}{unknown[0]}",
            stacklevel=4,
        )


def _json(columns: dict[str, npt.NDArray[Any]], name: str, default: Any) -> Any:
    try:
        return json.loads(str(columns[name])) if name in columns else default
    except json.JSONDecodeError as error:
        raise ValueError(f"{name!r} is not JSON ({error})") from error


def class_order(names: Iterable[str]) -> list[str]:
    """Return names of classes in their order: those that begin with "no" first."""
    return sorted(names, key=lambda name: (not name.lower().startswith("no"), name))


def _texts(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.char.decode(column) if column.dtype.kind == "S" else column.astype(np.str_)


def _labels(
    labels: npt.NDArray[Any], classes: Sequence[str]
) -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
    """Return labels as numbers, and the classes: those of the file, or else what labels tell."""
    kind = labels.dtype.kind
    if kind in "US":
        found, places = np.unique(_texts(labels), return_inverse=True)
        classes = classes or class_order(found.tolist())
        numbers = [classes.index(choice("labels", name, classes)) for name in found.tolist()]
        labels = np.array(numbers, dtype=np.int64)[places]
    elif kind not in "biuf" or (kind == "f" and (labels != np.trunc(labels)).any()):
        raise TypeError(
            "labels must be whole numbers from 0 to 255 or names of classes, got "
            + (f"{labels[labels != np.trunc(labels)][0]}" if kind == "f" else f"{labels.dtype}")
        )
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise ValueError(f"labels must lie in 0..255, got {labels.min()}..{labels.max()}")
    labels = labels.astype(np.uint8)
    if not classes:
        top = int(labels.max(initial=0))
        lacking = np.setdiff1d(np.arange(top), labels)
        if top > 1 and len(lacking):
            raise ValueError(
                f"labels go up to {top} but lack {few(lacking)}: number the classes from 0 "
                "without a gap"
                + (" (subtract 1)" if labels.min() == 1 and len(lacking) == 1 else "")
                + ", or add an array 'classes' of their names"
            )
        classes = [f"class_{i}" for i in range(max(top, 1) + 1)]
    return labels, tuple(classes)


def _from_columns(columns: dict[str, npt.NDArray[Any]]) -> LensingImages:
    config = _json(columns, "config", {})
    if not isinstance(config, dict):
        raise ValueError(f"'config' must be a JSON object, got {config!r}")
    # Only a configuration of this package's simulation has structures.
    names = config.get("classes", []) if "structures" in config else []
    if "classes" in columns:
        if columns["classes"].ndim != 1:
            raise ValueError(f"classes must be a list of names, got {columns['classes']!r}")
        names = _texts(columns["classes"]).tolist()
    labels, classes = _labels(columns["labels"], names)
    return LensingImages(
        images=columns["images"],
        labels=labels,
        classes=classes,
        parameters={
            name[len(_PARAMETER) :]: column
            for name, column in columns.items()
            if name.startswith(_PARAMETER)
        },
        config=config,
        seed=_json(columns, "seed", None),
        index=columns["index"].astype(np.int64) if "index" in columns else None,
    )


def _join_shards(folder: Path, paths: list[Path]) -> LensingImages:
    names = [_SHARD.match(path.name) for path in paths]
    if all(names):
        expected = {int(m["shards"]) for m in names if m}
        if len(expected) > 1:
            raise ValueError(f"{folder} mixes shards of runs with {sorted(expected)} shards")
        lacking = set(range(expected.pop())) - {int(m["shard"]) for m in names if m}
        if lacking:
            raise ValueError(f"{folder} lacks shard {few(lacking)} of {paths[0].name[-9:-4]}")
    joined = join([_read_npz(path) for path in paths], [str(path) for path in paths])
    if joined.index is None:
        return joined
    values, counts = np.unique(joined.index, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{folder} holds these images twice: index {few(values[counts > 1])}")
    if len(values) and all(names):
        gaps = set(range(int(values[-1]) + 1)) - set(values.tolist())
        if gaps:
            raise ValueError(f"{folder} lacks images with index {few(gaps)}")
    return joined.subset(np.argsort(joined.index))


def few(numbers: Iterable[int]) -> str:
    """Return numbers in their order as text, of many the first five."""
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:5])) + (" ..." if len(ordered) > 5 else "")


def join(parts: Sequence[LensingImages], names: Sequence[str]) -> LensingImages:
    """Put sets of one kind one after the other.

    Args:
        parts: The sets; at least one.
        names: What to call each in an error.

    Raises:
        ValueError: A set that differs from the first in classes, configuration, seed, image size
            or type, or columns.
    """
    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        for what, here, there in (
            ("classes", part.classes, first.classes),
            ("configuration", part.config, first.config),
            ("seed", part.seed, first.seed),
            ("image shape", part.images.shape[1:], first.images.shape[1:]),
            ("image type", str(part.images.dtype), str(first.images.dtype)),
            ("parameters", sorted(part.parameters), sorted(first.parameters)),
            ("index", part.index is None, first.index is None),
        ):
            if here != there:
                raise ValueError(
                    f"{name} does not belong with {names[0]}: another {what}"
                    + (f" ({here} instead of {there})" if what != "configuration" else "")
                )
    if len(parts) == 1:
        return first
    indices = [part.index for part in parts if part.index is not None]
    return replace(
        first,
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        parameters={
            name: np.concatenate([part.parameters[name] for part in parts])
            for name in first.parameters
        },
        index=np.concatenate(indices) if indices else None,
    )


def split(
    data: LensingImages, fraction: float = 0.1, seed: int = 1337
) -> tuple[LensingImages, LensingImages]:
    """Hold out a fraction of each class at random.

    Args:
        data: The whole set.
        fraction: Share of each class to hold out, above 0 and below 1; rounded to whole images.
        seed: Decides which images.

    Returns:
        The rest and the held-out images, both in their old order.

    Raises:
        ValueError: A class too small to give an image to both.
    """
    check_fraction("fraction", fraction)
    integer("seed", seed, 0)
    held = np.zeros(len(data), dtype=np.bool_)
    rng = np.random.Generator(np.random.Philox(seed))
    for label, name in enumerate(data.classes):
        places = np.flatnonzero(data.labels == label)
        count = round(fraction * len(places))
        if len(places) and not 0 < count < len(places):
            raise ValueError(
                f"cannot hold out {fraction} of the {len(places)} images of class {name!r}: "
                "both parts need at least one; simulate more or choose another fraction"
            )
        held[rng.permutation(places)[:count]] = True
    return data.subset(~held), data.subset(held)


def to_unit(images: Tensor | npt.NDArray[Any]) -> Tensor:
    """Scale images to grey values in [0, 1].

    Args:
        images: uint8 (divided by 255) or floating (each image from its own minimum to its own
            maximum over all channels; a constant image becomes 0), [B, H, W] or [B, C, H, W].
            Of a NumPy array other numbers, in any byte order, are taken for floating.

    Returns:
        float32 [B, C, H, W].

    Raises:
        TypeError, ValueError: other types or shapes, or an array that masks some of its pixels.
    """
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "buif":
            raise TypeError(f"images must be numbers, got {images.dtype}")
        floating = np.float32 if np.can_cast(images.dtype, np.float32) else np.float64
        kept = np.uint8 if images.dtype == np.uint8 else floating
        images = torch.from_numpy(np.require(unmasked(images), kept, ["C", "W"]))
    if images.ndim not in (3, 4):
        raise ValueError(
            f"images must have the shape [B, H, W] or [B, C, H, W], got {list(images.shape)}"
        )
    if images.ndim == 3:
        images = images[:, None]
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 255
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating, got {images.dtype}")
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    span = images.amax(dim=(1, 2, 3), keepdim=True) - low
    return ((images - low) / torch.where(span > 0, span, 1)).to(torch.float32)
