"""Every code block of README.md and docs/ runs.

A page's blocks run in order, in a folder of their own: Python blocks in one namespace, shell blocks in bash with
.venv/bin on PATH. Comments on the line above a block's fence change that:

    <!-- file: net.py -->          the block is saved under this name instead of run
    <!-- not run: why -->          the block is skipped, and the reason shown
    <!-- needs: timm -->           the block is skipped where that package is missing, and a test shown as skipped
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("bash", "sh", "console", "shell")
BLOCK_S = 300
"""A block that takes longer than this hangs: the slowest page is meant to take a minute."""

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>\S*)")
MARKER = re.compile(r"^ *<!-- (?P<kind>file|not run|needs): (?P<value>.+?) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: the 1-based line of its first line of code, and what its marker asks for."""

    language: str
    code: str
    line: int
    file: str | None
    not_run: str | None
    needs: str | None


def find_blocks(text: str) -> list[Block]:
    """Return the Python and shell blocks of a page; raises ValueError on a fence that never closes."""
    lines = text.splitlines()
    blocks: list[Block] = []
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence is None:
            at += 1
            continue
        closing = fence["indent"] + fence["ticks"]
        end = next((i for i in range(at + 1, len(lines)) if lines[i].rstrip() == closing), None)
        if end is None:
            raise ValueError(f"the fence in line {at + 1} never closes")
        marker = MARKER.match(next((line for line in reversed(lines[:at]) if line.strip()), ""))
        values = {marker["kind"]: marker["value"]} if marker else {}
        code = "\n".join(line.removeprefix(fence["indent"]) for line in lines[at + 1 : end]) + "\n"
        if fence["language"] in ("python", "py", *SHELLS):
            marks = (values.get(kind) for kind in ("file", "not run", "needs"))
            blocks.append(Block(fence["language"], code, at + 2, *marks))
        at = end + 1
    return blocks


def find_commands(block: Block) -> str:
    """Return what to type: in a console block the lines after `$ `, and lines that go on with a backslash."""
    if block.language != "console":
        return block.code
    typed, goes_on = [], False
    for line in block.code.splitlines():
        if goes_on or line.startswith("$ "):
            typed.append(line if goes_on else line[2:])
            goes_on = line.endswith("\\")
    return "\n".join(typed) + "\n"


def run_page(page: Path, folder: Path) -> list[str]:
    """Run a page's blocks in `folder`; return the reasons of those that are not run."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    skipped = []
    for block in find_blocks(page.read_text()):
        where = f"{page.name}:{block.line}"
        if block.not_run is not None:
            skipped.append(f"{where} {block.not_run}")
        elif block.needs is not None and importlib.util.find_spec(block.needs) is None:
            skipped.append(f"{where} needs {block.needs}")
        elif block.file is not None:
            (folder / block.file).write_text(block.code)
        elif block.language in SHELLS:
            _run_shell(find_commands(block), folder, where)
        else:
            # The empty lines make a traceback point at the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with redirect_stdout(io.StringIO()):
                exec(code, namespace)
    return skipped


def _run_shell(commands: str, folder: Path, where: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BLOCK_S,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{where} ended with {done.returncode}:\n{commands}\n{done.stdout}\n{done.stderr}", pytrace=False)


def _pages() -> list[object]:
    names = {page: str(page.relative_to(ROOT)) for page in PAGES}
    return [pytest.param(page, id=names[page]) for page in PAGES if find_blocks(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", _pages())
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    skipped = run_page(page, tmp_path)
    if skipped and len(skipped) == len(find_blocks(page.read_text())):
        pytest.skip("; ".join(skipped))


def test_few_blocks_are_left_out() -> None:
    """What is not run says why; installing and the demos are all that may be."""
    left_out = {
        f"{page.name}:{b.line}": b.not_run for page in PAGES for b in find_blocks(page.read_text()) if b.not_run
    }
    assert len(left_out) <= 3, left_out


def _needed() -> dict[str, list[str]]:
    """Name the blocks that need each package."""
    needed: dict[str, list[str]] = {}
    for page in PAGES:
        for block in find_blocks(page.read_text()):
            if block.needs is not None:
                needed.setdefault(block.needs, []).append(f"{page.name}:{block.line}")
    return needed


@pytest.mark.parametrize(("package", "blocks"), _needed().items())
def test_packages_that_blocks_need_are_here(package: str, blocks: list[str]) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, so these blocks do not run: {', '.join(blocks)}")


def _write(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_a_broken_block_is_found(tmp_path: Path) -> None:
    with pytest.raises(NameError):
        run_page(_write(tmp_path, "```python\nx = 1\n```\n\n```python\ny = x + z\n```\n"), tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:2 ended with 1"):
        run_page(_write(tmp_path, "```bash\nfalse\ntrue\n```\n"), tmp_path)
    with pytest.raises(ValueError, match="line 1"):
        run_page(_write(tmp_path, "```python\nx = 1\n"), tmp_path)


def test_blocks_share_what_they_should(tmp_path: Path) -> None:
    text = (
        "<!-- file: made.txt -->\n```python\none\n```\n- item\n\n  ```console\n  $ cp made.txt \\\n      copy.txt\n"
        "  output\n  ```\n```python\nfound = __import__('pathlib').Path('copy.txt')\n```\n"
        "<!-- not run: it would fail -->\n```python\nraise SystemExit\n```\n"
    )
    page = _write(tmp_path, text)
    assert [b.line for b in find_blocks(text)] == [3, 8, 13, 17]
    assert run_page(page, tmp_path) == ["page.md:17 it would fail"]
    assert (tmp_path / "copy.txt").read_text() == "one\n"


def test_a_block_runs_where_what_it_needs_is_installed(tmp_path: Path) -> None:
    text = (
        "<!-- needs: torch -->\n```python\nseen = [1]\n```\n<!-- needs: no_such_package -->\n"
        "```python\nseen = 1 / 0\n```\n```python\nassert seen == [1]\n```\n"
    )
    page = _write(tmp_path, text)
    assert run_page(page, tmp_path) == ["page.md:7 needs no_such_package"]
