"""What conversion refuses, and how it says so."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from eqcvt import CvT, EqCvT
from eqcvt.convert import from_escnn, load_published, to_escnn
from tests.published import (
    SAMPLED,
    SMALL,
    SMALL_STAGES,
    State,
    needs_escnn,
    published_cvt,
    published_eqcvt,
    saved,
)


def edited(**changes: Tensor | None) -> Callable[[State], State]:
    """Return a function that sets (or with None removes) entries, ``__`` standing for a dot."""

    def edit(state: State) -> State:
        for name, value in changes.items():
            state[name.replace("__", ".")] = value  # type: ignore[assignment]
        return {key: value for key, value in state.items() if value is not None}

    return edit


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {(new if key == old else key): v for key, v in state.items()}


def broken_filter(state: State) -> State:
    state["block1.1.filter"] += torch.randn(40, 1, 7, 7) * 0.1
    return state


def wide_filter(state: State) -> State:
    """Turned copies of filters with values everywhere, outside of the band limit."""
    base = torch.randn(10, 1, 7, 7)
    turned = torch.stack([torch.rot90(base, g, (-2, -1)) for g in range(4)], 1)
    state["block1.1.filter"] = turned.flatten(0, 1)
    return state


def clockwise_filter(state: State) -> State:
    bank = state["block1.1.filter"].reshape(10, 4, 1, 7, 7)
    state["block1.1.filter"] = bank[:, [0, 3, 2, 1]].flatten(0, 1)
    return state


@pytest.mark.filterwarnings("ignore:.*the filter is taken")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            renamed("layers.0.1.g", "layers.0.1.gg"),
            r"missing 'layers.0.1.g' \(nearest there: 'layers.0.1.gg'\); "
            r"unknown 'layers.0.1.gg' \(nearest known: 'layers.0.1.g'\)",
        ),
        (edited(layers__6__bias=None), "not an EqCvT .*missing 'layers.6.bias'"),
        (edited(pool1__filter=None), "missing 'pool1.filter'"),
        (edited(block1__0__mask=None), "missing 'block1.0.mask'"),
        (edited(block1__1__weights=None), "missing 'block1.1.weights'"),
        (edited(block1__1__bias=torch.zeros(10)), "unknown 'block1.1.bias'"),
        (edited(pos_embed=torch.zeros(3)), "unknown 'pos_embed'$"),
        (
            lambda s: {k: v for k, v in s.items() if k not in (SAMPLED, "block1.1.filter")},
            "missing 'block1.1.filter'",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "layers.0.2.layers.0" not in k},
            r"missing 'layers.0.2.layers.0.0.fn.to_kv.net.0.weight'.* and 19 more",
        ),
        (
            lambda s: {k: v for k, v in s.items() if ".layers." not in k},
            "no transformer blocks .* its first keys are 'block1.0.mask'",
        ),
        (
            edited(layers__6__weight=torch.zeros(2, 63)),
            r"'layers.6.weight' has the shape \[2, 63\], but \[2, 64\] fits",
        ),
        (
            edited(layers__3__weight=torch.zeros(64, 32, 1, 1)),
            r"'layers.3.weight' has the shape \[64, 32, 1, 1\], expected \[E, D\]",
        ),
        (
            edited(layers__0__0__bias=torch.zeros(31)),
            r"'layers.0.0.bias' has the shape \[31\], but \[32\] fits",
        ),
        (
            edited(block1__1__filter=torch.zeros(36, 1, 7, 7)),
            r"'block1.1.filter' has the shape \[36, 1, 7, 7\], but 10 fields of 4 channels "
            r"need \[40, C, k, k\]",
        ),
        (
            edited(block1__1__filter=torch.zeros(40, 1, 5, 5)),
            r"\[40, 1, 5, 5\], but 'block1.1.weights' and the stored basis make \[40, 1, 7, 7\]",
        ),
        (
            edited(block1__1__weights=torch.zeros(181)),
            r"'block1.1.weights' \[181\]; 10 fields need \[b, 4, 1, k \* k\]",
        ),
        (
            lambda s: {
                **{k: v for k, v in s.items() if k != SAMPLED},
                "block1.1.filter": torch.randn(40, 1, 13, 13),
            },
            "kernel_size must be 3 to 11, got 13; the nearest is 11",
        ),
        (broken_filter, r"outside of our basis \(C4, 7x7\): .*residual is 0\.\d+, at most 0\.001"),
        (broken_filter, "its channel 1 is not channel 0 turned by element 1 of C4"),
        (clockwise_filter, "in another order of the group's elements"),
        (wide_filter, "probably made with other rings, widths or frequency cut-off"),
        (edited(block1__0__mask=torch.rand(1, 1, 33, 33)), "not a circular mask"),
        (edited(block1__0__mask=torch.ones(1, 1, 33, 33)), "not a circular mask"),
        (
            edited(block1__0__mask=torch.ones(1, 1, 33, 34)),
            r"'block1.0.mask' has the shape \[1, 1, 33, 34\], expected \[1, 1, H, H\]",
        ),
        (edited(pool1__filter=torch.ones(40, 1, 5, 5) / 25), "not one Gaussian blur"),
        (
            edited(layers__3__bias=torch.full((64,), torch.nan)),
            r"'layers.3.bias' has values that are not finite",
        ),
        (lambda s: {**s, "epoch": 3}, "its entry 'epoch' is of type int, not a tensor"),
        (lambda s: {**s, 3: torch.ones(1)}, "its entry 3 is of type Tensor, not a tensor with a n"),
        (lambda s: [s], "holds list, not a state dict"),
        (lambda s: {}, "holds an empty dict, not a state dict"),
        (lambda s: torch.ones(3), "holds Tensor, not a state dict"),
        (lambda s: EqCvT(**SMALL).state_dict(), "keys of an eqcvt checkpoint.*eqcvt.load_model"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(
    tmp_path: Path, edit: Callable[[State], object], message: str
) -> None:
    path = saved(edit(published_eqcvt(size=33)), tmp_path / "author.pt")
    with pytest.raises(ValueError, match=message) as error:
        load_published(path)
    assert str(path) in str(error.value)


def test_cvt_with_a_missing_key_is_called_a_cvt(tmp_path: Path) -> None:
    state = published_cvt()
    del state["layers.1.1.b"]
    with pytest.raises(ValueError, match=r"is not a CvT of .* missing 'layers.1.1.b'"):
        load_published(saved(state, tmp_path / "cvt.pt"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_size": 65}, ValueError, "image_size=65 was asked for.* of 33x33 pixels"),
        ({"head_dim": 60}, ValueError, "192 attention channels of stage 0 are not 3 heads of 60"),
        ({"heads": 5}, ValueError, "192 attention channels of stage 0 are not 5 heads of 38"),
        ({"heads": 3, "head_dim": 32}, ValueError, "not 3 heads of 32; give heads= or head_dim="),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"embed_stride": [2, 2]}, ValueError, "embed_stride must be one number or one for each"),
        ({"embed_stride": 2.0}, TypeError, "embed_stride must be an integer, got float 2.0"),
        ({"kv_stride": "2"}, TypeError, "kv_stride must be an integer, got str '2'"),
        ({"dropout": 1.5}, ValueError, "dropout must lie in"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = saved(published_eqcvt(size=33), tmp_path / "author.pt")
    with pytest.raises(error, match=message):
        load_published(path, **arguments)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "is not a file of torch.save"),
        ("a.csv", b"file,class,no_sub\nabc", "is not a file of torch.save"),
        ("a.pt", b"PK\x03\x04 and no more", "not a whole file of torch.save"),
        ("a.pt", pickle.dumps(_Code(), 2), r"holds pickled code, which is not run.*state_dict\(\)"),
        ("a.pt", pickle.dumps({"a": _Code()}, 2), "holds pickled code"),
        ("a.safetensors", b"hello, this is text", "not a whole safetensors file"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_published(path)
    assert str(path) in str(error.value)
    assert capsys.readouterr().out == ""


def test_missing_truncated_whole_model_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none.pt"):
        load_published(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"is a folder; .*eqcvt.load_model"):
        load_published(tmp_path)
    path = saved(published_eqcvt(size=33), tmp_path / "a.pt")
    whole = path.read_bytes()
    for length in (10, 1000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.pt is not a whole file of torch\.save"):
            load_published(path)
    saved(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"a\.pt holds pickled code"):
        load_published(path)
    safetensors.torch.save_file(published_cvt(), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a whole safetensors file"):
        load_published(tmp_path / "a.safetensors")


BLOCK = "layers.0.2.layers.0"


class Doubled(nn.ELU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def put(author: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a module, or add one, under a name of any form."""
    parent, _, name = path.rpartition(".")
    author.get_submodule(parent)._modules[name] = module


@pytest.mark.parametrize(
    ("path", "module", "message"),
    [
        (f"{BLOCK}.1.fn.net.1", nn.ReLU(), r" must be GELU\(.* with torch's own.*, got ReLU\(\)"),
        (f"{BLOCK}.1.fn.net.1", nn.GELU("tanh"), ".approximate must be 'none', got 'tanh'"),
        ("layers.2", nn.AdaptiveMaxPool2d(1), r" must be AdaptiveAvg.*, got AdaptiveMaxPool2d\("),
        ("layers.2", nn.AdaptiveAvgPool2d(2), ".output_size must be 1, got 2"),
        ("layers.6", nn.ELU(0.3), ".alpha must be 1.0, got 0.3"),
        ("layers.6", nn.ReLU(), r" must be ELU\(alpha=1.0\) .*, got ReLU\(\)"),
        ("layers.6", Doubled(), r" must be ELU\(alpha=1.0\) with torch's own.*, got Doubled\("),
        ("layers.8", nn.Softmax(-1), r" is Softmax\(dim=-1\), and the published layout has nothi"),
        (f"{BLOCK}.0.fn.attend", nn.Softmax(1), r" is Softmax\(dim=1\), and .* put nn.Identity"),
        (f"{BLOCK}.0.fn.dropout", nn.Dropout(0.1), r" is Dropout\(p=0.1, .* nothing there"),
        (f"{BLOCK}.0.fn.to_out.1", nn.Dropout2d(0.1), r" must be Dropout\(p=0.1.*, got Dropout2d"),
        ("layers.5", nn.SyncBatchNorm(128), r" must be BatchNorm1d\(.*, got SyncBatchNorm\("),
    ],
)
def test_live_modules_of_other_functions_are_refused(
    path: str, module: nn.Module, message: str
) -> None:
    author = to_escnn(CvT(image_size=33, stages=SMALL_STAGES))
    put(author, path, module)
    with pytest.raises(ValueError, match=f"AuthorModel: {path}{message}"):
        from_escnn(author)


def test_what_acts_in_training_alone_is_left_out_of_a_model_in_evaluation() -> None:
    author = to_escnn(CvT(image_size=33, stages=SMALL_STAGES))
    put(author, f"{BLOCK}.0.fn.dropout", nn.Dropout(0.1))
    author = nn.SyncBatchNorm.convert_sync_batchnorm(author).eval()
    x = torch.rand(2, 1, 33, 33)
    torch.testing.assert_close(from_escnn(author)(x), author(x))


@needs_escnn
def test_a_front_of_other_functions_is_refused() -> None:
    model = EqCvT(1, **SMALL)
    author: Any = to_escnn(model)
    from escnn import nn as enn

    fields = author.gpool.in_type
    changes: list[tuple[str, nn.Module, str]] = [
        ("block1.3", enn.ELU(fields), r"block1.3 must be escnn's or e2cnn's ReLU, got ELU\("),
        ("block1.3", nn.ReLU(), r"block1.3 must be escnn's or e2cnn's ReLU, got ReLU\(\)"),
        ("gpool", enn.NormPool(fields), r"gpool must be escnn's or e2cnn's GroupPooling, got Norm"),
        ("block1.4", enn.ReLU(fields), r"block1.4 is ReLU\(.*, and the published layout has noth"),
        ("pool1", enn.SequentialModule(author.pool1, enn.ELU(fields)), r"pool1.1 is ELU\("),
    ]
    for path, module, message in changes:
        author = to_escnn(model)
        put(author, path, module)
        with pytest.raises(ValueError, match=message):
            from_escnn(author)
    for path, attribute, value in (
        ("block1.1", "padding_mode", "reflect"),
        ("block1.2.batch_norm_[4]", "eps", 1e-3),
        ("pool1", "padding", (1, 1)),
    ):
        author = to_escnn(model)
        setattr(author.get_submodule(path), attribute, value)
        with pytest.raises(ValueError, match=rf"{re.escape(path)}\.{attribute} must be "):
            from_escnn(author)
    author = to_escnn(model)
    del author.block1._modules["3"]
    with pytest.raises(ValueError, match=r"AuthorModel has no module 'block1\.3'"):
        from_escnn(author)
