"""The proof that the choice of GPU kernels goes by, and the check at the first use of one."""

from __future__ import annotations

import logging
import os
import sys
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

from eqcvt import ops
from eqcvt.kernels import launches
from eqcvt.ops import _backend, _proof, _prove
from eqcvt.tune import cases, check
from eqcvt.tune.record import Record
from tests.tune.conftest import H100, KEY


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Return a record that proves Triton's kernels of every op on the GPU of this machine.

    What has no verdict cannot be checked: there is no such GPU.
    """
    monkeypatch.setattr(_proof, "devices", lambda: [H100])
    monkeypatch.setattr(_proof, "kind", lambda index: H100)
    monkeypatch.setattr(_prove, "_visible", lambda device: "")
    monkeypatch.setattr(_prove, "_jobs", lambda device: 3)
    for name in ("triton", "native"):
        monkeypatch.setitem(_backend._REASONS, name, lambda device: None)
    monkeypatch.setitem(_backend._modules, "triton", dict.fromkeys(_backend.OPS))
    monkeypatch.setitem(_backend._modules, "native", dict.fromkeys(_backend.OPS))
    record = Record(_proof.user_file(H100), H100)
    record.launches[KEY] = launches.table()[f"sm80{KEY[4:]}"] | {"num_warps": 2}
    for op in _backend.OPS:
        for precision in _proof.PRECISIONS:
            record.check("triton", op, precision, check.Verdict(True, 0.5, None))
    return record


def _chosen(op: str = "lift", dtype: torch.dtype = torch.float32, index: int = 0) -> str:
    return _backend.choose(op, torch.device("cuda", index), dtype, None, lambda module: None)


def _why_not(backend: str = "triton", device: _proof.Device = H100) -> str:
    return _prove.why_not(device, "lift", backend, "tf32") or ""


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


@pytest.fixture
def switches() -> Iterator[None]:
    """Put PyTorch's switches of float32 products back."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    yield
    matmul.fp32_precision, convolution.fp32_precision = before


@pytest.mark.usefixtures("switches")
def test_float32_goes_by_the_proof_of_the_precision_that_its_switch_asks_for(proof: Record) -> None:
    for op in _backend.OPS:
        proof.check("triton", op, "float32", check.Verdict(False, 2.0, "error 2 exceeds 1"))
    proof.save()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    found = {op: _chosen(op) for op in _backend.OPS}
    assert found == {
        "lift": "triton",
        "token_embed": "triton",
        "conv_attention": "reference",
        "mlp_block": "reference",
    }
    rows = [row for row in ops.explain(("cuda",)) if row.backend == "triton"]
    assert all(row.chosen and "wrong in float32: error 2" in (row.reason or "") for row in rows)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    other = {op: _chosen(op) for op in _backend.OPS}
    assert all(other[op] != found[op] for op in _backend.OPS)


@pytest.mark.needs("triton-package")
@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("op", _backend.OPS)
def test_kernels_read_the_switch_that_their_proof_goes_by(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def precision(convolution: bool = False) -> str:
        asked.append(convolution)
        return "ieee"

    small: dict[str, tuple[int, ...]] = {"lift": (1, 1, 9, 9), "token_embed": (1, 2, 5, 5)}
    with ops.use_backend("triton"):
        step = cases.step(op, {"shape": small.get(op, (1, 16, 3, 3))}, True, torch.empty(0))
        step()  # imports the kernels
        kernels = [m for n, m in sys.modules.items() if n.startswith("eqcvt.kernels.")]
        for module in kernels:
            if hasattr(module, "precision"):
                monkeypatch.setattr(module, "precision", precision)
        step()
    assert set(asked) == {op in _proof.CONVOLUTIONS}


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
    content["launches"][KEY]["num_warps"] = 1


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
    checks: Checks,
    change: Callable[[dict[str, Any]], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checks.returncode = 2  # and none can be made
    change(proof.content)
    proof.save()
    assert _chosen() == "reference"
    (row,) = [r for r in ops.explain(("cuda",)) if (r.op, r.backend) == ("lift", "triton")]
    assert row.available
    assert reason in (row.reason or "")
    assert str(proof.path) in (row.reason or "")
    assert reason in caplog.text


def test_changed_kernels_take_neither_launches_nor_proof(
    checks: Checks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proof, checks.returncode = checks.proof, 2
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


@pytest.mark.parametrize(
    ("cores", "gib", "jobs"), [(32, 70, 8), (3, 70, 3), (32, 9, 4), (32, 1, 1)]
)
def test_checks_at_a_time_go_by_the_cores_and_the_memory_that_is_free(
    cores: int, gib: int, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_prove, "_index", lambda device: 2)
    monkeypatch.setattr(_prove, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (gib << 30, 80 << 30))
    assert _prove._jobs(H100) == jobs


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
