"""The table of launches, the check of kernels, and the search for faster launches."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import launch_times
from eqcvt import tune
from eqcvt.kernels import launches
from eqcvt.ops import _backend, _proof
from eqcvt.tune import cases, check, search
from eqcvt.tune.record import Record
from tests.cli.conftest import invoke
from tests.tune.conftest import H100, KEY

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)


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
                    assert launches.too_few_rows(name, launch, capability) is None


def test_a_device_takes_the_highest_class_up_to_its_own() -> None:
    def warps(capability: int) -> int:
        return launches.nearest("mlp_block_fwd", 16, "D32", capability)["num_warps"]

    shipped = launches.table()["sm80 mlp_block_fwd 16 D32"]
    assert KEY not in launches.table()
    with launches.installed({KEY: shipped | {"num_warps": 2}, f"sm120{KEY[4:]}": shipped}):
        assert [warps(c) for c in (75, 80, 89, 90, 100, 120, 121)] == [4, 4, 4, 2, 2, 4, 4]
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
        (KEY, None, "needs the fields BLOCK_N, BLOCK_E, REGISTERS, num_warps, .*, got None"),
    ],
)
def test_what_is_no_launch_is_refused(key: str, change: Any, message: str) -> None:
    launch = None if change is None else launches.table()[f"sm80{KEY[4:]}"] | change
    with pytest.raises(ValueError, match=message):
        launches.install({key: launch})


def test_hopper_is_not_given_more_warps_than_a_tile_has_rows_for() -> None:
    key = "lift_sums 16 K64"
    launch = launches.table()[f"sm80 {key}"] | {"BLOCK_M": 64, "num_warps": 8}
    launches.validated({f"sm80 {key}": launch})
    with pytest.raises(ValueError, match="8 warps need BLOCK_M of 128 or more on this class"):
        launches.validated({f"sm90 {key}": launch})


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


def test_a_field_that_can_be_off_is_tried_at_all_its_values() -> None:
    kernel = "conv_attention_attend_bwd_queries"

    def time() -> float:
        times = {0: 2.0, 72: 4.0, 80: 3.0, 96: 1.0, 128: 3.0}
        return times[launches.nearest(kernel, 16, "D32", 90)["REGISTERS"]]

    off = launches.nearest(kernel, 16, "D32", 90) | {"REGISTERS": 0}
    found = search.descend(f"sm90 {kernel} 16 D32", off, time, lambda: None, refused={})
    assert found.launch == off | {"REGISTERS": 96}


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
def test_what_a_backend_does_not_serve_is_left_out_unless_it_serves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = {"shape": (1, 16, 3, 3), "hidden": 7}
    monkeypatch.setitem(cases.CHECKED, "mlp_block", {"small": {}, "other": other})
    judge = check.Judge("mlp_block", "float32", "cpu")
    module = _backend.module("mlp_block", "native", "cpu")
    monkeypatch.setattr(module, "supports", lambda x, w1: "not 7" if len(w1) == 7 else None)
    assert judge.verdict("native").passed
    monkeypatch.setattr(module, "supports", lambda x, w1: "no")
    assert judge.verdict("native") == check.UNSERVED


def test_parts_of_a_check_make_one_verdict() -> None:
    right, better = check.Verdict(True, 0.5, None), check.Verdict(True, 0.25, None)
    wrong = check.Verdict(False, 2.0, "result 0: error 2 exceeds 1")
    assert check.together([better, check.UNSERVED, right]) == right
    assert check.together([right, wrong, check.UNSERVED]) == wrong
    assert check.together([check.UNSERVED, check.UNSERVED]) == check.UNSERVED


def test_every_call_is_checked_by_one_of_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def apart(op: str, *rest: Any) -> check.Verdict:
        seen.extend((op, call) for call in rest[-1])
        served = not (op == "conv_attention" and "5x5" in rest[-1])
        return check.Verdict(True, 0.5, None) if served else check.UNSERVED

    monkeypatch.setattr(tune, "apart", apart)
    options = {"backends": ["triton"], "precisions": ["bfloat16"], "check_only": True}
    record = tune.run(tmp_path / "tuned.json", H100, jobs=3, device="cpu", **options)
    assert sorted(seen) == sorted((op, c) for op in _backend.OPS for c in cases.CHECKED[op])
    assert all(record.checked("triton", op, "bfloat16") for op in _backend.OPS)


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
    verdict = check.apart("mlp_block", "float32", "native", "cpu", {}, ["small"])
    assert verdict.passed, verdict.reason
    with pytest.raises(check.Unchecked, match="cannot serve mlp_block on meta"):
        check.apart("mlp_block", "float16", "native", "meta", {}, ["small"])


def test_a_crash_is_a_verdict_and_what_comes_from_outside_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = subprocess.CompletedProcess([], -signal.SIGSEGV, "", "")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: died)
    asked = ("lift", "tf32", "triton", "cuda", {}, ["small"])
    assert check.apart(*asked).reason == "its process died of signal 11"
    died.returncode = -signal.SIGKILL  # as a system does that has no memory left
    with pytest.raises(check.Unchecked, match=r"lift by triton in tf32 could not .* with -9"):
        check.apart(*asked)
    monkeypatch.undo()
    monkeypatch.setattr(check, "LIMIT", 0.01)
    with pytest.raises(check.Unchecked, match="had not been checked after"):
        check.apart("mlp_block", "float32", "native", "cpu", {}, ["small"])


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
    for name in tune.BACKENDS:
        _backend._unavailable(name, "cpu")  # which loads the modules of all ops, once
    options = {"shape": (1, 16, 3, 3), "hidden": 16}
    monkeypatch.setattr(cases, "CHECKED", {"mlp_block": {"small": options}})
    monkeypatch.setattr(cases, "TIMED", {"mlp_block": [(options, True)]})
    monkeypatch.setattr(tune, "_TIMED", {torch.float32: ("float32",)})
    monkeypatch.setattr(check, "DRAWS", 1)
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


def _tune(path: Path, clock: Any, **options: Any) -> Record:
    options = {"ops": ["mlp_block"], "backends": ["triton"], "jobs": 0, "device": "cpu"} | options
    return tune.run(path, H100, timer=clock, **options)


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


def test_kernels_that_a_launch_does_without_are_not_tuned_and_new_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "token_embed_bwd"
    without, apart = "sum_rows 32 few", f"{whole}_filters 16 D32"

    def blocks() -> bool:
        return launches.nearest(whole, 16, "D32", 90)["BLOCK_K"] < 128

    def used(_: object) -> list[str]:
        return [f"{whole} 16 D32", apart if blocks() else without]

    def clock(_: object, kernels: tuple[str, ...]) -> float:
        if blocks() and kernels == ("sum_rows",):
            raise RuntimeError("the call launches none of these")
        return (2.0 - blocks()) if whole in kernels else 1.0

    class Right:
        def __init__(self, *_: object) -> None:
            pass

        def verdict(self, _: str) -> check.Verdict:
            return check.Verdict(True, 0.0, None)

    monkeypatch.setattr(tune, "entries_used", used)
    monkeypatch.setattr(tune, "Judge", Right)
    monkeypatch.setattr(cases, "step", lambda *_: None)
    monkeypatch.setattr(tune, "_TIMED", {torch.float16: ("float16",)})
    record = _tune(tmp_path / "tuned.json", clock, ops=["token_embed"], device="cpu")
    assert record.content["times"].keys() == {f"sm90 {whole} 16 D32", f"sm90 {apart}"}
    assert record.checked("triton", "token_embed", "float16")


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
    wrong = session(PARTS="check bench")
    assert (wrong.returncode, "bench cannot be run by false" in wrong.stderr) == (2, True)
    wrong = session(LIMITS="check=soon")
    assert (wrong.returncode, "LIMITS must be a list" in wrong.stderr) == (2, True)


@triton
@pytest.mark.usefixtures("small")
def test_launches_are_compared_and_the_fastest_right_one_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, path = "sm90 mlp_block_fwd 32 D32", tmp_path / "launches.json"
    asked = launch_times.question("mlp_block_fwd 32 D32 num_warps=1,8 num_stages=1,2", 90)
    now, tried = launches.nearest("mlp_block_fwd", 32, "D32", 90), asked.tried
    assert (asked.op, asked.key, tried[0]) == ("mlp_block", key, now)
    assert {(t["num_warps"], t["num_stages"]) for t in tried[1:]} <= {
        (w, s) for w in (1, 8) for s in (1, 2)
    }

    class Right:
        def __init__(self, op: str, precision: str, *_: object) -> None:
            self.precision = precision

        def verdict(self, _: str) -> check.Verdict:
            launch = launches.nearest("mlp_block_fwd", 32, "D32", launches.INTERPRETER)
            wrong = self.precision == "tf32" and launch["num_warps"] + launch["num_stages"] == 10
            return check.Verdict(not wrong, 0.0, "result 0: error" if wrong else None)

    monkeypatch.setattr(launch_times, "Judge", Right)
    reasons = list(launch_times.judge(asked, [1], None, "cpu"))
    assert reasons == [
        "result 0: error" if (t["num_warps"], t["num_stages"]) == (8, 2) else None for t in tried
    ]
    rows = list(launch_times.compare(asked, reasons, [1, 2], timer=Clock(), device="cpu"))
    assert [row.launch for row in rows] == [*tried, now]
    assert [bool(row.ms) for row in rows] == [not reason for reason in [*reasons, None]]
    assert rows[0].ms.keys() == {1, 2}
    with pytest.raises(ValueError, match="look 'mlp_block_bwd 16 D128' up nowhere"):
        launch_times.steps("mlp_block", "mlp_block_bwd 16 D128", 1, "cpu")

    shipped = launches.FILE.read_text()
    path.write_text(shipped)
    old = next(name for name in json.loads(shipped) if name.startswith("sm80 mlp_block_fwd"))
    launch_times.ship(old, launches.table()[old], path)
    assert path.read_text() == shipped
    launch_times.ship(key, tried[-1], path)
    assert json.loads(path.read_text()) == json.loads(shipped) | {key: tried[-1]}
    assert set(shipped.splitlines()) < set(path.read_text().splitlines())


def test_what_is_no_faster_than_the_launch_in_force_is_not_shipped() -> None:
    def rows(*times: tuple[float, float] | None) -> list[launch_times.Row]:
        timed = [{} if t is None else {128: t[0], 16: t[1]} for t in times]
        return [
            launch_times.Row({"ROWS": i}, None if t else "wrong", t) for i, t in enumerate(timed)
        ]

    assert launch_times.fastest(rows((2.0, 1.0), (1.5, 1.0), (1.4, 0.9), (1.9, 1.1))) == {"ROWS": 2}
    for other in (None, (1.99, 0.5), (1.0, 1.01)):  # wrong, noise, slower at 16 images
        assert launch_times.fastest(rows((2.0, 1.0), other, (2.1, 1.0))) is None
    assert launch_times.fastest(rows(None, (3.0, 3.0), None)) == {"ROWS": 1}


def test_a_launch_that_ends_its_process_is_wrong_and_the_others_are_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = launch_times.question("lift_blur 16 any ROWS=4,8,16", 90)
    runs = [("null\n", "", -11), ('"error 1 exceeds 0"\n', "", 0)]
    inputs = []

    def run(*_: object, input: str, **__: object) -> subprocess.CompletedProcess[str]:
        inputs.append(json.loads(input)[0])
        out, said, code = runs[len(inputs) - 1]
        return subprocess.CompletedProcess([], code, out, said)

    monkeypatch.setattr(subprocess, "run", run)
    reasons = launch_times.apart(asked, [128])
    assert reasons == [None, "its process ended with -11", "error 1 exceeds 0"]
    assert [launch_times.Question(*each).tried for each in inputs] == [asked.tried, asked.tried[2:]]

    def late(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired([], timeout, output=b"null\n")

    monkeypatch.setattr(subprocess, "run", late)
    never = "it had not been judged after 5 s"
    assert launch_times.apart(asked, [128], seconds=5) == [None, never, never]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lift_blur 16", "a question is one such as"),
        ("lift_blur 16 any ROWS=four", "a question is one such as"),
        ("lift_blur 8 any ROWS=4", "a question is one such as"),
        ("lift_blurr 16 any ROWS=4", "has no launch for 'lift_blurr 16 any'"),
        ("sum_rows 32 few BLOCK_ROWS=64", "is named after no op of lift, conv_attention"),
        ("lift_blur 16 any ROWS=5", "ROWS must be one of 4, 8, 16, got 5"),
        ("lift_blur 16 any WIDTH=4", "WIDTH"),
    ],
)
def test_what_is_no_question_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch_times.question(text, 90)


def test_the_questions_for_a_gpu_are_ones() -> None:
    lines = (KERNELS.parent / "bench" / "questions.txt").read_text().splitlines()
    asked = [launch_times.question(t, 90) for t in lines if t and not t.startswith("#")]
    assert all(len(each.tried) > 1 for each in asked)
    assert len({each.key for each in asked}) == len(asked)


def test_comparing_launches_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "bench.launch_times", "lift_blur 16 any ROWS=4,8"]
    done = subprocess.run(command, cwd=KERNELS.parent, capture_output=True, text=True)
    assert (done.returncode, "torch sees no CUDA device" in done.stderr) == (1, True)
