"""What the build refuses, what it leaves out on purpose, and what it links."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from eqcvt import native
from tests.native.test_launchers import load_setup

ROOT = Path(__file__).resolve().parents[2]
INFO = native.build_info()
HERE = INFO.get("instruction_sets_here", ())
BUILT = pytest.mark.needs("native")
SETTINGS = (
    *("EQCVT_NATIVE", "EQCVT_CUDA", "EQCVT_CUDA_ARCHS", "EQCVT_ISA", "EQCVT_BACKEND"),
    *("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH"),
)


def run(*command: str, cwd: Path = ROOT, **settings: str) -> tuple[int, str]:
    """Run a command in an environment with these settings only; return its status and output."""
    rest = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=rest | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("tree")
    leave = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("eqcvt", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=leave)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def tool(folder: Path, name: str, text: str) -> Path:
    """Write a shell script that stands for a compiler."""
    script = folder / name
    script.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    script.chmod(0o755)
    return script


def refusal(tree: Path, **settings: str) -> str:
    """Return the one line with which the build refuses these settings."""
    status, text = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, **settings)
    assert status != 0, text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("EQCVT_NATIVE", "off", "0, 1"), ("EQCVT_CUDA", "yes", "auto, 0, 1")],
)
def test_a_wrong_value_is_refused(tree: Path, name: str, value: str, allowed: str) -> None:
    line = refusal(tree, **{name: value})
    assert line == f"error: {name} must be one of {allowed}, got {value!r}"


def test_cuda_without_nvcc_is_refused(tree: Path, tmp_path: Path) -> None:
    tool(tmp_path, "c++", "exit 0")
    line = refusal(tree, EQCVT_CUDA="1", PATH=str(tmp_path))
    assert "there is no nvcc in CUDA_HOME, CUDA_PATH or PATH" in line
    assert "EQCVT_CUDA=0" in line


@pytest.mark.parametrize(
    ("archs", "said"),
    [
        ("80;ninety", "where 'ninety' is no architecture"),
        ("8.0 9.0+ptx", "where '9.0+ptx' is no architecture"),
        ("70", "names '70', and"),
    ],
)
def test_wrong_architectures_are_refused(tree: Path, tmp_path: Path, archs: str, said: str) -> None:
    (tmp_path / "bin").mkdir()
    tool(tmp_path, "c++", "exit 0")
    tool(tmp_path / "bin", "nvcc", "echo compute_100 compute_80 compute_90")
    line = refusal(tree, EQCVT_CUDA_ARCHS=archs, CUDA_HOME=str(tmp_path), CXX=str(tmp_path / "c++"))
    assert line.startswith("error: EQCVT_CUDA_ARCHS ")
    assert said in line
    assert '"80;90;90+PTX"' in line or line.endswith("knows only 80, 90, 100")


def test_a_missing_compiler_is_named(tree: Path) -> None:
    line = refusal(tree, CXX="/nonexistent", EQCVT_CUDA="0")
    assert "needs a C++17 compiler (CXX=/nonexistent, which is not there)" in line
    assert line.endswith("EQCVT_NATIVE=0 installs eqcvt without its native extension")


def test_a_failed_compilation_ends_the_build(tree: Path, tmp_path: Path) -> None:
    broken = tool(tmp_path, "broken", "exit 1")
    line = refusal(tree, CXX=str(broken), EQCVT_CUDA="0")
    assert "the native extension did not compile" in line


def test_without_the_extension_on_purpose(tree: Path, tmp_path: Path) -> None:
    status, text = run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)),
        str(tree),
        EQCVT_NATIVE="0",
        CXX="/nonexistent",
    )
    assert status == 0, text
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target))
    status, text = run(*pip, str(wheel))
    assert status == 0, text
    # -S keeps an editable install from lending it the extension.
    paths = [str(target), *site.getsitepackages()]
    status, text = run(
        *(sys.executable, "-S", "-m", "eqcvt", "doctor"),
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join(paths),
    )
    assert status == 0, text
    said = "native extension: none: eqcvt was installed without it, as EQCVT_NATIVE=0 asked"
    assert said in text


def symbols(*options: str) -> list[str]:
    """Return lines of nm about the extension."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm")
    status, text = run(nm, *options)
    assert status == 0, text
    return text.splitlines()


@BUILT
def test_neither_torch_nor_a_cuda_runtime_is_linked() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf")
    status, text = run(readelf, "-d", INFO["file"])
    assert status == 0, text
    needed = [line.split("[")[1].split("]")[0] for line in text.splitlines() if "NEEDED" in line]
    system = ("libstdc++.", "libgcc_s.", "libc.", "libm.", "libpthread.", "libdl.", "librt.", "ld-")
    assert [name for name in needed if not name.startswith(system)] == []


@BUILT
def test_nothing_of_torch_or_cuda_is_left_to_the_loader() -> None:
    undefined = symbols("-DC", "--undefined-only", INFO["file"])
    assert undefined
    foreign = ("torch", "c10::", "at::", "cuda", "cu")
    names = [line.split(maxsplit=1)[1].split("@")[0] for line in undefined]
    assert [name for name in names if name.startswith(foreign)] == []


def test_a_checkout_that_hides_the_installed_extension_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eqcvt").mkdir()
    (tmp_path / "eqcvt" / "_native.so").touch()
    folder = tmp_path / "eqcvt-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: eqcvt\n")
    (folder / "RECORD").write_text("eqcvt/_native.so,,\n")
    found = importlib.metadata.PathDistribution(folder)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [found])
    text = native._why_not_built()
    assert text.startswith(f"this is the source tree {ROOT}, which has not built it; ")
    assert f"installed is in {tmp_path}: start Python in another folder, or pip" in text


@BUILT
def test_only_the_module_is_exported() -> None:
    exported = symbols("-D", "--defined-only", INFO["file"])
    # What the standard library's templates make is weak, and the same in every program.
    strong = [line.split()[-1] for line in exported if line.split()[-2] not in "WVu"]
    assert strong == ["PyInit__native"]


@BUILT
def test_no_function_of_an_instruction_set_can_be_taken_for_another() -> None:
    """The linker keeps one of several weak definitions, perhaps one the machine cannot run."""
    objects = sorted(ROOT.glob("build/native-*/cpu/*.cpp.*.o"))
    if not objects:
        pytest.skip("the extension was not built in this checkout")
    weak = [
        f"{path.name}: {line}"
        for path in objects
        for line in symbols("-C", "--defined-only", str(path))
        if " W " in line
    ]
    assert weak == []


@BUILT
def test_no_cuda_kernel_stores_a_converted_value_byte_by_byte() -> None:
    """For the low byte of a value just made 16-bit, ptxas (12.8, 13.0) stores its whole part."""
    triton = importlib.util.find_spec("triton")
    tools = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=tools)
    if INFO["cuda"] is None or cuobjdump is None:
        pytest.skip("there are no CUDA kernels, or there is no cuobjdump")
    function, wrong = "", set()
    with subprocess.Popen(
        [cuobjdump, "--dump-sass", INFO["file"]],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Function : " in line:
                function = line.split()[-1]
            elif "F2I.U8.F16" in line:
                wrong.add(function)
    assert process.returncode == 0
    assert function
    assert wrong == set()


@BUILT
def test_it_runs_without_torch() -> None:
    """Loaded and called in a process that cannot import torch: no version of it matters."""
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None
import numpy as np
spec = importlib.util.spec_from_file_location("_native", {INFO["file"]!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x, filters = np.ones((1, 1, 3, 3), np.float32), np.ones((8, 1, 3, 3), np.float32)
bias = np.arange(8, dtype=np.float32)
weight, shift = np.ones_like(bias), np.zeros_like(bias)
y = np.full((1, 1, 1, 8), np.nan, np.float32)
at = lambda a: a.__array_interface__["data"][0]
status = module.cpu_token_embed_forward(
    0, at(x), at(filters), at(bias), at(weight), at(shift), 1, 1, 3, 3, 8, 3, 1, 0, 1e-5, at(y), 2)
u = 9 + bias
expected = (u - u.mean()) / np.sqrt(u.var() + 1e-5)
assert status == 0 and np.allclose(y.ravel(), expected, atol=1e-6), (status, y, expected)
"""
    status, text = run(sys.executable, "-c", code)
    assert status == 0, text


@BUILT
def test_an_unknown_instruction_set_is_refused() -> None:
    code = "from eqcvt import native; native.unavailable('cpu')"
    status, text = run(sys.executable, "-c", code, EQCVT_ISA="sse9")
    assert status != 0
    usable = ", ".join(INFO["instruction_sets_here"])
    assert f"ImportError: EQCVT_ISA must be one of {usable} on this machine, got 'sse9'" in text


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86")
def test_a_compiler_that_does_not_know_amx_leaves_it_out() -> None:
    assert list(load_setup().instruction_sets(["false"])) == ["portable", "avx2", "avx512"]
    assert list(load_setup().instruction_sets(["true"])) == ["portable", "avx2", "avx512", "amx"]


@pytest.mark.skipif("amx" not in INFO.get("instruction_sets", ()), reason="AMX was left out")
def test_what_the_compiler_may_use_puts_no_amx_into_other_variants() -> None:
    options = load_setup().X86["amx"]
    for given in (options, [word for word in options if not word.startswith("-D")]):
        source = ("-std=c++17", "-E", str(ROOT / "csrc" / "cpu" / "conv_attention.cpp"))
        status, text = run(*load_setup().find_compiler(), *given, "-DEQCVT_ISA=any", *source)
        assert status == 0, text
        assert ("struct MatrixUnit" in text) == (given is options)


@BUILT
@pytest.mark.parametrize("isa", HERE)
def test_the_instruction_set_can_be_chosen(isa: str) -> None:
    code = "from eqcvt import native; print(native.build_info()['instruction_set'])"
    assert run(sys.executable, "-c", code, EQCVT_ISA=isa) == (0, f"{isa}\n")


@BUILT
@pytest.mark.timeout(900)  # a test run of its own
@pytest.mark.parametrize("isa", [i for i in HERE if i != INFO["instruction_set"]])
def test_the_ops_are_right_in_the_other_instruction_sets(isa: str) -> None:
    ops = ("conv_attention", "lift", "mlp_block", "token_embed")
    if {isa, INFO["instruction_set"]} == {"avx512", "amx"}:  # one object serves both
        ops = tuple(op for op in ops if f"csrc/cpu/{op}.cpp" != load_setup().NOT_AMX)
    files = [str(file) for op in ops for file in Path(__file__).parent.glob(f"test_{op}*.py")]
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider")
    status, text = run(*pytest_, *files, "-k", "as_good_as and two", EQCVT_ISA=isa)
    assert status == 0, text[-6000:]
    assert " passed" in text
    assert " skipped" not in text
