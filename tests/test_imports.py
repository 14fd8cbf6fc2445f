"""The direction of imports, and what `import eqcvt` loads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eqcvt

PACKAGE = Path(__file__).resolve().parents[1] / "eqcvt"
TOP = "eqcvt"

# kernels <- ops <- nn <- models <- train <- cli: a part imports its own and lower levels only.
LEVEL = {
    "kernels": 0,
    "_check": 0,
    "_files": 0,
    "_machine": 0,
    "groups": 1,
    "native": 1,
    "ops": 2,
    "nn": 3,
    "models": 4,
    "convert": 5,
    "fast": 5,
    TOP: 6,
    "data": 6,
    "train": 7,
    "plots": 8,
    "predict": 8,
    "report": 8,
    "export": 8,
    "doctor": 8,
    "tune": 8,
    "demo": 8,
    "cli": 9,
    "__main__": 10,
}
# The data know nothing of the networks, and a kernel nothing of anything.
ONLY = {"kernels": {"kernels"}, "data": {"data", "_check", "_files", "_machine"}}
HEAVY = {
    *("astropy", "caustics", "matplotlib", "torchmetrics", "lightning_utilities", "typer", "rich"),
    *("onnx", "onnxruntime", "onnxscript", "tensorboard", "triton", "escnn", "einops", "sklearn"),
    *("lenstronomy", "scipy", "PIL", "tomli_w"),
}
# Not every Python follows the link to the kernels.
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")})


def part_of(path: Path) -> str:
    """Return the part of the package that a file belongs to; the package's own __init__ is TOP."""
    inner = path.relative_to(PACKAGE)
    name = inner.parts[0] if len(inner.parts) > 1 else inner.stem
    return TOP if name == "__init__" else name


def imported_parts(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, part) for each import from the package, those inside functions included."""
    package = [TOP, *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        for target in targets:
            if target[0] == TOP:
                named = len(target) > 1 and _is_part(target[1])
                yield node.lineno, target[1] if named else TOP


def _is_part(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def violations(path: Path, source: str) -> list[str]:
    """Return what the imports of one file break."""
    own = part_of(path)
    found = []
    for line, part in imported_parts(path, ast.parse(source)):
        unplaced = {own, part} - set(LEVEL)
        if unplaced:
            found.append(f"say in LEVEL where {', '.join(sorted(unplaced))} belongs")
        elif (
            LEVEL[part] > LEVEL[own]
            or (own == TOP and LEVEL[part] == LEVEL[TOP])
            or part not in ONLY.get(own, LEVEL)
        ):
            found.append(f"{path.name}:{line}: {own} imports {part}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/eqcvt.py", "from ..train import loop"),
        ("models/eqcvt.py", "def f():\n    from eqcvt.data import load"),
        ("data/loader.py", "import eqcvt.ops"),
        ("data/loader.py", "from eqcvt import EqCvT"),
        ("nn/lift.py", "from eqcvt import models"),
        ("ops/lift.py", "from eqcvt import EqCvT"),
        ("kernels/lift.py", "from eqcvt import _check"),
        ("train/loop.py", "from .. import cli"),
        ("__init__.py", "from . import train"),
        ("__init__.py", "def load():\n    from . import data"),
        ("newcomer.py", "from . import ops"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str) -> None:
    assert len(violations(PACKAGE / file, source)) == 1


def _at_module_level(tree: ast.Module) -> Iterator[str]:
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_needs_escnn_or_einops(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert {"escnn", "einops"}.isdisjoint(_at_module_level(tree))


def _fresh(code: str) -> dict[str, list[str]]:
    """Run code in a fresh interpreter and read the JSON that it prints."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, list[str]] = json.loads(run.stdout)
    return result


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What `import eqcvt` loads beside torch, numpy, safetensors and huggingface_hub."""
    return _fresh(
        "import json, sys\n"
        "import torch, numpy, safetensors.torch, huggingface_hub\n"
        "before = set(sys.modules)\n"
        "import eqcvt\n"
        "print(json.dumps({'new': sorted(set(sys.modules) - before),\n"
        "    'all': sorted(sys.modules),\n"
        "    'touched': ['cuda'] * torch.cuda.is_initialized()}))\n"
    )


def test_import_loads_nothing_heavy(loaded: dict[str, list[str]]) -> None:
    new = {name.split(".")[0] for name in loaded["new"]}
    assert new.isdisjoint(HEAVY)


def test_import_leaves_upper_parts_alone(loaded: dict[str, list[str]]) -> None:
    parts = {name.split(".")[1] for name in loaded["all"] if name.startswith(f"{TOP}.")}
    assert {part for part in parts if LEVEL[part] >= LEVEL[TOP]} == set()
    assert not [name for name in loaded["all"] if name.startswith(f"{TOP}.kernels")]


def test_import_touches_no_gpu_and_compiles_nothing(loaded: dict[str, list[str]]) -> None:
    assert loaded["touched"] == []
    compilers = ("torch._inductor.compile_fx", "torch._inductor.async_compile", "triton.compiler")
    assert set(loaded["new"]).isdisjoint(compilers)


def test_parts_are_imported_when_they_are_asked_for() -> None:
    names = ("data", "export", "plots", "predict", "report", "train", "tune")
    found = _fresh(
        "import eqcvt, json, sys\n"
        "before = [n for n in sys.modules if n.startswith('eqcvt.')]\n"
        f"parts = [getattr(eqcvt, name).__name__ for name in {names}]\n"
        "print(json.dumps({'before': before, 'parts': parts, 'dir': dir(eqcvt)}))\n"
    )
    parts = [f"eqcvt.{name}" for name in names]
    assert found["parts"] == parts
    assert set(parts).isdisjoint(found["before"])
    assert set(names) < set(found["dir"])
    with pytest.raises(AttributeError, match="module 'eqcvt' has no attribute 'trian'"):
        eqcvt.trian  # noqa: B018
