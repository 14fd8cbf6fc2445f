"""Conversion of published state dicts and live models: every key and every size."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from eqcvt import CvT, EqCvT, load_model
from eqcvt.convert import from_escnn, load_published, to_escnn
from eqcvt.groups import Group, lifting_basis
from eqcvt.nn import Stage
from eqcvt.ops import blur_kernel, circular_mask
from tests.published import (
    SAMPLED,
    SMALL,
    SMALL_STAGES,
    State,
    difference,
    needs_escnn,
    published_cvt,
    published_eqcvt,
    randomised,
    same_weights,
    saved,
)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("channels", "parameters"), [(1, 64_810), (3, 65_170)])
def test_published_eqcvt_is_recognised(
    tmp_path: Path, channels: int, parameters: int, shuffled: bool
) -> None:
    state = published_eqcvt(channels, shuffled=shuffled)
    model: Any = load_published(saved(state, tmp_path / "best.pt"))
    assert not model.training
    assert model.config == EqCvT(in_channels=channels).config
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert isinstance(model.conversion_residual, float)
    assert model.conversion_residual < 1e-6
    lift = model.lift[0]
    torch.testing.assert_close(
        lift.bank().flatten(0, 1), state["block1.1.filter"], atol=1e-6, rtol=0
    )
    assert lift.norm.num_batches_tracked == 7
    kv = state["layers.0.2.layers.1.0.fn.to_kv.net.2.weight"]
    attention = model.stages[0].blocks[1].attention
    assert torch.equal(attention.k.weight, kv[:192, :, 0, 0])
    assert torch.equal(attention.v.weight, kv[192:, :, 0, 0])
    assert isinstance(model, EqCvT)


@needs_escnn
@pytest.mark.parametrize(("channels", "size"), [(1, 129), (3, 41)])
def test_published_eqcvt_has_the_logits_of_the_escnn_model(
    tmp_path: Path, channels: int, size: int
) -> None:
    state = published_eqcvt(channels, size, shuffled=True)
    model: Any = load_published(saved(state, tmp_path / "best.pt"))
    # The state dict's own basis and filter replace what the escnn modules made.
    author: Any = to_escnn(EqCvT(channels, image_size=size).eval())
    assert author.load_state_dict(state, strict=False).missing_keys == []
    assert difference(model, author, channels, size) < 1e-5
    author.train().eval()  # the filter is now expanded from the weights in the stored basis
    assert difference(model, author, channels, size) < 1e-5


def test_published_cvt_is_recognised_and_has_its_logits(tmp_path: Path) -> None:
    state = published_cvt()
    model: Any = load_published(saved(state, tmp_path / "cvt.pth"))
    assert isinstance(model, CvT)
    assert not model.training
    assert model.config == CvT().config
    assert model.conversion_residual == 0
    author: Any = to_escnn(CvT(image_size=65).eval())
    author.load_state_dict(state)
    small = load_published(tmp_path / "cvt.pth", image_size=65)
    assert small.config["image_size"] == 65
    assert difference(small, author, 1, 65) < 1e-5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {k.replace("pool1.", "pool1.0."): v for k, v in state.items()},
        lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
    ],
    ids=["state_dict", "model", "DataParallel", "compiled", "pool in a container", "float64"],
)
def test_wrapped_state_dicts_are_the_same_model(
    tmp_path: Path, wrap: Callable[[State], object]
) -> None:
    state = published_eqcvt(size=33)
    plain = load_published(saved(state, tmp_path / "plain.pt"))
    wrapped = load_published(saved(wrap(state), tmp_path / "wrapped.pt"))
    assert wrapped.config == plain.config
    assert same_weights(wrapped, plain) == 0
    assert all(p.dtype == torch.float32 for p in wrapped.parameters())


def test_safetensors_and_our_own_folder_keep_the_weights(tmp_path: Path) -> None:
    state = published_eqcvt(size=33)
    safetensors.torch.save_file(state, tmp_path / "author.safetensors")
    model: Any = load_published(tmp_path / "author.safetensors")
    model.save_pretrained(tmp_path / "ours")
    assert same_weights(load_model(tmp_path / "ours"), model) == 0
    assert same_weights(load_published(saved(state, tmp_path / "a.pt")), model) == 0


@pytest.mark.parametrize("name", ["C4", "D2", "C8", "D4", "C16", "D8", "C5", "C1", "D1"])
def test_group_is_told_by_the_filters(tmp_path: Path, name: str) -> None:
    order = Group.from_name(name).order
    state = published_eqcvt(size=33)
    basis = lifting_basis(name, 5)
    weights = torch.randn(10, 1, len(basis))
    bank = torch.einsum("fcb,bgij->fgcij", weights.double(), basis)
    state["block1.1.weights"] = weights.flatten()
    state["block1.1.filter"] = bank.reshape(10 * order, 1, 5, 5).float()
    state[SAMPLED] = basis.reshape(len(basis), order, 1, 25).float()
    state["pool1.filter"] = blur_kernel(0.66).float().expand(10 * order, 1, 5, 5).clone()
    for key in [key for key in state if "batch_norm_[4]" in key]:
        state[key.replace("[4]", f"[{order}]")] = state.pop(key)
    model: Any = load_published(saved(state, tmp_path / "a.pt"))
    assert (model.config["group"], model.config["kernel_size"]) == (name, 5)
    assert model.conversion_residual < 1e-6
    # Filters that are all zero fit any group: the stored basis decides.
    state["block1.1.filter"].zero_()
    state["block1.1.weights"].zero_()
    assert load_published(saved(state, tmp_path / "a.pt")).config["group"] == name


def test_state_saved_in_training_mode_is_expanded_from_its_weights(tmp_path: Path) -> None:
    state = published_eqcvt(size=33, shuffled=True)
    whole: Any = load_published(saved(state, tmp_path / "eval.pt"))
    del state["block1.1.filter"]
    model: Any = load_published(saved(state, tmp_path / "train.pt"))
    assert model.conversion_residual < 1e-6
    assert same_weights(model, whole) < 1e-6


def test_filter_wins_over_weights_with_a_warning(tmp_path: Path) -> None:
    state = published_eqcvt(size=33)
    whole: Any = load_published(saved(state, tmp_path / "a.pt"))
    state["block1.1.weights"] = state["block1.1.weights"] * 1.01
    with pytest.warns(UserWarning, match=r"relative difference 0\.0099\); the filter is taken"):
        model: Any = load_published(saved(state, tmp_path / "a.pt"))
    assert same_weights(model, whole) == 0
    del state[SAMPLED]  # then the weights mean nothing, and are not compared
    assert same_weights(load_published(saved(state, tmp_path / "a.pt")), whole) == 0


def test_filter_never_expanded_gives_way_to_the_weights(tmp_path: Path) -> None:
    state = published_eqcvt(size=33)
    whole: Any = load_published(saved(state, tmp_path / "a.pt"))
    state["block1.1.filter"].zero_()
    with pytest.warns(UserWarning, match="it is all zero, so the weights are taken"):
        model: Any = load_published(saved(state, tmp_path / "a.pt"))
    assert same_weights(model, whole) < 1e-6


@pytest.mark.parametrize(("margin", "sigma"), [(0.0, 2.0), (2.0, 2.0), (12.3, 3.5), (1.0, 1.0)])
def test_mask_and_blur_are_read_from_their_values(
    tmp_path: Path, margin: float, sigma: float
) -> None:
    state = published_eqcvt(size=33)
    state["block1.0.mask"] = circular_mask(33, margin=margin, sigma=sigma).float()[None, None]
    state["pool1.filter"] = blur_kernel(0.8).float().expand(40, 1, 5, 5).clone()
    model: Any = load_published(saved(state, tmp_path / "a.pt"))
    config = model.config
    assert (config["mask_margin"], config["mask_sigma"]) == pytest.approx((margin, sigma), abs=1e-4)
    assert config["blur_sigma"] == pytest.approx(0.8, abs=1e-4)
    torch.testing.assert_close(model.lift[0].mask, state["block1.0.mask"][0, 0], atol=1e-6, rtol=0)
    blur = torch.outer(model.lift[0].blur, model.lift[0].blur)
    torch.testing.assert_close(blur, state["pool1.filter"][0, 0], atol=1e-6, rtol=0)


def test_arguments_say_what_shapes_do_not(tmp_path: Path) -> None:
    path = saved(published_cvt(), tmp_path / "cvt.pt")
    model: Any = load_published(
        path, image_size=65, heads=[4, 6], embed_stride=[2, 2], kv_stride=1, dropout=0.3
    )
    stages = model.config["stages"]
    assert [(s["heads"], s["head_dim"]) for s in stages] == [(4, 32), (6, 32)]
    assert [(s["embed_stride"], s["kv_stride"]) for s in stages] == [(2, 1), (2, 1)]
    assert model.config["dropout"] == 0.3
    assert [s["heads"] for s in load_published(path, head_dim=32).config["stages"]] == [4, 6]


@needs_escnn
@pytest.mark.parametrize(
    ("channels", "group", "options"),
    [
        (1, "C4", {}),
        (3, "D4", {"kernel_size": 5, "padding": 2, "dropout": 0.25}),
        (1, "C8", {"stages": SMALL_STAGES, "head_hidden": 5, "num_classes": 4}),
        (2, "D8", {"mask_margin": 5.0, "mask_sigma": 1.5, "blur_sigma": 1.0, "kernel_size": 4}),
        (1, "C6", {"lift_stride": 2, "blur_stride": 2, "stages": [Stage(8)]}),
    ],
)
def test_eqcvt_round_trip(
    tmp_path: Path, channels: int, group: str, options: dict[str, Any]
) -> None:
    model = EqCvT(channels, group=group, **{**SMALL, **options})
    randomised(model)
    training = to_escnn(model)
    assert training.training
    assert "block1.1.filter" not in training.state_dict()
    assert same_weights(from_escnn(training), model) < 1e-5
    assert from_escnn(training).training

    author: Any = to_escnn(model.eval())
    assert difference(author, model, channels, 33) < 1e-5
    back: Any = from_escnn(author)
    assert not back.training
    assert back.config == model.config
    assert back.conversion_residual < 1e-6
    assert same_weights(back, model) < 1e-5

    strides = {name: model.config[name] for name in ("padding", "lift_stride", "blur_stride")}
    if strides == {"padding": 1, "lift_stride": 1, "blur_stride": 1}:
        stages = model.config["stages"]
        path = saved(author.state_dict(), tmp_path / "a.pt")
        read = load_published(
            path,
            heads=[s["heads"] for s in stages],
            embed_stride=[s["embed_stride"] for s in stages],
            kv_stride=[s["kv_stride"] for s in stages],
        )
        assert read.config == model.config
        assert same_weights(read, model) < 1e-5


@needs_escnn
def test_live_module_decides_by_its_mode_which_filter_is_true() -> None:
    author: Any = to_escnn(EqCvT(1, **SMALL))
    author.eval()
    reference = from_escnn(author)
    conv = author.block1[1]
    with torch.no_grad():
        conv.weights.zero_()
    with pytest.warns(UserWarning, match="the filter is taken"):
        assert same_weights(from_escnn(author), reference) == 0
    conv.training = True  # in training escnn expands the weights at every call
    empty: Any = from_escnn(author)
    assert not empty.lift[0].weight.any()


@needs_escnn
@pytest.mark.parametrize("training", [True, False])
def test_each_norm_and_dropout_keeps_its_mode(training: bool) -> None:
    model: Any = EqCvT(1, **SMALL).train(training)
    block = model.stages[0].blocks[1]
    ours = ("lift.0.norm", "stages.0.blocks.1.attention.k_conv.norm", "head.norm")
    for part in (block.attention, block.mlp, *map(model.get_submodule, ours)):
        part.training = not training
    block.mlp.dropout = 0.3
    author: Any = to_escnn(model)
    fn = "layers.0.2.layers.1.{}.fn.{}".format
    nets = (fn(1, "net.2"), fn(1, "net.4"))
    theirs = ("block1.2.batch_norm_[4]", fn(0, "to_kv.net.1"), "layers.4", fn(0, "to_out.1"), *nets)
    parts = dict(author.named_modules())
    assert {n for n, m in parts.items() if m.training != training} == set(theirs)
    assert [name for name, m in parts.items() if getattr(m, "p", 0.1) == 0.3] == [*nets]
    for name in nets:
        parts[name].p = 0.1
    back = from_escnn(author)
    assert {n: m.training for n, m in back.named_modules()} == {
        n: m.training for n, m in model.named_modules()
    }
    parts[nets[0]].train(training)
    with pytest.raises(ValueError, match=r"fn.net.2 and .*fn.net.4 are one dropout in ours"):
        from_escnn(author)


def test_cvt_round_trip_without_escnn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "escnn", None)
    model = CvT(2, 3, 33, stages=SMALL_STAGES, head_hidden=6, dropout=0.0)
    randomised(model)
    author: Any = to_escnn(model)
    assert author.training
    assert from_escnn(author).training
    model.eval()
    author = to_escnn(model)
    assert difference(author, model, 2, 33) < 1e-5
    back: Any = from_escnn(author)
    assert back.config == model.config
    assert same_weights(back, model) == 0
    del author.image_size
    assert from_escnn(author, image_size=33).config == model.config
    assert from_escnn(author).config["image_size"] == 129
    double = to_escnn(copy.deepcopy(model).double())
    assert next(double.parameters()).dtype == torch.float64
    assert next(from_escnn(double).parameters()).dtype == torch.float32


def test_to_escnn_without_escnn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "escnn", None)
    with pytest.raises(ImportError, match=r"escnn is not installed: pip install --no-deps escnn"):
        to_escnn(EqCvT(**SMALL))


@pytest.mark.needs("escnn")
def test_to_escnn_needs_nothing_imported_before() -> None:
    code = f"from eqcvt import EqCvT, convert; convert.to_escnn(EqCvT(**{SMALL!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def with_norms(model: EqCvT | CvT, **numbers: float | None) -> EqCvT | CvT:
    """Give a model's norms other numbers."""
    for module in model.modules():
        vars(module).update(
            {name: value for name, value in numbers.items() if hasattr(module, name)}
        )
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EqCvT(**SMALL, invariance="exact"), "no place for invariance='exact'"),
        (lambda: EqCvT(**SMALL, lift_depth=2), "lift_depth=2"),
        (lambda: EqCvT(**SMALL, mask=False, blur_sigma=None), "mask=False, blur_sigma=None"),
        (lambda: EqCvT(**SMALL, head_hidden=None), "head_hidden=None"),
        (lambda: EqCvT(**SMALL, num_classes=0), "num_classes=0"),
        (
            lambda: CvT(stages=[Stage(8), Stage(8, separate_kv=True, projection_bias=True)]),
            "separate_kv of stage 1, projection_bias of stage 1",
        ),
        (lambda: CvT(stages=[Stage(8, embed_padding=0)]), "embed_padding=0 of stage 0"),
        (
            lambda: with_norms(CvT(), eps=0.1, momentum=None),
            r"norm\.eps=0\.1, .*head\.norm\.momentum=None; it holds .* norms of eps=1e-05",
        ),
    ],
)
def test_to_escnn_refuses_what_the_layout_cannot_hold(
    build: Callable[[], EqCvT | CvT], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_escnn(build())


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="from_escnn takes a torch module, got dict"):
        from_escnn({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to_escnn takes an eqcvt EqCvT or CvT, got Linear"):
        to_escnn(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no transformer blocks"):
        from_escnn(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="CvT has the keys of an eqcvt checkpoint"):
        from_escnn(CvT(image_size=33, stages=SMALL_STAGES))


@pytest.mark.parametrize(
    ("path", "attribute", "value", "message"),
    [
        ("layers.0.0", "padding", (0, 0), "layers.0.0.padding must be 1, got 0"),
        ("layers.0.0", "stride", (2, 1), r"layers.0.0.stride=\(2, 1\) is not one number"),
        ("layers.5", "eps", 1e-3, "layers.5.eps must be 1e-05, got 0.001"),
        ("layers.5", "momentum", None, "layers.5.momentum must be 0.1, got None"),
        ("layers.0.1", "eps", 1e-6, "layers.0.1.eps must be 1e-05, got 1e-06"),
        ("layers.1.2.layers.1.0.fn", "heads", 2, "has other strides or heads than block 0"),
        ("layers.0.2.layers.0.1.fn.net.4", "p", 0.5, r"several dropout rates, \[0.1, 0.5\]"),
        ("layers.0.2.layers.0.0.fn.to_q.net.0", "stride", (2, 2), "stride must be 1, got 2"),
        ("layers.0.2.layers.0.0.fn.to_kv.net.0", "dilation", (2, 2), "dilation must be 1, got 2"),
        ("layers.0.2.layers.0.0.fn.to_kv.net.0", "padding", (2, 2), "padding must be 1, got 2"),
        ("layers.0.2.layers.0.0.fn.to_q.net.0", "padding_mode", "reflect", "must be 'zeros'"),
        ("layers.0.0", "padding_mode", "circular", "must be 'zeros', got 'circular'"),
        ("layers.0.2.layers.0.0.fn", "scale", 1.0, "fn.scale must be 0.5, got 1.0"),
        ("layers.5", "track_running_stats", False, "stats must be True, got False"),
        ("layers.6", "forward", torch.relu, r"must be ELU\(alpha=1.0\) with torch's own forward"),
    ],
)
def test_live_settings_without_a_counterpart_are_refused(
    path: str, attribute: str, value: object, message: str
) -> None:
    author: Any = to_escnn(CvT(image_size=33, stages=SMALL_STAGES))
    setattr(author.get_submodule(path), attribute, value)
    with pytest.raises(ValueError, match=message):
        from_escnn(author)


def test_live_model_without_a_module_is_refused() -> None:
    author: Any = to_escnn(CvT(image_size=33, stages=SMALL_STAGES))
    attention: Any = author.get_submodule("layers.0.2.layers.0.0.fn")
    attention.to_out = attention.to_out[:1]
    with pytest.raises(ValueError, match=r"has no module 'layers.0.2.layers.0.0.fn.to_out.1'"):
        from_escnn(author)


def test_other_modules_of_the_same_function_are_taken() -> None:
    model = CvT(image_size=33, stages=SMALL_STAGES, dropout=0.0)
    author: Any = to_escnn(model)
    # As other authors write it: a softmax module, lists for blocks, one activation for all.
    block = author.layers[1][2].layers[0]
    block[0].fn.attend = nn.Softmax(dim=-1)
    block[0].fn.dropout = nn.Dropout(0.0)
    block[0].fn.to_out[1] = nn.Identity()
    author.layers[1][2].layers[1][1].fn.net[1] = block[1].fn.net[1]
    author.layers[1][2].layers[0] = nn.ModuleList(block)
    author.layers[2] = nn.AdaptiveAvgPool2d((1, 1))
    author.layers[3] = type("Rearrange", (nn.Flatten,), {"__module__": "einops.layers.torch"})()
    author.layers[6] = nn.ELU(inplace=True)
    author.criterion = nn.CrossEntropyLoss()
    back = from_escnn(author)
    assert back.config == model.config
    assert same_weights(back, model) == 0


def test_wrapped_live_models_are_unwrapped() -> None:
    author = to_escnn(CvT(1, image_size=33))
    plain = from_escnn(author)
    for wrapped in (nn.DataParallel(author), torch.compile(author)):
        assert same_weights(from_escnn(wrapped), plain) == 0
