"""Runs every GPU kernel on small tensors under compute-sanitizer, and writes down what it finds.

``make sanitize``, or ``python -m bench.sanitize``. Each tool watches each op by each backend in a
process of its own; memory is not pooled there, so that every tensor ends where its allocation does.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

import eqcvt
from bench.origin import ROOT, slug
from eqcvt import use_backend
from eqcvt._files import write_text
from eqcvt.ops import CannotServe, explain
from eqcvt.tune import cases

TOOLS = ("memcheck", "racecheck")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMAGES, SMALL = 2, 8000  # of a call at most, and numbers of its input
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
LAUNCHED = "kernels launched: "


class Run(NamedTuple):
    """What a tool said of an op by a backend."""

    tool: str
    backend: str
    op: str
    result: str
    output: str


def find_sanitizer() -> str:
    """Return the path of compute-sanitizer; end with one line where there is none."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    for folder in [None, *(f"{home}/bin" for home in homes if home)]:
        if found := shutil.which("compute-sanitizer", path=folder):
            return found
    sys.exit(
        "error: compute-sanitizer is neither in PATH nor in CUDA_HOME/bin: it comes with the CUDA "
        "toolkit (Debian, Ubuntu: the package cuda-sanitizer)"
    )


def run_all(op: str, backend: str) -> None:
    """Run the small calls of an op, forward and backward, in every dtype; name Triton's kernels."""
    launched: set[str] = set()

    def calls() -> None:
        for options in cases.CHECKED[op].values():
            torch.manual_seed(0)
            if "shape" in options:
                images, *shape = options["shape"]
                options = options | {"shape": (min(images, IMAGES), *shape)}
            with torch.device("cuda"):
                call, inputs = cases.CALLS[op](True, **options)
            if inputs[0].numel() > SMALL:
                continue
            for dtype in DTYPES:
                with suppress(CannotServe):
                    cases.results(call, cases.activations(op, inputs, dtype))
        torch.cuda.synchronize()

    with use_backend(backend):
        if backend == "triton":
            from eqcvt.tune.search import entries_used

            launched = {entry.split(" ")[0] for entry in entries_used(calls)}
        else:
            calls()
    print(LAUNCHED + " ".join(sorted(launched)))


def watch(sanitizer: str, tool: str, backend: str, op: str, seconds: float) -> Run:
    """Run an op under a tool and read its summary."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "bench.sanitize", "--run", op, backend],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Run(tool, backend, op, f"stopped after {seconds:g} s", "")
    found = SUMMARY.findall(done.stdout)
    if not found or LAUNCHED not in done.stdout:
        return Run(tool, backend, op, f"did not finish ({done.returncode})", done.stdout)
    return Run(tool, backend, op, f"{found[-1]} found", done.stdout)


def record(runs: list[Run], sanitizer: str) -> str:
    """Return the text of the record."""
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    import triton

    from eqcvt.kernels import launches

    lines = [
        f"compute-sanitizer on {torch.cuda.get_device_name()}, {datetime.date.today()}",
        f"eqcvt {eqcvt.__version__}, torch {torch.__version__}, triton {triton.__version__}",
        (re.findall(r"[Vv]ersion.*", version) or [version.strip()])[0],
        "",
    ]
    lines += [f"{r.tool:10} {r.backend:7} {r.op:15} {r.result}" for r in runs]
    names = {n for r in runs for n in _launched(r.output)}
    missing = sorted(set(launches.KERNELS) - {"lift_plan"} - names)
    lines += ["", f"Triton kernels not run: {', '.join(missing) or 'none'}"]
    for run in runs:
        if run.result != "0 found":
            kept = [x for x in run.output.splitlines() if x.strip()]
            lines += ["", f"--- {run.tool} {run.backend} {run.op}", *kept[:40]]
    return "\n".join(lines) + "\n"


def _launched(output: str) -> list[str]:
    rows = [x.removeprefix(LAUNCHED) for x in output.splitlines() if x.startswith(LAUNCHED)]
    return " ".join(rows).split()


def main() -> None:
    """Watch everything, write the record, and exit with 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the record [bench/results/sanitizer-DEVICE.txt]")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=600, help="limit of each run")
    parser.add_argument("--run", nargs=2, metavar=("OP", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_all(*options.run)
        return
    sanitizer = find_sanitizer()
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device to run the kernels on")
    rows = explain(("cuda",))
    backends = sorted({row.backend for row in rows if row.available} - {"reference"})
    todo = [(tool, b, op) for tool in TOOLS for b in backends for op in cases.CALLS]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda each: watch(sanitizer, *each, options.seconds), todo))
    name = f"sanitizer-{slug(torch.cuda.get_device_name())}.txt"
    path = options.out or ROOT / "bench" / "results" / name
    text = record(runs, sanitizer)
    write_text(path, text)
    print(text, end="")
    sys.exit(any(run.result != "0 found" for run in runs))


if __name__ == "__main__":
    main()
