"""Limits on the source itself: sizes, names, what core may import, and the import layers."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "jettison"
FILE_LINES = 450
FUNCTION_LINES = 80
README_LINES = 120
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}


def _sources(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def _long_files(root: Path) -> list[str]:
    sizes = {path: len(path.read_text().splitlines()) for path in _sources(root)}
    return [f"{path.relative_to(root)}: {lines} lines" for path, lines in sizes.items() if lines > FILE_LINES]


def _long_functions(root: Path) -> list[str]:
    found = []
    for path in _sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{path.relative_to(root)}:{node.lineno} {node.name}: {lines} lines")
    return found


def _foreign_imports(root: Path) -> list[str]:
    """Return the imports under `root` that are neither the standard library nor jettison.core."""
    found = []
    for path in _sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = ["." * node.level + (node.module or "")]
            else:
                continue
            for name in names:
                own = name == "jettison.core" or name.startswith("jettison.core.")
                if not own and name.split(".")[0] not in sys.stdlib_module_names:
                    found.append(f"{path.relative_to(root)}:{node.lineno} {name}")
    return found


def test_files_are_short() -> None:
    assert not _long_files(PACKAGE)


def test_functions_are_short() -> None:
    assert not _long_functions(PACKAGE)


def test_core_imports_the_standard_library_only() -> None:
    assert not _foreign_imports(PACKAGE / "core")


def test_the_limits_see_what_breaks_them(tmp_path: Path) -> None:
    body = "".join(f"    x = {i}\n" for i in range(FILE_LINES))
    (tmp_path / "long.py").write_text(f"import torch\nfrom jettison.flow import run\nimport json\ndef f():\n{body}")
    assert _long_files(tmp_path) == ["long.py: 454 lines"]
    assert _long_functions(tmp_path) == ["long.py:4 f: 451 lines"]
    assert _foreign_imports(tmp_path) == ["long.py:1 torch", "long.py:2 jettison.flow"]


def test_modules_are_named_for_what_they_hold() -> None:
    parts = {path: set(path.relative_to(PACKAGE).with_suffix("").parts) for path in _sources(PACKAGE)}
    assert not [str(path) for path, names in parts.items() if names & SAYS_NOTHING]


def test_every_room_says_what_it_holds() -> None:
    bare = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.glob("*/__init__.py")
        if len(ast.get_docstring(ast.parse(path.read_text())) or "") < 40
    ]
    assert not bare


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package whose imports may be spoilt; the working folder comes first on lint-imports' path."""
    shutil.copytree(PACKAGE, tmp_path / "jettison", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_down(copied: Path) -> None:
    done = _lint_imports(copied)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/budget.py", "from jettison import flow"),
        ("graph/__init__.py", "import jettison.cost"),
        ("pruning/__init__.py", "import jettison.quantization"),
        ("graph/__init__.py", "import jettison.testing"),
        ("stray.py", "import jettison.core"),
    ],
    ids=["up", "one up", "sideways", "testing", "room without a place"],
)
def test_a_planted_import_is_found(copied: Path, file: str, line: str) -> None:
    path = copied / "jettison" / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    done = _lint_imports(copied)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout or "stray" in done.stdout + done.stderr, done.stdout
