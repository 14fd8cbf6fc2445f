"""Builds the native extension ``eqcvt._native``; all else about the package is in pyproject.toml.

It writes a build.ninja and runs ninja, which compiles what changed. Neither torch nor a GPU is
looked for. CONTRIBUTING.md lists the variables that choose what is built.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
WITHOUT = "EQCVT_NATIVE=0 installs eqcvt without its native extension"
# Each csrc/cpu/<op>.cpp is compiled once for each of these; csrc/bindings.cpp picks one at import.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
X86 = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    # GCC 11, clang 12 and newer
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DEQCVT_USE_MATRIX_UNIT"],
}
BINDINGS, PARALLEL = "csrc/bindings.cpp", "csrc/cpu/parallel.cpp"
# It takes longest to compile and gains nothing from what "amx" has beyond "avx512".
NOT_AMX = "csrc/cpu/lift.cpp"
# NaN and infinity have a meaning in every kernel, so -ffast-math is out of the question.
OPTIONS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -pthread -Wall -Wextra -Wno-psabi"
)
NVCC_OPTIONS = "-O3 -std=c++17 -cudart static -Xcompiler -fPIC,-fvisibility=hidden"
CUDA_ARCHS = "80;90;90+PTX"


def refuse(why: str) -> NoReturn:
    """End the build with one line."""
    raise SystemExit(f"error: {why}")


def variable(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """Return the value of an environment variable, or refuse it."""
    value = os.environ.get(name) or default
    if value not in allowed:
        refuse(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def sources(pattern: str) -> list[str]:
    """Return the files under csrc, relative to the root, so that a moved tree stays built."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def output_of(*command: str) -> str:
    """Return what a tool prints, its errors included."""
    run = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if run.returncode:
        refuse(f"{shlex.join(command)} failed: {run.stdout.strip()}; {WITHOUT}")
    return run.stdout


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: CXX, or the first of the usual names."""
    given = os.environ.get("CXX")
    for command in [given] if given else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    tried = f"CXX={given}, which is not there" if given else "none of c++, g++, clang++ is there"
    refuse(
        f"eqcvt needs a C++17 compiler ({tried}): install one (Debian, Ubuntu: apt install g++) "
        f"or name it in CXX; {WITHOUT}"
    )


def instruction_sets(compiler: list[str]) -> dict[str, list[str]]:
    """Return what to compile CPU kernels for: names and options, as far as the compiler knows."""
    if not re.search(r"(x86_64|amd64)$", sysconfig.get_platform()):
        return {"portable": []}
    command = [*compiler, *X86["amx"], "-x", "c++", "-c", "-", "-o", os.devnull]
    program = "#include <immintrin.h>\nvoid f() { _tile_release(); }\n"  # for the assembler too
    knows = not subprocess.run(command, input=program, text=True, capture_output=True).returncode
    return {isa: options for isa, options in X86.items() if knows or isa != "amx"}


def find_ninja() -> str:
    """Return the path of ninja: that of the build requirement, or the system's."""
    if importlib.util.find_spec("ninja"):
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    found = shutil.which("ninja")
    if not found:
        refuse(f"eqcvt is built with ninja: pip install ninja; {WITHOUT}")
    return found


def find_nvcc() -> str | None:
    """Return the path of nvcc if EQCVT_CUDA asks for CUDA, or leaves it open and nvcc is there."""
    wish = variable("EQCVT_CUDA", "auto", ("auto", "0", "1"))
    if wish == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in [*(os.path.join(home, "bin") for home in homes), None]:
        nvcc = shutil.which("nvcc", path=folder)
        if nvcc:
            return nvcc
    if wish == "1":
        refuse(
            "EQCVT_CUDA=1 asks for CUDA, and there is no nvcc in CUDA_HOME, CUDA_PATH or PATH: "
            "install the CUDA toolkit, or build for the CPU only with EQCVT_CUDA=0"
        )
    return None


def cuda_archs(nvcc: str) -> tuple[str, list[str]]:
    """Return the architectures that EQCVT_CUDA_ARCHS names and nvcc's options for them."""
    given = os.environ.get("EQCVT_CUDA_ARCHS") or CUDA_ARCHS
    known = set(re.findall(r"compute_(\w+)", output_of(nvcc, "--list-gpu-arch")))
    options: dict[str, None] = {}
    items = re.split(r"[;,\s]+", given.strip("; ,\t\n"))
    for item in items:
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if not match:
            refuse(
                f'EQCVT_CUDA_ARCHS must be a list such as "{CUDA_ARCHS}" or "8.0 9.0+PTX", '
                f"got {given!r}, where {item!r} is no architecture"
            )
        base, arch = "".join(match.group(1, 2)), "".join(match.group(1, 2, 3))
        if base not in known:
            names = ", ".join(sorted(known, key=lambda name: (len(name), name)))
            refuse(f"EQCVT_CUDA_ARCHS names {item!r}, and {nvcc} knows only {names}")
        options[f"-gencode=arch=compute_{arch},code=sm_{arch}"] = None
        if match.group(4):
            options[f"-gencode=arch=compute_{arch},code=compute_{arch}"] = None
    return ";".join(items), list(options)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make two builds in one tree take turns."""
    import fcntl

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Ninja:
    """The text of a build.ninja, whose paths are relative to the root."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lines = [
            f"builddir = {folder}",
            "rule compile\n  command = $command\n  description = compile $out\n"
            "  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $command\n  description = link $out",
        ]

    def compile(self, source: str, command: list[str], kind: str = "", depend: str = "-MD") -> str:
        """Add a compilation and return its object."""
        target = f"{self.folder}/{source.removeprefix('csrc/')}{kind and '.' + kind}.o"
        words = [*command, depend, "-MF", f"{target}.d", "-c", source, "-o", target]
        self._add("compile", target, [source], words)
        return target

    def link(self, target: str, inputs: list[str], command: list[str]) -> None:
        """Add the link."""
        self._add("link", target, inputs, command)

    def _add(self, rule: str, target: str, inputs: list[str], command: list[str]) -> None:
        paths = [re.sub(r"([$ :])", r"$\1", path) for path in [target, *inputs]]
        text = shlex.join(command).replace("$", "$$")
        self.lines.append(f"build {paths[0]}: {rule} {' '.join(paths[1:])}\n  command = {text}")

    def run(self) -> None:
        """Build what is out of date, on MAX_JOBS or all cores."""
        file = ROOT / self.folder / "build.ninja"
        file.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS") or str(usable_cores())
        command = [find_ninja(), "-f", str(file), "-j", jobs]
        if subprocess.run(command, cwd=ROOT).returncode:
            refuse(f"the native extension did not compile, as said above; {WITHOUT}")


def usable_cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BuildNative(build_ext):
    """Builds ``eqcvt._native`` with ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link."""
        if os.name == "nt":
            refuse(f"the native extension is for Linux and macOS; {WITHOUT}")
        include = sysconfig.get_paths()["include"]
        if not Path(include, "Python.h").exists():
            refuse(
                f"{include} has no Python.h: install Python's headers (Debian, Ubuntu: "
                f"apt install python3-dev); {WITHOUT}"
            )
        folder = f"build/native-{sysconfig.get_config_var('SOABI')}"
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        with alone(ROOT / folder):
            built = self.build_in(folder, include)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(built, target)

    def build_in(self, folder: str, include: str) -> Path:
        """Build the extension in ``folder`` and return its path."""
        import pybind11

        compiler = find_compiler()
        nvcc = find_nvcc()
        ninja = Ninja(folder)
        sets = instruction_sets(compiler)
        base = [*compiler, *OPTIONS.split(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        defines = [f"-DEQCVT_X86={int('avx2' in sets)}", f"-DEQCVT_AMX={int('amx' in sets)}"]
        link = ["-shared", "-pthread"]
        if sysconfig.get_platform().startswith("macosx"):
            link = ["-bundle", "-undefined", "dynamic_lookup"]
        objects = [
            ninja.compile(source, [*base, *flags, f"-DEQCVT_ISA={isa}"], isa)
            for isa, flags in sets.items()
            for source in sources("cpu/*.cpp")
            if source != PARALLEL and (isa, source) != ("amx", NOT_AMX)
        ]
        if nvcc:
            archs, options = cuda_archs(nvcc)
            version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))
            defines += [f"-DEQCVT_CUDA={version and version[1]}", f"-DEQCVT_CUDA_ARCHS={archs}"]
            if os.environ.get("CXX"):
                options += ["-ccbin", compiler[-1]]
            command = [nvcc, *NVCC_OPTIONS.split(), "--threads", str(len(options)), *options]
            objects += [ninja.compile(source, command) for source in sources("cuda/*.cu")]
            # The runtime is linked in, and hidden from torch's own.
            tried = output_of(nvcc, "--dryrun", "-c", "csrc/cuda/error.cu")
            libraries = re.search(r"LIBRARIES=(.*)", tried)
            link += shlex.split(libraries[1]) if libraries else []
            link += ["-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
        defines += [f"-DEQCVT_VERSION={self.distribution.get_version()}"]
        # pip has pybind11 in a new folder at each build. Were that named in the command, or in what
        # the file depends on (-MMD leaves these out), every install would compile it again. A
        # CPATH would come before it.
        defines += [f"-DEQCVT_PYBIND11={pybind11.__version__}"]
        given = [os.environ.pop(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH")]
        paths = [pybind11.get_include(), include, *given]
        os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(filter(None, paths))
        objects.append(ninja.compile(BINDINGS, [*base, *defines], depend="-MMD"))
        objects.append(ninja.compile(PARALLEL, base))
        target = f"{folder}/_native.so"
        flags = shlex.split(os.environ.get("LDFLAGS", ""))
        ninja.link(target, objects, [*compiler, "-o", target, *objects, *link, *flags])
        ninja.run()
        return ROOT / target


class EditableWheel(editable_wheel):
    """An editable install without the extension leaves none of an earlier one behind."""

    def run(self) -> None:
        if not self.distribution.ext_modules:
            for old in (ROOT / "eqcvt").glob("_native.*"):
                old.unlink()
        super().run()


if __name__ == "__main__":
    wanted = variable("EQCVT_NATIVE", "1", ("0", "1")) == "1"
    setup(
        ext_modules=[Extension("eqcvt._native", [])] if wanted else [],
        cmdclass={"build_ext": BuildNative, "editable_wheel": EditableWheel},
    )
