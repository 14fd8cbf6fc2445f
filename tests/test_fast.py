"""The fast models as swaps for the reference: results, state, wrappers, files, training."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import eqcvt
from eqcvt import accelerate, convert, decelerate, fast, use_backend
from eqcvt.nn import Stage
from eqcvt.ops import _backend
from eqcvt.train import setup as training_setup
from eqcvt.train import train
from tests.published import SMALL, randomised
from tests.tolerance import assert_as_good
from tests.train.rings import TINY, config, without_times

pytestmark = pytest.mark.needs("native")

ARGUMENTS: dict[str, dict[str, Any]] = {
    "EqCvT": {
        "in_channels": 2,
        "image_size": 33,
        "fields": 3,
        "dropout": 0.0,
        "stages": [Stage(32, 1, 3, mlp_ratio=2)],
    },
    "CvT": {
        "in_channels": 2,
        "image_size": 33,
        "dropout": 0.0,
        "stages": [
            Stage(16, 1, 2, 16, embed_kernel=7, embed_stride=4),
            Stage(24, 1, 3, 16, separate_kv=True, projection_bias=True),
        ],
    },
}
NAMES = list(ARGUMENTS)
TOKEN_OPS = {"conv_attention", "mlp_block", "token_embed"}
# The smallest that the kernels take.
KERNEL_SIZED = {**TINY, "stages": [{"dim": 16, "head_dim": 16}], "dropout": 0.0}


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Refuse, rather than fall back to the reference, what the kernels cannot serve."""
    with use_backend("native"):
        yield


def pair(name: str) -> tuple[Any, Any]:
    """Return a reference model with lived-in weights and statistics, and the fast one like it."""
    plain = randomised(getattr(eqcvt, name)(**ARGUMENTS[name]))
    quick = getattr(fast, name)(**ARGUMENTS[name])
    quick.load_state_dict(plain.state_dict())
    return plain, quick


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 2, 33, 33)


@contextmanager
def kernels() -> Iterator[set[str]]:
    """Collect the ops whose kernels run inside."""
    ran: set[str] = set()
    with mock.patch.object(_backend, "module", wraps=_backend.module) as module:
        yield ran
    ran.update(call.args[0] for call in module.call_args_list)


def runs_kernels(model: nn.Module, x: Tensor) -> bool:
    """Whether a call of the model runs the kernels of every op, or of none."""
    with kernels() as ran, torch.no_grad():
        model(x)
    assert ran - {"lift"} in (set(), TOKEN_OPS)
    return bool(ran)


Results = dict[str, Tensor]


def steps(net: nn.Module, batches: list[Tensor]) -> Results:
    """Return the logits and gradients of each batch, and the buffers after all."""
    found: dict[str, list[Tensor]] = {}
    model = getattr(net, "_orig_mod", net)
    for batch in batches:
        x = batch.clone().requires_grad_()
        model.zero_grad()
        logits = net(x)
        weights = torch.sin(torch.arange(logits.numel(), dtype=torch.float64)).view(logits.shape)
        (logits * weights.to(logits)).sum().backward()
        gradients = {"d images": x.grad} | {f"d {n}": p.grad for n, p in model.named_parameters()}
        for name, tensor in {"logits": logits, **gradients}.items():
            assert tensor is not None, f"{name} is missing"
            found.setdefault(name, []).append(tensor.detach().clone())
    buffers = {n: [b] for n, b in model.named_buffers() if b.is_floating_point()}
    return {name: torch.stack(tensors) for name, tensors in {**found, **buffers}.items()}


def assert_all_as_good(actual: Results, exact: Results, reference: Results) -> None:
    """Check logits, buffers and the whole gradient by the tolerance rule.

    One gradient, not one for each parameter: two roundings of a near tie (the group's maximum, a
    ReLU) give a single parameter's gradient errors of very different size.
    """
    assert actual.keys() == exact.keys() == reference.keys()
    for name in actual:
        if not name.startswith("d "):
            assert_as_good(actual[name], exact[name], reference[name])
    whole = (
        torch.cat([results[name].flatten() for name in actual if name.startswith("d ")])
        for results in (actual, exact, reference)
    )
    assert_as_good(*whole, backward=True)


@pytest.mark.parametrize("name", NAMES)
def test_constructor_and_state_are_the_reference_s(name: str) -> None:
    quick, plain = getattr(fast, name), getattr(eqcvt, name)
    assert inspect.signature(quick) == inspect.signature(plain)
    models = [model(**ARGUMENTS[name]) for model in (quick, plain)]
    shapes = [[(key, t.shape, t.dtype) for key, t in m.state_dict().items()] for m in models]
    assert shapes[0] == shapes[1]
    assert models[0].config == models[1].config


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_as_good_as_the_reference_s(name: str, training: bool, amp: bool) -> None:
    plain, quick = (model.train(training) for model in pair(name))
    batches = [images() for _ in range(4)]
    exact = steps(copy.deepcopy(plain).double(), [x.double() for x in batches])
    assert runs_kernels(copy.deepcopy(quick), batches[0])
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        actual, reference = (steps(model, batches) for model in (quick, plain))
    assert actual["logits"].dtype == (torch.bfloat16 if amp else torch.float32)
    assert_all_as_good(actual, exact, reference)


@pytest.mark.parametrize("name", NAMES)
def test_float64_and_bfloat16_models_run_kernels(name: str) -> None:
    plain, quick = pair(name)
    batches = [images() for _ in range(4)]
    exact = steps(copy.deepcopy(plain).double(), [x.double() for x in batches])
    double = steps(copy.deepcopy(quick).double(), [x.double() for x in batches])
    for key, value in exact.items():
        torch.testing.assert_close(double[key], value, rtol=1e-9, atol=1e-12)
    brief = [x.bfloat16() for x in batches]
    assert runs_kernels(copy.deepcopy(quick).bfloat16(), brief[0])
    actual, reference = (steps(model.bfloat16(), brief) for model in (quick, plain))
    assert_all_as_good(actual, exact, reference)


@pytest.mark.parametrize("name", NAMES)
def test_a_half_model_runs_the_reference_or_is_refused(name: str) -> None:
    plain, quick = (model.half() for model in pair(name))
    batches = [images().half()]
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot serve \w+ on cpu: .*float16"):
        quick(batches[0])
    expected = steps(plain, batches)
    with use_backend("auto"):
        actual = steps(quick, batches)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_changes_rounding_only(name: str) -> None:
    _, quick = pair(name)
    x = images()
    expected = steps(copy.deepcopy(quick), [x])
    last = quick.to(memory_format=torch.channels_last)
    actual = steps(last, [x.to(memory_format=torch.channels_last)])
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_configurations_are_fast_and_whole(name: str, tmp_path: Path) -> None:
    _, quick = pair(name)
    quick.eval()
    x = images()
    config = pickle.loads(pickle.dumps(quick.config))
    assert config.pop("architecture") == name
    built = type(quick)(**config).eval()
    file = io.BytesIO()
    torch.save(quick.state_dict(), file)
    file.seek(0)
    built.load_state_dict(torch.load(file, weights_only=True))
    quick.save_pretrained(tmp_path)
    loaded = type(quick).from_pretrained(tmp_path)
    for other in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick)), built, loaded):
        assert type(other) is type(quick)
        assert torch.equal(other(x), quick(x))
        assert runs_kernels(other, x)
    plain = eqcvt.load_model(tmp_path)
    assert not isinstance(plain, type(quick))
    torch.testing.assert_close(plain(x), quick(x))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph_of_kernels_with_gradients(name: str) -> None:
    _, quick = pair(name)
    compiled = torch.compile(
        copy.deepcopy(quick), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for count in (2, 3):
        x = images(count)
        with kernels() as ran:
            actual = steps(compiled, [x])
        assert ran >= TOKEN_OPS
        expected = steps(quick, [x])
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_export_takes_the_reference(name: str, strict: bool) -> None:
    plain, quick = (model.eval() for model in pair(name))
    x = images()
    program = torch.export.export(quick, (x,), strict=strict)
    assert "eqcvt." not in str(program.graph)
    assert torch.equal(program.module()(x), plain(x))
    assert runs_kernels(quick, x)


@pytest.mark.parametrize("order", itertools.permutations(["reference", "native"]), ids="-".join)
def test_a_run_started_with_one_goes_on_with_the_other(
    order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = training_setup.create_model
    # In float64, rounding does not grow into a difference through Adam's division.
    monkeypatch.setattr(training_setup, "create_model", lambda *a, **k: create(*a, **k).double())
    settings = {"schedule": "constant", "model_kwargs": KERNEL_SIZED}
    first, whole, both = (
        config(tmp_path, epochs=epochs, out=tmp_path / out, ema=0.5, **settings)
        for epochs, out in ((2, "mixed"), (4, "whole"), (4, "mixed"))
    )
    with use_backend(order[0]):
        train(first, quiet=True)
    with use_backend(order[1]):
        mixed = without_times(train(both, resume=True, quiet=True).history)
    with use_backend("reference"):
        expected = without_times(train(whole, quiet=True).history)
    for row, same in zip(mixed, expected, strict=True):
        assert row == pytest.approx(same, rel=1e-9)


class Classifier(nn.Module):
    """Holds models where a LightningModule would: by name, in a list, twice."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.net = self.again = models[0]
        self.others = nn.ModuleList(models[1:])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


@pytest.fixture
def lone_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "module": Classifier,
    "list": lambda model: nn.Sequential(nn.Identity(), model),
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": AveragedModel,
}


@pytest.mark.usefixtures("lone_process")
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", NAMES)
def test_accelerate_changes_a_model_in_place_and_back(name: str, wrap: str) -> None:
    plain, _ = pair(name)
    plain.eval().requires_grad_(wrap == "DDP")
    whole = WRAPPERS[wrap](plain)
    model = whole.module if wrap == "averaged" else plain
    before = list(model.parameters())
    x = images()
    expected = whole(x)
    assert not runs_kernels(whole, x)
    for change, module, fast_now in ((accelerate, fast, True), (decelerate, eqcvt, False)):
        assert change(whole) is whole
        assert type(model) is getattr(module, name)
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
        assert not model.training
        assert runs_kernels(whole, x) == fast_now
        torch.testing.assert_close(whole(x), expected)
    assert torch.equal(whole(x), expected)


def test_an_optimiser_goes_on_with_the_accelerated_model() -> None:
    models = [eqcvt.EqCvT(**ARGUMENTS["EqCvT"]).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimisers = [torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9) for model in models]
    for change in (lambda model: model, accelerate, decelerate, accelerate):
        change(models[1])
        x = images().double()
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_derived_class_stays_what_it_is() -> None:
    class Mine(eqcvt.EqCvT):
        pass

    model = Mine(**ARGUMENTS["EqCvT"]).eval()
    assert type(accelerate(model)) is Mine
    assert runs_kernels(model, images())
    assert not runs_kernels(decelerate(model), images())


def test_use_backend_holds_for_an_accelerated_model() -> None:
    model = accelerate(eqcvt.EqCvT(**ARGUMENTS["EqCvT"]).eval())
    with use_backend("reference"):
        assert not runs_kernels(model, images())


def published(name: str) -> nn.Module:
    """A model of the published layout, an EqCvT's front of escnn's modules, in training mode."""
    if name == "CvT":
        return convert.to_escnn(randomised(eqcvt.CvT(2, image_size=33, dropout=0.0)))
    return convert.to_escnn(randomised(eqcvt.EqCvT(2, dropout=0.0, **SMALL)))


PUBLISHED = [pytest.param("EqCvT", marks=pytest.mark.needs("escnn")), "CvT"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_converted_with_its_weights(name: str, dtype: torch.dtype) -> None:
    old = published(name).to(dtype)
    expected = convert.from_escnn(old)
    new = accelerate(old)
    assert type(new) is getattr(fast, name)
    assert new.training
    assert {p.dtype for p in new.parameters()} == {dtype}
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(new.state_dict()[key], value.to(new.state_dict()[key].dtype))
    if dtype == torch.float32:
        x = images()
        with use_backend("auto"):
            torch.testing.assert_close(new.eval()(x), old.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_replaced_where_it_is_held(name: str) -> None:
    plain, _ = pair("EqCvT")
    whole = Classifier(published(name), plain, published("CvT"))
    assert accelerate(whole) is whole
    assert type(whole.net) is getattr(fast, name)
    assert whole.again is whole.net
    assert [type(model) for model in whole.others] == [fast.EqCvT, fast.CvT]
    assert whole.others[0] is plain


@pytest.mark.usefixtures("lone_process")
@pytest.mark.parametrize("wrap", ["DDP", "compiled"])
def test_a_published_model_in_a_wrapper_is_refused_and_nothing_changed(wrap: str) -> None:
    plain, _ = pair("EqCvT")
    refusal = r"AuthorModel would get new parameters, which the .* it"
    for inner in (Classifier(published("CvT")), published("CvT")):
        wrapped = WRAPPERS[wrap](inner)
        for whole in (Classifier(plain, wrapped), wrapped):
            with pytest.raises(ValueError, match=refusal):
                accelerate(whole)
    assert type(plain) is eqcvt.EqCvT


def test_a_frozen_published_model_stays_frozen() -> None:
    old = published("CvT").requires_grad_(False)
    assert not any(p.requires_grad for p in accelerate(old).parameters())
    next(old.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="AuthorModel is frozen in part"):
        accelerate(old)


def test_a_frozen_statistic_of_a_published_model_stays_frozen() -> None:
    old: Any = published("CvT")
    old.layers[5].eval()
    new = accelerate(old)
    before = new.head.norm.running_mean.clone()
    with use_backend("auto"):
        new(images())
    assert torch.equal(new.head.norm.running_mean, before)
    assert new.stages[0].blocks[0].attention.q_conv.norm.num_batches_tracked == 8


def test_a_published_model_without_a_counterpart_is_refused_and_nothing_changed() -> None:
    plain, _ = pair("EqCvT")
    author: Any = published("CvT")
    author.layers = author.layers[:-1]
    with pytest.raises(ValueError, match=r"missing 'layers\.7\.bias'"):
        accelerate(Classifier(published("CvT"), plain, author))
    assert type(plain) is eqcvt.EqCvT


@pytest.mark.parametrize("change", [accelerate, decelerate])
def test_what_holds_no_model_is_refused(change: Callable[[Any], nn.Module]) -> None:
    name = change.__name__
    with pytest.raises(TypeError, match=f"Linear holds nothing to {name}: {name} takes an EqCvT"):
        change(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=f"{name} takes a torch module, got dict"):
        change({})


def test_a_model_of_which_a_backend_refuses_a_part_compiles_with_dynamic_shapes() -> None:
    model = fast.CvT(in_channels=1, image_size=33).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with use_backend("auto"):
        for batch in (2, 3):
            x = torch.rand(batch, 1, 33, 33)
            torch.testing.assert_close(compiled(x), model(x))
