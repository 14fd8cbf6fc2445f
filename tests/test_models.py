"""The models: numbers, symmetry, state, and what they refuse."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import eqcvt
from eqcvt import CvT, EqCvT, create_model
from eqcvt.groups import Group
from eqcvt.nn import Filters, Stage, TokenEmbed, set_sync_batch_norm

SMALL = Stage(dim=8, depth=1, heads=2, head_dim=4, mlp_ratio=2)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (EqCvT, 65_170),
        (lambda: EqCvT(in_channels=1), 64_810),
        (lambda: EqCvT(in_channels=1, num_classes=3), 64_875),
        (CvT, 463_106),
        (lambda: create_model("cvt_13"), 19_997_096),
    ],
)
def test_parameter_counts_are_the_published_ones(model: object, count: int) -> None:
    assert _count(model()) == count


def test_default_grids_are_the_published_ones() -> None:
    model = EqCvT(in_channels=1)
    assert model.token_grids == [((61, 61), (31, 31))]
    assert model.front(torch.zeros(1, 1, 129, 129)).shape == (1, 10, 121, 121)


def _turns(model: EqCvT, x: Tensor) -> list[Tensor]:
    group = model.group
    images = [group.act_on_image(x, g) for g in range(group.order) if group.is_exact(g)]
    return [model(image) for image in images]


def _trained_looking(model: torch.nn.Module) -> torch.nn.Module:
    """Give norms and biases values that are not those of a fresh model."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(torch.rand_like(value) + (0.5 if "var" in name or "weight" in name else 0))
    return model


@pytest.mark.parametrize("group", ["C4", "D4", "C8", "D8"])
@pytest.mark.parametrize("training", [False, True])
def test_exact_model_is_invariant_to_rounding(group: str, training: bool) -> None:
    model = EqCvT(1, image_size=33, group=group, invariance="exact", dropout=0.0).double()
    _trained_looking(model).train(training)
    x = torch.rand(2, 1, 33, 33, dtype=torch.float64)
    logits = _turns(model, x)
    for turned in logits[1:]:
        assert (turned - logits[0]).abs().max() < 1e-12

    model = model.float().eval()
    logits = _turns(model, x.float())
    scale = logits[0].abs().max()
    for turned in logits[1:]:
        assert (turned - logits[0]).abs().max() < 16 * torch.finfo(torch.float32).eps * scale


def test_exact_model_with_more_layers_and_stages_is_invariant_too() -> None:
    model = EqCvT(
        2,
        3,
        65,
        "D4",
        fields=3,
        invariance="exact",
        kernel_size=5,
        lift_depth=2,
        stages=[SMALL, Stage(dim=12, heads=1, head_dim=8, separate_kv=True, projection_bias=True)],
        head_hidden=None,
    )
    model = _trained_looking(model.double()).eval()
    logits = _turns(model, torch.rand(1, 2, 65, 65, dtype=torch.float64))
    assert len(logits) == 8
    for turned in logits[1:]:
        assert (turned - logits[0]).abs().max() < 1e-12


@pytest.mark.parametrize("group", ["C4", "D4"])
def test_front_turns_with_the_image_while_the_logits_do_not_stay(group: str) -> None:
    model = EqCvT(1, image_size=33, group=group).double().eval()
    x = torch.rand(2, 1, 33, 33, dtype=torch.float64)
    maps = model.front(x)
    for g in range(model.group.order):
        turned = model.front(model.group.act_on_image(x, g))
        torch.testing.assert_close(turned, model.group.act_on_image(maps, g), atol=1e-12, rtol=0)
    logits = _turns(model, x)
    assert max((t - logits[0]).abs().max().item() for t in logits[1:]) > 1e-6


@pytest.mark.parametrize("size", [33, 37, 41, 65])
def test_sizes_the_message_recommends_are_exact(size: int) -> None:
    model = EqCvT(1, image_size=size, invariance="exact").double().eval()
    logits = _turns(model, torch.rand(1, 1, size, size, dtype=torch.float64))
    assert max((t - logits[0]).abs().max().item() for t in logits) < 1e-12


def test_front_with_strides_warns_only_where_the_front_is_affected() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EqCvT(image_size=130)  # only the tokens are affected
        EqCvT(image_size=65, lift_stride=2)
    with pytest.warns(
        UserWarning, match="image_size=64.*nearest sizes that keep it are 61, 63, 65"
    ):
        EqCvT(image_size=64, lift_stride=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"in_channels": 1.0}, TypeError, "in_channels must be an integer, got float 1.0"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"image_size": "129"}, TypeError, "image_size must be an integer, got str '129'"),
        ({"image_size": 8}, ValueError, "image_size=8 is too small.*the smallest is 9"),
        ({"group": "C5x"}, ValueError, "group must be one of .*got 'C5x'"),
        ({"group": "SO2"}, ValueError, "got 'SO2'"),
        ({"fields": 0}, ValueError, "fields must be at least 1, got 0"),
        (
            {"invariance": "exakt"},
            ValueError,
            "'front', 'exact', got 'exakt'; did you mean 'exact'",
        ),
        ({"kernel_size": 12}, ValueError, "kernel_size must be 3 to 11, got 12; the nearest is 11"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got str '0.1'"),
        ({"blur_sigma": 0.0}, ValueError, "blur_sigma must be positive or None, got 0.0"),
        ({"mask_sigma": 0.0}, ValueError, "mask_sigma must be positive.*got 0.0 and 1.0"),
        ({"stages": []}, ValueError, r"stages must be a sequence of at least one Stage, got \[\]"),
        ({"stages": [{"dims": 8}]}, ValueError, "got 'dims'; did you mean 'dim'"),
        ({"stages": [{"heads": 8}]}, ValueError, "a stage needs the field 'dim'"),
        ({"stages": [8]}, TypeError, "a stage is a Stage or a dict, got int 8"),
        ({"stages": [{"dim": 8, "kernel_size": 4}]}, ValueError, "odd.*got 4; the nearest are 3"),
        ({"head_hidden": 0}, ValueError, "head_hidden must be at least 1, got 0"),
        (
            {"image_size": 130, "invariance": "exact"},
            ValueError,
            "130 a strided layer of the network breaks the symmetry of C4.*125, 129, 133",
        ),
        ({"image_size": 33, "group": "C3", "invariance": "exact"}, ValueError, "C3 shares none"),
        ({"group": Group(32)}, ValueError, "group 'C32' has 32 elements, at most 16"),
        ({"mask": "no"}, TypeError, "mask must be True or False, got str 'no'"),
        ({"mask_margin": None}, TypeError, "mask_margin must be a number, got NoneType None"),
        ({"blur_sigma": "a"}, TypeError, "blur_sigma must be a number, got str 'a'"),
        ({"blur_sigma": float("inf")}, ValueError, "blur_sigma must be finite, got inf"),
        ({"stages": [{"dim": 8, "mlp_ratio": "4"}]}, TypeError, "stage mlp_ratio must be a number"),
        (
            {"stages": [{"dim": 8, "separate_kv": 1}]},
            TypeError,
            "separate_kv must be True or False",
        ),
        ({"lift_depth": 40}, ValueError, "image_size=129 is too small for the steerable front"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EqCvT(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, 33, 33), ValueError, r"takes images \[B, 1, 33, 33\], got \[2, 3, 33"),
        (torch.zeros(2, 1, 33, 34), ValueError, r"got \[2, 1, 33, 34\]"),
        (torch.zeros(1, 33, 33), ValueError, r"got \[1, 33, 33\]"),
        (
            torch.zeros(2, 1, 33, 33, dtype=torch.uint8),
            TypeError,
            "floating point, got torch.uint8",
        ),
        (np.zeros((2, 1, 33, 33)), TypeError, r"torch.Tensor, got numpy.ndarray; torch.as_tensor"),
        (
            torch.zeros(2, 1, 33, 33, dtype=torch.float64),
            TypeError,
            r"is of torch.float32, got images of torch.float64: give it images.to\(torch.float32\)",
        ),
    ],
)
def test_bad_images_are_named(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EqCvT(1, image_size=33)(x)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("model", [EqCvT, CvT])
@pytest.mark.parametrize("weights", DTYPES)
def test_images_are_of_the_dtype_of_the_model_or_cast_by_autocast(
    model: type, weights: torch.dtype
) -> None:
    instance = model(in_channels=1, image_size=33).to(weights).eval()
    for dtype in DTYPES:
        x = torch.rand(2, 1, 33, 33).to(dtype)
        for amp in (None, torch.bfloat16):
            with torch.no_grad(), torch.autocast("cpu", amp, enabled=amp is not None):
                if dtype == weights or (amp and torch.float64 not in (dtype, weights)):
                    if not amp or weights != torch.float16:  # which torch does not mix with amp's
                        assert instance(x).isfinite().all()
                else:
                    with pytest.raises(TypeError, match=f"got images of {dtype}"):
                        instance(x)


def test_recommended_sizes_can_be_built() -> None:
    kwargs = {
        "fields": 1,
        "invariance": "exact",
        "lift_depth": 3,
        "stages": [
            Stage(8, embed_kernel=7, embed_stride=4, embed_padding=0),
            Stage(8, embed_kernel=5, embed_padding=0),
        ],
    }
    with pytest.raises(ValueError, match="nearest sizes that keep it are") as error:
        EqCvT(1, image_size=40, **kwargs)
    for size in str(error.value).rpartition("are ")[2].split(", "):
        EqCvT(1, image_size=int(size), **kwargs)


def test_strided_deep_front_is_exact_at_its_sizes() -> None:
    model = EqCvT(1, image_size=69, lift_stride=2, lift_depth=2, invariance="exact", fields=2)
    logits = _turns(model.double().eval(), torch.rand(1, 1, 69, 69, dtype=torch.float64))
    assert max((t - logits[0]).abs().max().item() for t in logits) < 1e-12


def test_numpy_s_numbers_are_numbers(tmp_path: Path) -> None:
    stages = [Stage(np.int64(16), head_dim=np.int32(32), mlp_ratio=np.float32(2))]
    numbers = {"image_size": np.int64(33), "num_classes": np.uint8(3), "dropout": np.float32(0.5)}
    model = EqCvT(np.int64(1), stages=stages, mask_sigma=np.float64(2), **numbers)
    model.save_pretrained(tmp_path)
    again = EqCvT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.num_classes == 3


def test_fresh_filters_start_as_those_of_torch_s_convolution() -> None:
    torch.manual_seed(0)
    for symmetry in (None, Group(4)):
        filters = Filters(64, 10, 3, symmetry)()
        expected = torch.nn.Conv2d(10, 64, 3).weight
        assert filters.std().item() == pytest.approx(expected.std().item(), rel=0.05)
        assert filters.abs().max() <= 90**-0.5
    assert TokenEmbed(10, Stage(32)).bias.abs().max() <= 90**-0.5


def test_a_copy_of_a_synchronised_model_has_statistics_of_its_own() -> None:
    model = EqCvT(1, image_size=33)
    set_sync_batch_norm(model, object())  # type: ignore[arg-type]
    other = copy.deepcopy(model)
    other(torch.rand(2, 1, 33, 33))
    assert other.lift[0].norm.process_group is None


def test_meta_device_gives_shapes() -> None:
    with torch.device("meta"):
        assert EqCvT(image_size=33)(torch.rand(2, 3, 33, 33)).shape == (2, 2)


@pytest.mark.parametrize("fill", ["load", "assign"])
def test_models_of_the_meta_device_get_their_constants(fill: str) -> None:
    settings = {"image_size": 33, "invariance": "exact", "lift_depth": 2}
    model, x = _trained_looking(EqCvT(1, **settings)).eval(), torch.rand(2, 1, 33, 33)
    with torch.device("meta"):
        other = EqCvT(1, **settings).eval()
    assert all(buffer.is_meta for buffer in other.buffers())
    if fill == "load":
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=fill == "assign")
    assert torch.equal(other(x), model(x))


def test_constants_are_exact_in_every_precision() -> None:
    def constants(model: EqCvT) -> list[Tensor]:
        return [b for n, b in model.named_buffers() if n.endswith(("basis", "mask", "blur"))]

    model = EqCvT(image_size=33)
    fresh = constants(copy.deepcopy(model))
    assert [len(fresh), fresh[0].dtype] == [3, torch.float32]
    for one, other in zip(constants(model.bfloat16().float()), fresh, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(constants(model.double()), fresh, strict=True):
        assert 0 < (one - other).abs().max() < 1e-7
    model.lift[0].mask = None  # taken off, it stays off
    assert model.float().lift[0].mask is None


def test_cvt_refuses_images_that_leave_no_tokens() -> None:
    stages = [Stage(dim=8, embed_kernel=7, embed_stride=4, embed_padding=0)]
    with pytest.raises(ValueError, match="image_size=5 leaves no tokens for stage 1"):
        CvT(image_size=5, stages=stages)


@pytest.mark.parametrize("name", eqcvt.list_models())
def test_registered_models_run(name: str) -> None:
    size = 64 if name == "cvt_13" else 33
    model = create_model(name, in_channels=1, image_size=size, num_classes=3).eval()
    x = torch.rand(2, 1, size, size)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    assert torch.equal(model.forward_head(features), model(x))
    assert model(x).shape == (2, 3)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head.width)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="got 'eqcvt-c4'; did you mean 'eqcvt_c4'"):
        create_model("eqcvt-c4")


def test_an_unknown_argument_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"argument of eqcvt_c4 must be .*; did you mean 'group'"):
        create_model("eqcvt_c4", grop="D4")


def test_reset_classifier_and_weight_decay_names() -> None:
    model = EqCvT(1, image_size=33)
    model.reset_classifier(5)
    assert model(torch.rand(2, 1, 33, 33)).shape == (2, 5)
    assert model.config["num_classes"] == model.num_classes == 5
    assert model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert model(torch.rand(2, 1, 33, 33)).shape == (2, 64)
    names = model.no_weight_decay()
    assert {"lift.0.norm.weight", "head.norm.bias", "stages.0.embed.bias"} <= names
    assert {"stages.0.embed.norm.weight", "stages.0.blocks.0.mlp.norm.weight"} <= names
    assert names <= {n for n, _ in model.named_parameters()}
    assert "lift.0.weight" not in names


def test_attention_maps_are_distributions_over_the_key_grid() -> None:
    model = CvT(image_size=33).eval()
    maps = model.attention_maps(torch.rand(2, 1, 33, 33))
    assert len(maps) == 3
    grids = [model.token_grids[0]] * 2 + [model.token_grids[1]]
    for weights, (queries, keys) in zip(maps, grids, strict=True):
        assert weights.shape[2:] == (queries[0] * queries[1], keys[0] * keys[1])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


def test_attention_maps_leave_a_training_model_as_it_is() -> None:
    model = EqCvT(1, image_size=33)
    before = copy.deepcopy(model.state_dict())
    model.attention_maps(torch.rand(2, 1, 33, 33))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_state_dict_keys_are_the_same_in_training_and_evaluation() -> None:
    model = EqCvT(1, image_size=33, invariance="exact")
    keys = list(model.train().state_dict())
    model(torch.rand(2, 1, 33, 33))
    assert list(model.eval().state_dict()) == keys
    assert not any(k.endswith(("basis", "mask", "blur", "orbits")) for k in keys)


def test_copies_and_pickles_are_whole() -> None:
    model = EqCvT(1, image_size=33, invariance="exact").eval()
    x = torch.rand(1, 1, 33, 33)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_stay_near(dtype: torch.dtype) -> None:
    model = _trained_looking(EqCvT(1, image_size=33)).eval()
    x = torch.rand(2, 1, 33, 33)
    exact = copy.deepcopy(model).double()(x.double())
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    allowed = max(8 * torch.finfo(dtype).eps, 1e-6) * exact.abs().max()
    assert (y.double() - exact).abs().max() < allowed < 0.1 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_train(dtype: torch.dtype) -> None:
    model = EqCvT(1, image_size=33).to(dtype)
    model(torch.rand(4, 1, 33, 33, dtype=dtype)).float().square().sum().backward()
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in model.parameters())


def test_autocast_keeps_statistics_in_float32() -> None:
    model = EqCvT(1, image_size=33)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(4, 1, 33, 33)).float().sum().backward()
    for name, buffer in model.named_buffers():
        if "running" in name:
            assert buffer.dtype == torch.float32
            assert torch.isfinite(buffer).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("model", [EqCvT, CvT])
def test_models_compile_without_graph_breaks_and_export(model: type) -> None:
    instance = model(in_channels=1, image_size=33).eval()
    x = torch.rand(2, 1, 33, 33)
    compiled = torch.compile(instance, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x), instance(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x.bfloat16()), instance(x.bfloat16()))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(instance, (x,), dynamic_shapes=({0: batch},))
    other = torch.rand(5, 1, 33, 33)
    torch.testing.assert_close(program.module()(other), instance(other))


def test_the_repr_of_a_model_says_what_it_is() -> None:
    text = repr(EqCvT(1, image_size=33, invariance="exact"))
    for part in (
        "in_channels=1, num_classes=2, image_size=33, group='C4', invariance='exact'",
        "C4, trivial 1 -> regular 10, kernel_size=7",
        "Filters(10 -> 32, kernel_size=3, symmetry=C4)",
        "heads=3, kv_stride=2, dropout=0.1",
        "stride=2, padding=1",
        "LayerNorm(32, eps=1e-05)",
    ):
        assert part in text
