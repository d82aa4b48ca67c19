"""The house's one rule of structure: imports point down, by the table of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hinny"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(), "verb": set(), "state": {"errors"}, "pattern": {"errors"}, "ops": {"errors"},
    "config": {"errors", "pattern"},
    "counts": {"errors", "config", "pattern"},
    "predict": {"errors", "config", "pattern", "counts"},
    "memory": {"errors", "config", "pattern", "counts"},
    "run": {"errors", "config", "pattern"},
    "tokenizer": {"errors", "config", "pattern"},
    "show": {"errors", "config", "pattern", "counts", "predict", "memory", "verb"},
    "layers": {"errors", "config", "state", "ops"},
    "model": {"errors", "config", "pattern", "state", "layers"},
    "objective": {"state", "ops", "model"},
    "parallel": {"errors", "config", "pattern", "ops", "state", "layers", "model", "objective"},
    "draw": {"errors"},
    "data": {"errors", "config", "tokenizer", "draw"},
    "checkpoint": {"errors", "config", "pattern", "run", "tokenizer", "model", "parallel"},
    "train": {"errors", "config", "counts", "predict", "run", "state", "ops", "model", "objective", "parallel", "data",
              "checkpoint", "verb"},
    "infer": {"errors", "config", "pattern", "counts", "memory", "state", "ops", "layers", "model", "parallel",
              "checkpoint", "tokenizer", "run", "verb"},
    "evals": {"errors", "config", "run", "data", "checkpoint", "infer", "tokenizer"},
    "bench": {"errors", "config", "pattern", "counts", "predict", "memory", "run", "ops", "state", "model", "parallel",
              "checkpoint", "data", "train", "infer", "study", "tokenizer", "verb"},
    "tune": {"errors", "run", "ops", "bench", "verb"},
    "study": {"errors", "config", "pattern", "counts", "predict", "memory", "run", "verb"},
    "progress": set(),
}
"""Room → rooms that it may import. The command line, `cli`, may import any of them."""

NO_TORCH = ["errors", "config", "pattern", "counts", "predict", "memory", "run", "tokenizer", "show", "study",
            "draw", "progress", "cli"]


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hinny":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{file}: relative import; write it from hinny")
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hinny.")}
    return found - {"__version__"}


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    room = _room(file)
    if room in ("cli", "__init__", "__main__"):
        return
    assert room in MAY_IMPORT, f"{room} is a new room: give it a row in MAY_IMPORT and in docs/architecture.md"
    above = _imports(file) - MAY_IMPORT[room] - {room}
    assert not above, f"{file} imports {sorted(above)}, which {room} may not"


def test_the_table_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        ready = [room for room, below in MAY_IMPORT.items() if room not in order and below <= set(order)]
        assert ready, "a cycle among " + ", ".join(set(MAY_IMPORT) - set(order))
        order += ready


@pytest.mark.parametrize("room", NO_TORCH)
def test_planning_and_reporting_need_no_torch(room: str) -> None:
    code = f"import sys, hinny, hinny.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _imports_kernels(nodes: list[ast.stmt]) -> bool:
    """Whether one of these statements, or what is in it, imports a module of hinny.ops.kernels."""
    imported = [name for node in nodes for inner in ast.walk(node) for name in _modules(inner)]
    return any(name.startswith("hinny.ops.kernels") for name in imported)


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_kernels_are_reached_through_the_ops_alone() -> None:
    outside = [f for f in PACKAGE.rglob("*.py") if _room(f) not in ("ops", "bench", "tune")]
    assert not [str(f) for f in outside if _imports_kernels(ast.parse(f.read_text()).body)]


def test_the_ops_import_kernels_only_inside_functions() -> None:
    """What a machine without Triton imports must not need it."""
    def at_the_top(file: Path) -> list[ast.stmt]:
        functions = (ast.FunctionDef, ast.ClassDef)
        return [node for node in ast.parse(file.read_text()).body if not isinstance(node, functions)]

    assert not [f.name for f in (PACKAGE / "ops").glob("*.py") if _imports_kernels(at_the_top(f))]


def test_every_file_keeps_its_size() -> None:
    """A kernel is one long function or two; elsewhere a long file is two nouns in one."""
    def limit(file: Path) -> int:
        return 500 if file.parent.name == "kernels" else 300

    assert not {f.name: n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > limit(f)}
