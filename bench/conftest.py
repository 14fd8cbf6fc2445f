"""Chooses cases, measures them, and merges the numbers into bench/results/<device>.csv."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import must
from bench.cases import LEVELS, Case
from bench.floor import Work, floor_ms
from bench.implementations import IMPLEMENTATIONS, Refused, missing
from bench.origin import ROOT, commit, device_name, stamp, threads, versions
from bench.rows import Row, lines, save
from bench.timing import Function, cuda_seconds, once, peak_mib, reserved_mib
from eqcvt.convert import _escnn

ROWS = pytest.StashKey[list[Row]]()
# A measurement on the CPU takes about so many seconds, in so many rounds at least and at most.
CPU_S, CPU_ROUNDS = 6.0, (5, 15)


# The types of the fixtures of these names, which say what they take.
Record = Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.addoption
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    add("--quick", action="store_true", help="one round of the smallest sizes; nothing is written")
    add("--compile", action="store_true", help="time torch.compile too (minutes more)")
    add("--full", action="store_true", help="every case and implementation (hours on a CPU)")
    add("--must", action="store_true", help="on a GPU: what must be reached, and whether it was")
    add("--results", default=str(ROOT / "bench" / "results"), help="folder of the CSV")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    if config.getoption("--must") and config.getoption("--device") != "cuda":
        raise pytest.UsageError("--must is about an H100: it needs --device cuda")


def left_out(name: str, config: pytest.Config) -> str | None:
    """Return why this run does not take an implementation, or None if it does."""
    asked_by = IMPLEMENTATIONS[name].asked_by
    asked = asked_by == "default" or config.getoption("--full") or config.getoption("--must")
    if not asked and not (asked_by == "--compile" and config.getoption("--compile")):
        return f"{asked_by} takes it"
    return missing(name, config.getoption("--device"))


def takes(case: Case, implementation: str, config: pytest.Config) -> bool:
    """Whether the options ask for a case by an implementation."""
    if config.getoption("--must"):
        return must.needs(case, implementation)
    full, quick = config.getoption("--full"), config.getoption("--quick")
    level = "quick" if quick else "full" if full else "default"
    return LEVELS.index(case.level) <= LEVELS.index(level)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a file's test each of its ``cases(device)`` by each implementation that is there."""
    config = metafunc.config
    chosen = [
        (case, name)
        for case in metafunc.module.cases(config.getoption("--device"))
        for name in case.implementations
        if takes(case, name, config)
        and (name not in IMPLEMENTATIONS or left_out(name, config) is None)
    ]
    ids = [f"{case}-{name}" for case, name in chosen]
    metafunc.parametrize(("case", "implementation"), chosen, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stop what hangs before it costs the others their time."""
    for item in items:
        if not item.path.is_relative_to(ROOT / "bench"):
            continue
        must_s = 300 if "compile-max" in item.name else 180
        item.add_marker(pytest.mark.timeout(must_s if config.getoption("--must") else 900))


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = config.getoption("--device")
    reasons = {name: left_out(name, config) for name in IMPLEMENTATIONS}
    where = f"{device_name(device)}, {threads(device) or 'no'} threads"
    return [
        f"bench: {where}, {versions()}, {commit()}",
        *(f"left out: {name} ({reason})" for name, reason in reasons.items() if reason),
    ]


@pytest.fixture(scope="session", autouse=True)
def _judge() -> None:
    if why := _escnn.install():
        pytest.exit(f"the benchmarks check every number against escnn first: {why}", returncode=1)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where the cases run."""
    name: str = pytestconfig.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda, but torch sees no CUDA device", returncode=1)
    return name


@pytest.fixture(autouse=True)
def _precision(case: Case) -> None:
    """Set torch's switch of float32 products to what the case says."""
    torch.backends.cuda.matmul.allow_tf32 = case.dtype != "float32"
    torch.backends.cudnn.allow_tf32 = case.dtype != "float32"


@pytest.fixture
def record(pytestconfig: pytest.Config, device: str) -> Record:
    """Keep a row, and write it at once: a run that is cut off keeps what it has."""

    def kept(
        case: Case,
        implementation: str,
        seconds: list[float],
        *,
        peak: float | None = None,
        work: Work | None = None,
    ) -> None:
        median = statistics.median(seconds)
        quartiles = np.percentile(seconds, [25, 75])
        share = None if work is None else floor_ms(work, device, case.dtype) / (median * 1e3)
        name, op, shape, dtype = case.key
        row = {
            "case": name,
            "op": op,
            "implementation": implementation,
            "shape": shape,
            "dtype": dtype,
            "threads": threads(device),
            "median_ms": f"{median * 1e3:.3f}",
            "iqr_ms": f"{(quartiles[1] - quartiles[0]) * 1e3:.3f}",
            "images_per_s": f"{case.shape[0] / median:.3f}",
            "peak_mib": "" if peak is None else f"{peak:.1f}",
            "floor_share": "" if share is None else f"{share:.3f}",
            "rounds": str(len(seconds)),
            **stamp(device),
        }
        pytestconfig.stash[ROWS].append(row)
        if not pytestconfig.getoption("--quick"):
            save(Path(pytestconfig.getoption("--results")), [row])

    return kept


@pytest.fixture
def measure(request: pytest.FixtureRequest, device: str, record: Record) -> Iterator[Measure]:
    """Build a function, call it until all is compiled, then take its memory and its time.

    Another project's code that does not run here is skipped with the reason; ours fails.
    """

    def measured(
        case: Case,
        implementation: str,
        build: Callable[[], Function],
        *,
        work: Work | None = None,
    ) -> None:
        before = reserved_mib() if device == "cuda" else 0.0
        mode = IMPLEMENTATIONS[implementation].mode if implementation in IMPLEMENTATIONS else ""
        try:
            function = build()
            function()
        except Refused as error:
            pytest.skip(str(error))
        except (NotImplementedError, RuntimeError) as error:
            if implementation.split("-")[0] in ("eager", "native", "triton", "auto"):
                raise
            pytest.skip(f"{implementation} does not run: {str(error).splitlines()[0]}")
        if device == "cuda":
            for _ in range(3):  # torch.compile records its CUDA graphs after the first call
                function()
            # A graph allocates nothing when it runs: it keeps its memory between the calls.
            graphs = mode in ("graph", "max-autotune")
            held = max(0.0, reserved_mib() - before) if graphs else 0.0
            peak = (peak_mib(function, device) or 0.0) + held
            rounds = 1 if request.config.getoption("--quick") else None
            seconds = cuda_seconds(function, rounds=rounds)
        else:
            peak = peak_mib(function, device)
            seconds = _cpu_seconds(request, f"{case.op} {' '.join(case.key[::2])}", function)
        if seconds:
            record(case, implementation, seconds, peak=peak, work=work)

    yield measured
    torch.compiler.reset()  # with the memory of its graphs
    gc.collect()


def _cpu_seconds(request: pytest.FixtureRequest, group: str, function: Function) -> list[float]:
    """Return the seconds of each round by pytest-benchmark; none where that is switched off."""
    benchmark: BenchmarkFixture = request.getfixturevalue("benchmark")
    benchmark.group = group
    rounds = 1
    if not request.config.getoption("--quick"):
        # Also one more call unmeasured: to measure memory, what the allocator kept was given back.
        low, high = CPU_ROUNDS
        rounds = max(low, min(high, int(CPU_S / once(function, "cpu"))))
    benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=1)
    return list(benchmark.stats.stats.data) if benchmark.stats is not None else []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the rows of a GPU, and with --must what was reached (a CPU's pytest-benchmark has)."""
    rows = config.stash[ROWS]
    if config.getoption("--device") != "cuda" or not rows:
        return
    terminalreporter.section(f"bench: {rows[0]['device']}, {rows[0]['versions']}")
    terminalreporter.write_line("\n".join(lines(rows)))
    if config.getoption("--must"):
        terminalreporter.section("must reach")
        terminalreporter.write_line("\n".join(must.report(rows)))
