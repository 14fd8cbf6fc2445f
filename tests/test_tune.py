"""The table of launches, the search for faster ones, and the proof that the choice goes by."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import tests.kernels.conftest  # noqa: F401  kernels run in the interpreter here as well
from eqcvt import ops, tune
from eqcvt.kernels import launches
from eqcvt.ops import _backend, _proof, _prove
from eqcvt.tune import cases, check, search
from eqcvt.tune.record import Record
from tests.cli.conftest import invoke

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
H100 = _proof.Device("NVIDIA H100 80GB HBM3", "9.0")
KEY = "sm90 mlp_block_fwd 16 D32"
triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Start with the shipped table, no proof, and an empty cache folder."""
    monkeypatch.delenv(_proof.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_prove, "_tried", {})
    caches = (_proof.found, _prove.why_not, _proof.sources)
    for cached in caches:
        cached.cache_clear()
    yield
    launches.install({})
    for cached in caches:
        cached.cache_clear()


def test_every_kernel_has_a_launch_for_every_dtype_shape_and_device() -> None:
    defined = {
        node.name.removeprefix("_").removesuffix("_kernel")
        for file in KERNELS.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert defined == set(launches.KERNELS) - {"lift_plan"}
    for name, kernel in launches.KERNELS.items():
        for bits in kernel.bits:
            for shape in kernel.shapes:
                for capability in (80, 86, 89, 90, 100, 120, launches.INTERPRETER):
                    launch = launches.nearest(name, bits, shape, capability)
                    assert launch.keys() == kernel.fields.keys()


def test_a_device_takes_the_highest_class_up_to_its_own() -> None:
    def warps(capability: int) -> int:
        return launches.nearest("mlp_block_fwd", 16, "D32", capability)["num_warps"]

    shipped = launches.table()["sm80 mlp_block_fwd 16 D32"]
    assert KEY not in launches.table()
    with launches.installed({KEY: shipped | {"num_warps": 8}, f"sm120{KEY[4:]}": shipped}):
        assert [warps(c) for c in (75, 80, 89, 90, 100, 120, 121)] == [4, 4, 4, 8, 8, 4, 4]
    assert warps(90) == 4


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("mlp_block_fwd 16 D32", {}, "as in 'sm90 lift_conv 16 K256', got 'mlp_block_fwd 16 D32'"),
        ("sm90 mlp_blok_fwd 16 D32", {}, "'mlp_blok_fwd'; did you mean 'mlp_block_fwd'"),
        ("sm90 mlp_block_fwd 8 D32", {}, "bits must be one of '16', '32', got '8'"),
        ("sm90 mlp_block_fwd 16 D48", {}, "one of 'D32', 'D64', 'D128', got 'D48'"),
        (KEY, {"BLOCK_M": 32}, "a field must be one of .*got 'BLOCK_M'; did you mean 'BLOCK_N'"),
        (KEY, {"num_warps": 3}, "num_warps must be one of 1, 2, 4, 8, got 3"),
        (KEY, {"num_warps": True}, "num_warps must be one of 1, 2, 4, 8, got True"),
        (KEY, None, "needs the fields BLOCK_N, BLOCK_E, num_warps, num_stages, got None"),
    ],
)
def test_what_is_no_launch_is_refused(key: str, change: Any, message: str) -> None:
    launch = None if change is None else launches.table()[f"sm80{KEY[4:]}"] | change
    with pytest.raises(ValueError, match=message):
        launches.install({key: launch})


class Times:
    """A kernel whose time, and whether it is right, depends on its launch."""

    def __init__(self, cost: Callable[[dict[str, int]], float]) -> None:
        self.cost, self.seen = cost, []

    def launch(self) -> dict[str, int]:
        return launches.nearest("mlp_block_fwd", 16, "D32", 90)

    def time(self) -> float:
        self.seen.append(self.launch())
        return self.cost(self.launch())

    def search(self, wrong: Callable[[], str | None], **options: Any) -> search.Found:
        options = {"refused": {}} | options
        return search.descend(KEY, self.launch(), self.time, wrong, **options)


def _cost(launch: dict[str, int]) -> float:
    return 1 + abs(launch["BLOCK_N"] - 16) + 10 * abs(launch["num_warps"] - 2)


def test_the_search_finds_the_fastest_launch() -> None:
    kernel = Times(_cost)
    found = kernel.search(lambda: None)
    assert found.launch == kernel.launch() | {"BLOCK_N": 16, "num_warps": 2}
    assert (found.before_ms, found.after_ms, found.finished) == (69, 1, True)
    assert len({str(launch) for launch in kernel.seen}) == len(kernel.seen)


def test_the_search_drops_what_is_wrong_or_does_not_run() -> None:
    def cost(launch: dict[str, int]) -> float:
        if launch["num_warps"] == 2:
            raise RuntimeError("out of resource: shared memory\nand more")
        return _cost(launch)

    kernel = Times(cost)
    refused: dict[str, str] = {}
    found = kernel.search(
        lambda: "result 0: error 1 exceeds 0" if kernel.launch()["BLOCK_N"] == 16 else None,
        refused=refused,
    )
    assert found.launch == kernel.launch() | {"BLOCK_N": 32}
    assert set(refused.values()) == {
        "RuntimeError: out of resource: shared memory",
        "result 0: error 1 exceeds 0",
    }
    kernel.seen.clear()
    assert kernel.search(lambda: None, refused=refused).launch == found.launch
    assert not [launch for launch in kernel.seen if str(launch) in refused]


def test_a_difference_within_the_noise_is_no_gain_and_time_can_be_up() -> None:
    kernel = Times(lambda launch: 1 - 0.01 * (launch["num_warps"] == 8))
    assert kernel.search(lambda: None).launch == kernel.launch()
    found = Times(_cost).search(lambda: None, expired=lambda: True)
    assert (found.launch, found.finished) == (kernel.launch(), False)


@pytest.mark.needs("native")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kernels_are_judged_by_values_gradients_and_second_runs(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.CHECKED, "mlp_block", {"small": {}})
    judge = check.Judge("mlp_block", precision, "cpu")
    verdict = judge.verdict("native")
    assert verdict.passed, verdict.reason
    assert 0 < verdict.error <= 1
    module = _backend.module("mlp_block", "native", "cpu")
    forward, backward = module.forward, module.backward
    monkeypatch.setattr(module, "forward", lambda *a, **k: forward(*a, **k) * 1.1)
    assert "training: result 0: error" in (judge.verdict("native").reason or "")
    monkeypatch.setattr(module, "forward", lambda *a, **k: forward(*a, **k) * float("nan"))
    assert not judge.verdict("native").passed
    monkeypatch.setattr(module, "forward", forward)

    def other_bias(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        *rest, last = backward(*args, **options)
        return *rest, last + torch.rand(())

    monkeypatch.setattr(module, "backward", other_bias)
    reason = judge.verdict("native").reason
    assert reason == "small, training: gradient 6 differs from run to run"
    monkeypatch.setattr(module, "backward", lambda *a, **k: [t * 2 for t in backward(*a, **k)])
    assert "gradient 0: error" in (judge.verdict("native").reason or "")


@pytest.mark.needs("native")
def test_a_check_is_made_by_a_process_of_its_own() -> None:
    verdict = check.apart("mlp_block", "float32", "native", "cpu", {})
    assert verdict.passed, verdict.reason
    with pytest.raises(check.Unchecked, match="cannot serve mlp_block on meta"):
        check.apart("mlp_block", "float16", "native", "meta", {})


def test_a_crash_is_a_verdict_and_what_comes_from_outside_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = subprocess.CompletedProcess([], -signal.SIGSEGV, "", "")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: died)
    assert (
        check.apart("lift", "tf32", "triton", "cuda", {}).reason == "its process died of signal 11"
    )
    died.returncode = -signal.SIGKILL  # as a system does that has no memory left
    with pytest.raises(check.Unchecked, match=r"lift by triton in tf32 could not .* with -9"):
        check.apart("lift", "tf32", "triton", "cuda", {})
    monkeypatch.undo()
    monkeypatch.setattr(check, "LIMIT", 0.01)
    with pytest.raises(check.Unchecked, match="had not been checked after"):
        check.apart("mlp_block", "float32", "native", "cpu", {})


@triton
@pytest.mark.usefixtures("small")
def test_no_room_on_the_device_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eqcvt.kernels import mlp_block

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(mlp_block, "forward", full)
    with pytest.raises(check.Unchecked, match="out of memory"):
        check.Judge("mlp_block", "float32", "cpu").verdict("triton")

    def unchecked(*_: Any) -> check.Verdict:
        raise check.Unchecked("mlp_block could not be checked: CUDA out of memory")

    monkeypatch.setattr(tune, "apart", unchecked)
    with pytest.raises(check.Unchecked, match="out of memory"):
        _tune(tmp_path / "tuned.json", Clock(), jobs=1)
    assert not (tmp_path / "tuned.json").exists()


def test_launches_are_tuned_for_every_precision_or_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for every precision"):
        _tune(tmp_path / "tuned.json", Clock(), precisions=["bfloat16"])
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        _tune(tmp_path / "tuned.json", Clock(), precisions=["floa16"], check_only=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune one op on small tensors in one precision."""
    options = {"shape": (1, 16, 3, 3), "hidden": 16}
    monkeypatch.setattr(cases, "CHECKED", {"mlp_block": {"small": options}})
    monkeypatch.setattr(cases, "TIMED", {"mlp_block": [(options, True)]})
    monkeypatch.setattr(tune, "_TIMED", {torch.float32: ("float32",)})
    monkeypatch.setattr(_proof, "PRECISIONS", ("float32",))
    monkeypatch.setattr(_backend, "OPS", ("mlp_block",))


class Clock:
    """Counts milliseconds by the launches in force, as a GPU might."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, run: Callable[[], object], kernels: tuple[str, ...]) -> float:
        self.calls.append(kernels)
        if kernels == ("sum_rows",):
            return 0.1
        return 8 / launches.nearest(kernels[0], 32, "D32", 90)["num_warps"]


def _tune(path: Path, clock: Clock, **options: Any) -> Record:
    options = {"ops": ["mlp_block"], "backends": ["triton"], "jobs": 0} | options
    return tune.run(path, H100, timer=clock, device="cpu", **options)


@triton
@pytest.mark.usefixtures("small")
def test_tuning_writes_launches_with_their_proof_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path, clock = tmp_path / "eqcvt" / "tuned.json", Clock()

    class Interrupt(tune.Watcher):
        def timed(self, key: str, entry: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune(path, clock, watcher=Interrupt())
    assert len(json.loads(path.read_text())["times"]) == 1
    record = _tune(path, clock)
    written = json.loads(path.read_text())
    assert written == record.content
    # Of the others no launch is faster than the shipped one.
    assert record.launches.keys() == {"sm90 mlp_block_fwd 32 D32"}
    assert record.launches["sm90 mlp_block_fwd 32 D32"]["num_warps"] == 8
    kernels = {key.split(" ")[1] for key in written["times"]}
    assert kernels == {"mlp_block_fwd", "mlp_block_bwd", "sum_rows"}
    assert all(entry["finished"] for entry in written["times"].values())
    assert record.checked("triton", "mlp_block", "float32")
    clock.calls.clear()
    assert _tune(path, clock).content["times"] == written["times"]
    assert len(clock.calls) == 3  # what each kernel costs, and no search


@triton
@pytest.mark.usefixtures("small")
def test_wrong_kernels_are_not_tuned_and_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eqcvt.kernels import mlp_block

    forward = mlp_block.forward
    monkeypatch.setattr(mlp_block, "forward", lambda *a, **k: forward(*a, **k) * 1.5)
    clock = Clock()
    record = _tune(tmp_path / "tuned.json", clock)
    assert not clock.calls
    assert record.content["checks"]["triton mlp_block float32"]["passed"] is False
    assert "result 0: error" in record.content["checks"]["triton mlp_block float32"]["reason"]


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Return a record that proves Triton's kernels of every op on the GPU of this machine.

    What has no verdict cannot be checked: there is no such GPU.
    """
    monkeypatch.setattr(_proof, "devices", lambda: [H100])
    monkeypatch.setattr(_proof, "kind", lambda index: H100)
    monkeypatch.setattr(_prove, "_visible", lambda device: "")
    for name in ("triton", "native"):
        monkeypatch.setitem(_backend._REASONS, name, lambda device: None)
    monkeypatch.setitem(_backend._modules, "triton", dict.fromkeys(_backend.OPS))
    monkeypatch.setitem(_backend._modules, "native", dict.fromkeys(_backend.OPS))
    record = Record(_proof.user_file(H100), H100)
    record.launches[KEY] = launches.table()[f"sm80{KEY[4:]}"] | {"num_warps": 8}
    for op in _backend.OPS:
        for precision in _proof.PRECISIONS:
            record.check("triton", op, precision, check.Verdict(True, 0.5, None))
    return record


def _chosen(op: str = "lift", dtype: torch.dtype = torch.float32, index: int = 0) -> str:
    return _backend.choose(op, torch.device("cuda", index), dtype, None, lambda module: None)


def _why_not(backend: str = "triton", device: _proof.Device = H100) -> str:
    return _prove.why_not(device, "lift", backend, torch.float32) or ""


def test_the_automatic_choice_goes_by_the_proof(proof: Record) -> None:
    assert proof.path.name.startswith(
        f"nvidia-h100-80gb-hbm3-torch-{torch.__version__.split('+')[0]}"
    )
    proof.save()
    assert {_chosen(dtype=d) for d in _proof.PRECISIONS_OF} == {"triton"}
    assert _chosen(dtype=torch.float64) == "reference"
    assert _proof.tuned_launches() == proof.launches
    assert _proof.report()[0]["state"] == "in use"
    rows = ops.explain(("cuda",))
    assert {row.backend for row in rows if row.chosen} == {"triton"}


def _other_device(content: dict[str, Any]) -> None:
    content["machine"]["name"] = "NVIDIA A100-SXM4-40GB"


def _other_torch(content: dict[str, Any]) -> None:
    content["machine"]["torch"] = "2.0.0"


def _other_triton(content: dict[str, Any]) -> None:
    content["machine"]["triton"] = "2.0.0"


def _other_kernels(content: dict[str, Any]) -> None:
    for entry in content["checks"].values():
        entry["kernels"] = "0123456789abcdef"


def _other_launches(content: dict[str, Any]) -> None:
    content["launches"][KEY]["num_warps"] = 2


def _failed(content: dict[str, Any]) -> None:
    content["checks"]["triton lift tf32"] |= {"passed": False, "reason": "error 1 exceeds 0"}


def _missing(content: dict[str, Any]) -> None:
    del content["checks"]["triton lift tf32"]


def _malformed(content: dict[str, Any]) -> None:
    content["launches"][KEY]["num_warps"] = 5


def _other_format(content: dict[str, Any]) -> None:
    content["format"] = 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_device, "it was made with name NVIDIA A100-SXM4-40GB, and here is NVIDIA H100"),
        (_other_torch, "it was made with torch 2.0.0, and here is"),
        (_other_triton, "it was made with triton 2.0.0, and here is"),
        (_other_kernels, "proves other kernels than these"),
        (_other_launches, "proves other kernels than these"),
        (_failed, "found it wrong in tf32: error 1 exceeds 0"),
        (_missing, "has no check of it in tf32"),
        (_malformed, "num_warps must be one of 1, 2, 4, 8, got 5"),
        (_other_format, "has format 0, this version 1"),
    ],
)
def test_a_proof_of_something_else_is_refused_with_its_reason(
    proof: Record,
    change: Callable[[dict[str, Any]], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(proof.content)
    proof.save()
    assert _chosen() == "reference"
    (row,) = [r for r in ops.explain(("cuda",)) if (r.op, r.backend) == ("lift", "triton")]
    assert row.available
    assert reason in (row.reason or "")
    assert str(proof.path) in (row.reason or "")
    assert reason in caplog.text


def test_changed_kernels_take_neither_launches_nor_proof(
    proof: Record, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proof.save()
    monkeypatch.setattr(_proof, "sources", lambda backend: "fedcba9876543210")
    assert _chosen() == "reference"
    assert _proof.tuned_launches() == {}
    assert "of other Triton kernels" in _proof.report()[0]["state"]
    assert "of other Triton kernels" in caplog.text
    begun = Record(proof.path, H100)
    assert begun.launches == {}
    assert begun.dropped is not None


def test_without_a_proof_the_way_to_one_is_said_once(
    proof: Record, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_proof.VARIABLE, "none")  # nothing is checked
    caplog.set_level(logging.WARNING)
    for op in ("lift", "mlp_block", "lift"):
        assert _chosen(op) == "reference"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("plain PyTorch", "eqcvt tune", "EQCVT_BACKEND=triton", H100.name):
        assert part in record.getMessage()
    with ops.use_backend("triton"):
        assert _chosen() == "triton"


class Checks:
    """Stands for the process that checks: notes what it is called with, and may write a proof."""

    def __init__(self, proof: Record, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proof, self.calls = proof, []  # type: tuple[Record, list[tuple[list[str], Any]]]
        self.passed, self.returncode, self.interrupted = True, 0, False
        self.seconds = 0.0
        self.stderr = ["lift by triton in tf32: right\n", "\n"]
        monkeypatch.setattr(_prove.subprocess, "Popen", self)

    def __call__(self, command: list[str], **options: Any) -> Any:
        self.calls.append((command, options["env"]))
        return self

    def wait(self) -> int:
        time.sleep(self.seconds)
        if self.interrupted:
            raise KeyboardInterrupt
        if self.returncode != 2:
            for check in self.proof.content["checks"].values():
                check.update(
                    passed=self.passed, reason=None if self.passed else "error 1 exceeds 0"
                )
            self.proof.save()
        return self.returncode

    def terminate(self) -> None:
        self.calls.clear()


@pytest.fixture
def checks(proof: Record, monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(proof, monkeypatch)


def _options(command: list[str], name: str) -> list[str]:
    return [command[i + 1] for i, part in enumerate(command) if part == name]


def test_kernels_are_checked_once_where_they_are_first_wanted(
    checks: Checks, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert {row.backend for row in ops.explain(("cuda",)) if row.chosen} == {"triton"}
    assert not checks.calls
    assert {_chosen(op) for op in _backend.OPS} == {"triton"}
    ((command, environment),) = checks.calls
    assert "--check-only" in command
    assert _options(command, "--backend") == ["triton"]
    assert _options(command, "--precision") == ["float32", "tf32"]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(Path(ops.__file__).parents[2])
    assert environment[_proof.VARIABLE] == "none"  # or it would wait for itself
    assert "FORCE_COLOR" not in environment
    assert _options(command, "--out") == [str(checks.proof.path)]
    assert _chosen(dtype=torch.bfloat16) == "triton"
    assert len(checks.calls) == 1
    for part in ("checking the triton kernels on", H100.name, "in float32 and tf32"):
        assert part in caplog.text
    assert "lift by triton in tf32: right" in caplog.text
    assert "all are right" in caplog.text


def test_what_a_check_finds_wrong_is_left_out_for_good(checks: Checks) -> None:
    checks.passed, checks.returncode = False, 1
    assert {_chosen(op) for op in _backend.OPS} == {"reference"}
    backends = [_options(command, "--backend")[0] for command, _ in checks.calls]
    assert backends[0] == "triton"
    assert set(backends[1:]) == {"native"}
    assert "error 1 exceeds 0" in _why_not()
    for cached in (_proof.found, _prove.why_not):
        cached.cache_clear()
    _prove._tried.clear()
    before = len(checks.calls)
    _why_not()
    assert len(checks.calls) == before


def test_a_check_that_cannot_be_made_is_tried_once_and_said(
    checks: Checks, caplog: pytest.LogCaptureFixture
) -> None:
    checks.returncode, checks.stderr = 2, ["first\n", "error: the GPU is busy\n"]
    assert {_chosen(op) for op in _backend.OPS} == {"reference"}
    assert len(checks.calls) == 2  # one of each backend
    assert "the check could not be made: error: the GPU is busy" in caplog.text


def test_a_check_that_was_interrupted_is_made_at_the_next_use(checks: Checks) -> None:
    checks.interrupted, checks.returncode = True, 2
    with pytest.raises(KeyboardInterrupt):
        _chosen()
    assert not checks.calls  # it was ended
    checks.interrupted, checks.returncode = False, 0
    assert _chosen() == "triton"


def test_threads_wait_for_the_check_of_the_first(checks: Checks) -> None:
    checks.seconds = 0.2
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda op: _chosen(op), _backend.OPS))
    assert found == {"triton"}
    assert len(checks.calls) == 1


def test_the_process_that_checks_is_the_command(proof: Record) -> None:
    """It runs, and fails for want of a GPU, of which it is shown none, not of its options."""
    wanted = "the check could not be made: error: eqcvt tune needs a CUDA device"
    assert wanted in _why_not()


def test_a_process_waits_for_the_one_that_checks(checks: Checks) -> None:
    checks.proof.path.parent.mkdir(parents=True)
    lock = FileLock(checks.proof.path.with_suffix(".first-use.lock"))
    chosen: list[str] = []
    waiting = threading.Thread(target=lambda: chosen.append(_chosen()))
    with lock:
        waiting.start()
        waiting.join(0.3)
        assert not chosen
        checks.proof.save()
    waiting.join(30)
    assert chosen == ["triton"]
    assert not checks.calls


def test_kernels_that_changed_are_checked_anew(checks: Checks) -> None:
    checks.proof.content["sources"] = "0123456789abcdef"
    _other_kernels(checks.proof.content)
    checks.proof.save()
    checks.proof = Record(checks.proof.path, H100)
    for op in _backend.OPS:
        for precision in _proof.PRECISIONS:
            checks.proof.check("triton", op, precision, check.Verdict(True, 0.5, None))
    assert _chosen() == "triton"
    assert len(checks.calls) == 1


def test_a_file_that_is_named_is_not_written_to(
    checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    _missing(checks.proof.content)
    checks.proof.save()
    monkeypatch.setenv(_proof.VARIABLE, str(checks.proof.path))
    assert _chosen() == "reference"
    assert not checks.calls


def test_where_nothing_can_be_written_that_is_said(
    checks: Checks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _chosen() == "reference"
    assert str(tmp_path / "file") in _why_not()
    assert not checks.calls


def test_the_process_that_checks_sees_one_gpu_of_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _proof.Device("NVIDIA L4", "8.9")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(_proof, "kind", lambda index: [other, H100, other, H100][index])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [_prove._visible(device) for device in (H100, other)] == ["3", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5,6,MIG-4")
    assert [_prove._visible(device) for device in (H100, other)] == ["MIG-4", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # too late: torch counts four
    assert [_prove._visible(device) for device in (H100, other)] == ["3", "7"]


@pytest.mark.parametrize("proven", [True, False])
def test_the_proof_is_read_while_a_compiler_traces(
    proof: Record, proven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proven:
        proof.save()
    monkeypatch.setattr(_prove, "_run", lambda *_: "")

    def call(x: Tensor) -> Tensor:
        return x + 1 if _chosen() == "triton" else x - 1

    torch._dynamo.reset()
    found = torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(2))
    assert found.tolist() == [1.0 if proven else -1.0] * 2


def test_a_call_goes_by_the_proof_of_its_gpu(
    proof: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof.save()
    kinds = [_proof.Device("NVIDIA L4", "8.9"), H100]
    monkeypatch.setattr(_proof, "devices", lambda: kinds)
    monkeypatch.setattr(_proof, "kind", kinds.__getitem__)
    monkeypatch.setattr(_prove, "_run", lambda *_: "")
    assert [_chosen(index=i) for i in (0, 1)] == ["reference", "triton"]
    assert "not been checked on NVIDIA L4" in _why_not(device=kinds[0])


def test_the_variable_names_the_file_or_none(
    proof: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proof.save()
    monkeypatch.setenv(_proof.VARIABLE, "none")
    assert _chosen() == "reference"
    elsewhere = tmp_path / "mine.json"
    monkeypatch.setenv(_proof.VARIABLE, str(elsewhere))
    _proof.found.cache_clear()
    _prove.why_not.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"mine\.json"):
        _chosen()
    elsewhere.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json is not valid JSON"):
        _chosen()
    elsewhere.write_text("[]")
    with pytest.raises(ValueError, match=r"mine\.json was not written by eqcvt tune"):
        _chosen()
    elsewhere.write_text(proof.path.read_text())
    assert _chosen() == "triton"


def test_the_command_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = invoke("tune", code=2)
    assert "eqcvt tune needs a CUDA device, and torch sees none" in result.stderr


def test_a_gpu_session_goes_on_after_a_failure_and_sums_up(tmp_path: Path) -> None:
    script = KERNELS.parent / "bench" / "gpu.sh"

    def session(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "OUT": str(tmp_path / "out"), "PYTHON": "false"}
        return subprocess.run(
            ["bash", str(script)], env=environment | variables, capture_output=True, text=True
        )

    done = session(PARTS="check sanitize", LIMITS="check=5")
    assert done.returncode == 1
    page = (tmp_path / "out" / "summary.txt").read_text()
    assert page in done.stdout
    for part in ("check", "sanitize"):
        assert f"{part}: failed with 1" in page
        assert (tmp_path / "out" / f"{part}.log").exists()
    wrong = session(PARTS="chek")
    assert (wrong.returncode, "PARTS names chek" in wrong.stderr) == (2, True)
    wrong = session(LIMITS="check=soon")
    assert (wrong.returncode, "LIMITS must be a list" in wrong.stderr) == (2, True)
