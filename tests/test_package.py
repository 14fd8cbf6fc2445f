"""What a built sdist and wheel carry, from a copy of the checkout so that it stays clean."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.native.settings import same_settings

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["eqcvt", "kernels", "csrc", "tests", "bench", "examples"]
FILES = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"]
PROBE = "probe_for_the_package_test.py"


def _build(tree: Path, *what: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *what, str(tree)],
        capture_output=True,
        text=True,
        env={**os.environ, **same_settings()},
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Path]:
    """Build sdist and, from the sdist, wheel; return the sdist's members and the wheel's path."""
    tree = tmp_path_factory.mktemp("tree")
    leave = shutil.ignore_patterns("__pycache__", "results", "*.so")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=leave)
    for name in [*FILES, "constraints.txt"]:
        shutil.copy(ROOT / name, tree)
    (tree / "kernels" / PROBE).write_text("BLOCK = 64\n")
    (tree / "csrc" / "cpu" / "probe.h").write_text("")
    _build(tree, "--sdist")
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [m.name for m in archive.getmembers() if m.issym()]
        members = {m.name.split("/", 1)[1] for m in archive.getmembers() if "/" in m.name}
        archive.extractall(tree, filter="data")
    unpacked = tree / sdist.name.removesuffix(".tar.gz")
    # With the checkout's objects beside the same sources, only what changed is compiled.
    for objects in ROOT.glob("build/native-*"):
        shutil.copytree(objects, unpacked / "build" / objects.name)
    _build(unpacked, "--wheel")
    (wheel,) = (unpacked / "dist").glob("*.whl")
    return members, wheel


def _modules() -> set[str]:
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "eqcvt").rglob("*.py")}
    return files | {f"eqcvt/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}


def _data() -> set[str]:
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "eqcvt" / "weights").glob("*/*")}
    tables = {f"eqcvt/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.json")}
    return files | tables | {"eqcvt/py.typed"}


def test_wheel_holds_every_module_and_nothing_else(built: tuple[set[str], Path]) -> None:
    names = {n for n in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in n}
    pure = same_settings()["EQCVT_NATIVE"] == "0"
    extension = set() if pure else {f"eqcvt/_native{sysconfig.get_config_var('EXT_SUFFIX')}"}
    assert names == _modules() | _data() | {f"eqcvt/kernels/{PROBE}"} | extension
    assert built[1].name.endswith("-none-any.whl") == pure


def test_wheel_carries_licence_command_and_metadata(built: tuple[set[str], Path]) -> None:
    archive = zipfile.ZipFile(built[1])
    (info,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
    licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert licence.startswith("MIT License")
    assert "Copyright (c) 2026 The EqCvT authors" in licence
    assert "eqcvt = eqcvt.cli:app" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    needs = metadata.get_all("Requires-Dist") or []
    always = [need for need in needs if "extra ==" not in need]
    assert "torch>=2.11" in always
    assert not [need for need in always if need.startswith(("escnn", "einops", "caustics", "onnx"))]


def test_sdist_holds_what_a_build_needs_and_no_tests(built: tuple[set[str], Path]) -> None:
    members = built[0]
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wanted = _modules() | _data() | native | set(FILES) | {f"eqcvt/kernels/{PROBE}"}
    assert wanted | {"csrc/cpu/probe.h"} <= members
    assert {m.split("/")[0] for m in members}.isdisjoint({"tests", "bench", "examples", "kernels"})


def test_kernels_is_a_relative_link_and_no_package() -> None:
    link = ROOT / "eqcvt" / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_version_is_the_same_in_code_and_metadata(built: tuple[set[str], Path]) -> None:
    import eqcvt

    if eqcvt.__version__ == "0+unknown":
        pytest.skip("eqcvt runs from a source tree that is not installed")
    assert built[1].name.split("-")[1] == eqcvt.__version__
