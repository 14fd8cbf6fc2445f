"""Compile a module's Triton kernels for GPUs that are not here, and read what the assembler made.

``launches(call)`` runs ``call`` on tensors without data (``device="meta"``) and notes each kernel
launch instead of making it; ``assemble`` compiles one for a compute capability. That needs Triton's
compiler, so a process started without ``TRITON_INTERPRET``:

    python -m tests.kernels.aot tests.kernels.test_lift_compiled:calls [capability ...]

prints one line of JSON per kernel, where ``calls()`` yields pairs of a label and a callable.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# Bytes of shared memory one program may have.
SHARED_LIMIT = {
    capability: kib * 1024
    for capability, kib in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()
}
DIVISIBLE = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """One kernel with all its arguments."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Report(NamedTuple):
    """What the assembler says: per thread registers and spilled bytes, per program shared bytes.

    ``serialised`` is whether each asynchronous matrix product is waited for before the next begins;
    ``beyond`` whether one has more warps along its rows than its tile has rows for; ``undefined``
    whether an address is added to before anything has written it, which ptxas has done to the
    descriptors of such products and which on a GPU was an illegal address; ``overwritten`` whether
    a tile is fetched into shared memory that such a product may still read; ``writes`` whether
    anything is written to memory at all: Triton has compiled a kernel to nothing.
    """

    kernel: str
    capability: int
    warps: int
    registers: int
    spilled: int
    shared: int
    matrix: str
    serialised: bool
    beyond: bool
    undefined: bool
    overwritten: bool
    writes: bool


def launches(call: Callable[[], object], capability: int = 90) -> list[Launch]:
    """Return the kernel launches that ``call`` makes on a device, without making them."""
    found = []
    device = types.SimpleNamespace(multi_processor_count=132)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        defaults = {p.name: p.default for p in self.params if p.has_default}
        found.append(Launch(self, defaults | arguments, options))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("torch.cuda.get_device_capability", return_value=divmod(capability, 10)),
        mock.patch("torch.cuda.get_device_properties", return_value=device),
    ):
        call()
    return found


def source(launch: Launch) -> ASTSource:
    """Specialise a launch as Triton does: ones and None are constants, multiples of 16 marked."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        one = special and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + TYPES[value.dtype], DIVISIBLE
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = DIVISIBLE
        else:
            signature[name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def assemble(launch: Launch, capability: int) -> Report:
    """Compile a launch for sm_<capability> and return the assembler's account of it."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True)
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        arch = f"-arch=sm_{capability}{'a' if capability >= 90 else ''}"
        assembler = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        command = [assembler, "-v", arch, file.name, "-o", os.devnull]
        remarks = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    matrix = sorted({m for m in ("HGMMA", "HMMA", "FFMA2") if m in code.stdout})
    return Report(
        launch.kernel.__name__,
        capability,
        compiled.metadata.num_warps,
        use["REG"],
        use["STACK"] + use["LOCAL"],
        compiled.metadata.shared,
        "+".join(matrix),
        "wgmma.mma_async instructions are serialized" in remarks,
        _beyond(compiled.asm["ttgir"]),
        _undefined(code.stdout),
        _overwritten(compiled.asm["ttgir"]),
        re.search(r"\s(STG|UTMASTG|UBLKCP)", code.stdout) is not None,
    )


def _beyond(text: str) -> bool:
    """Whether Hopper's matrix unit would read rows that a tile does not have."""
    layouts = re.findall(
        r"^(#mma\d*) = #ttg.nvidia_mma<\{versionMajor = 3.*?warpsPerCTA = \[(\d+)", text, re.M
    )
    return any(
        1 < int(rows) < 16 * int(warps)
        for name, warps in layouts
        for rows in re.findall(rf"-> tensor<(\d+)x\d+x\w+, {name}>", text)
    )


def _undefined(code: str) -> bool:
    """Whether a uniform register is a summand before an instruction above has written it."""
    written: set[str] = set()
    for line in code.splitlines():
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s+(.*?);", line)
        if found is None:
            continue
        name, operands = found[1], [each.strip() for each in found[2].split(",")]
        if name.startswith("UIADD3") and any(
            each not in written for each in operands[1:] if re.fullmatch(r"UR\d+", each)
        ):
            return True
        if number := re.fullmatch(r"UR(\d+)", operands[0]):
            count = 2 if ".64" in name or "WIDE" in name else 4 if ".128" in name else 1
            written |= {f"UR{int(number[1]) + i}" for i in range(count)}
    return False


def _overwritten(text: str) -> bool:
    """Whether a loop fetches a tile to where a product that is not waited for may read another.

    A buffer of N tiles, D of which are fetched before the loop, gets tile i + D while products of
    tile i, or of tile i - 1, are under way: Triton gives a tile that is also summed, up to its
    version 3.7, one place too few.
    """
    tiles: dict[str, int] = {}  # places of each buffer
    depth: dict[str, int] = {}  # loops around it
    ahead: dict[str, int] = {}
    buffer: dict[str, str] = {}  # that a view is of
    loops: list[list[tuple[str, str]]] = []
    ends: list[str] = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        name = line.partition("=")[0].strip()
        reads = [buffer[v] for v in re.findall(r"%\w+", line.partition("=")[2]) if v in buffer]
        if found := re.search(r"ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", line):
            buffer[name], tiles[name] = name, int(found[1])
            depth[name], ahead[name] = len(loops), 0
        elif "ttg.memdesc_" in line and reads:
            buffer[name] = reads[0]
        elif "scf.for " in line:
            loops.append([])
            ends.append(indent + "}")
        elif ends and line.startswith(ends[-1]):
            ends.pop()
            if _meets(loops.pop() * 2, tiles, ahead):
                return True
        elif "ttg.async_copy_global_to_local" in line:
            for each in reads:
                if depth[each] == len(loops):
                    ahead[each] += 1
                else:
                    loops[-1].append(("fetch", each))
        elif "ttng.warp_group_dot_wait" in line and loops:
            loops[-1].append(("wait", (re.search(r"pendings = (\d+)", line) or ["", "0"])[1]))
        elif "ttng.warp_group_dot" in line and "isAsync = true" in line and loops:
            loops[-1].append(("product", " ".join(reads)))
    return False


def _meets(events: list[tuple[str, str]], tiles: dict[str, int], ahead: dict[str, int]) -> bool:
    """Whether in two turns of a loop a fetch meets a product that reads its place."""
    pending: list[tuple[int, str]] = []
    for at, (event, what) in enumerate(events):
        turn = 2 * at // len(events)
        if event == "product":
            pending.append((turn, what))
        elif event == "wait":
            pending = pending[len(pending) - int(what) :] if int(what) < len(pending) else pending
        elif any(
            what in read.split() and (turn + ahead[what] - then) % tiles[what] == 0
            for then, read in pending
        ):
            return True
    return False


def in_process(calls: str, *capabilities: int, **environment: str) -> list[Report]:
    """Assemble ``calls``, ``module:function``, where no interpreter is; assert what always holds.

    ``environment`` is what the function reads.
    """
    command = [sys.executable, "-m", __name__, calls, *map(str, capabilities)]
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = []
    for line in done.stdout.splitlines():
        fields = json.loads(line)
        fields.pop("call")
        report = Report(**fields)
        assert report.shared <= SHARED_LIMIT[report.capability], report
        assert not report.beyond, report
        assert not report.undefined, report
        assert not report.overwritten, report
        assert report.writes, report
        found.append(report)
    assert found
    return found


def reports(
    calls: Callable[[], Iterator[tuple[str, Callable[[], object]]]], capabilities: list[int]
) -> Iterator[tuple[str, Report]]:
    """Assemble every distinct kernel of the calls, labelled with the call that first needs it."""
    seen = set()
    for label, call in calls():
        for capability in capabilities:
            for launch in launches(call, capability):
                key = (source(launch).hash(), str(launch.options), capability)
                if key not in seen:
                    seen.add(key)
                    yield label, assemble(launch, capability)


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    targets = [int(a) for a in sys.argv[2:]] or [80, 90]
    for label, report in reports(getattr(importlib.import_module(module), function), targets):
        print(json.dumps({"call": label} | report._asdict()), flush=True)
