"""Docstrings reach the reference as they read in the source."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

EXTENSION = Path(__file__).parents[2] / "docs" / "_ext" / "plain_docstrings.py"


@pytest.fixture(scope="module")
def to_rst() -> Callable[[list[str]], list[str]]:
    spec = importlib.util.spec_from_file_location("plain_docstrings", EXTENSION)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[list[str]], list[str]] = module.to_rst
    return found


def test_markup_is_taken_literally_outside_code(to_rst: Callable[[list[str]], list[str]]) -> None:
    assert to_rst(["shape (B, *) and `a*b`, |x|, fit_ and a_b"]) == [
        "shape (B, \\*) and `a*b`, \\|x\\|, fit\\_ and a_b"
    ]
    assert to_rst(["* one", "* two*"]) == ["* one", "* two\\*"]


def test_an_indented_block_keeps_its_lines(to_rst: Callable[[list[str]], list[str]]) -> None:
    lines = ["Tree:", "", "    a*", "", "    └── b", "", "Then *", "    goes on", ""]
    assert to_rst(lines) == [*lines[:2], "::", "", *lines[2:6], "Then \\*", "    goes on", ""]
