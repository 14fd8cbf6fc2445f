"""Reading of published state dicts: tensors only, from files that may be anything."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from eqcvt._files import read_tensors

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile

State = dict[str, Tensor]


def read_state(path: Path) -> State:
    """Read a state dict from a ``.safetensors`` file or one of ``torch.save``, unwrapped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something other than finite tensors by name, or is damaged.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; a state dict is a file, and a folder of save_pretrained is read "
            f"by eqcvt.load_model"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    content = read_tensors(path) if path.suffix == ".safetensors" else _torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        kind = "an empty dict" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {kind}, not a state dict (names and their tensors)")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} is not a state dict: its entry {key!r} is of type "
                f"{type(value).__name__}, not a tensor with a name"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {key!r} has values that are not finite (NaN or Inf)")
    return _without_prefix(content)


def _without_prefix(state: State) -> State:
    for prefix in _PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _torch(path: Path) -> object:
    with path.open("rb") as file:
        # A zip archive, or a pickle of protocol 2 and later as torch.save wrote once.
        if file.read(2)[:1] not in (b"P", b"\x80"):
            raise ValueError(f"{path} is not a file of torch.save")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "nsupported" in str(error):  # a name or instruction that weights_only refuses
                raise ValueError(
                    f"{path} holds pickled code, which is not run, not only tensors; "
                    f"save the model's state_dict() instead: torch.save(model.state_dict(), ...)"
                ) from None
            raise ValueError(f"{path} is not a whole file of torch.save") from None
        except Exception:  # damaged bytes can make the reader fail in any way
            raise ValueError(f"{path} is not a whole file of torch.save") from None
