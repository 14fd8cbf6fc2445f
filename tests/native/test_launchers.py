"""The CPU launchers under the compiler's sanitizers, called from C++ with random shapes."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from eqcvt import native

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX") or "g++")
CASES = "40"
SETS = native.build_info().get("instruction_sets_here", ("portable",))

pytestmark = [
    pytest.mark.skipif(
        COMPILER is None or platform.system() != "Linux", reason="needs g++ on Linux"
    ),
    pytest.mark.needs("native"),
]


def load_setup() -> ModuleType:
    """Return setup.py as a module, for the options of each instruction set."""
    spec = importlib.util.spec_from_file_location("eqcvt_setup", HERE.parents[1] / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(folder: Path, sources: list[Path], *options: str) -> Path:
    """Compile and link a program."""
    common = ["-g", "-std=c++17", "-pthread", "-Wno-psabi", f"-I{CSRC}", *options]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        call([str(COMPILER), *common, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    program = folder / "program"
    call([str(COMPILER), *common, *objects, "-o", str(program)])
    return program


def call(command: list[str]) -> str:
    """Run a command that has to succeed and return its output."""
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[:6000]}"
    return run.stdout


# The narrowest vectors and the widest: what lies between is the same source. The widest with plain
# C++ in the place of the matrix unit, since sanitizers do not see what its tiles are loaded from.
@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_random_shapes_stay_inside_their_memory(tmp_path: Path, width: str) -> None:
    isa = SETS[0] if width == "narrow" else [name for name in SETS if name != "amx"][-1]
    options = ["-DEQCVT_EMULATE_MATRIX_UNIT"] if width == "wide" else []
    program = compiled(
        tmp_path,
        [HERE / "test_launchers.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))],
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        # Checks as calls, and no optimization: compiling takes most of this test's time.
        *("-O0", "--param", "asan-instrumentation-with-call-threshold=0"),
        *(f"-DEQCVT_ISA={isa}", *load_setup().X86[isa], *options),
    )
    said = call([str(program), "1", CASES])
    match = re.fullmatch(r"(\d+) of (\d+) cases were refused for their size\n", said)
    assert match, said
    assert 4 * int(match[1]) < int(match[2]), said


@pytest.mark.parametrize("what", ["parallel", "launchers"])
def test_the_threads_have_no_race(tmp_path: Path, what: str) -> None:
    sources = [CSRC / "cpu" / "parallel.cpp"]
    if what == "launchers":
        sources = sorted((CSRC / "cpu").glob("*.cpp"))
    program = compiled(
        tmp_path,
        [HERE / f"test_{what}.cpp", *sources],
        *("-fsanitize=thread", "-O1", "-DEQCVT_ISA=portable"),
    )
    run = subprocess.run([str(program), "1", "10"], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this thread sanitizer does not know the kernel's layout of memory")
    assert run.returncode == 0, run.stderr[:6000]
