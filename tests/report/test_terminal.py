"""The terminal's table says the page's essentials, at any width, in pipes, without colour."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from jettison.core.record import Record
from jettison.report.terminal import print_table

from . import example
from .test_html import RECORDS


def draw(record: Record, width: int = 80, encoding: str = "utf-8") -> str:
    """What lands in a pipe of that encoding."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    print_table(record, Console(file=file, width=width))
    return raw.getvalue().decode(encoding)


def test_essentials_at_80_columns() -> None:
    text = draw(example.make_example())
    words = " ".join(text.split())
    numbers = ("runs 5.18× faster", "3.41 ms", "0.551×", "5.04–5.31", "139 kB", "12.9 M", "93.11 %", "10 000 samples")
    verdicts = ("at most 0.69 points", "The budget was met.", "19.3 % of at most 25 %", "All 4 checks passed.")
    for said in (*numbers, *verdicts, "File: model.onnx"):
        assert said in words
    assert "…" not in text and "\x1b" not in text


def test_failures_stand_in_the_terminal() -> None:
    words = " ".join(draw(example.make_failed()).split())
    for said in ("The budget was missed.", *example.make_failed().unmet, "Do not deploy", "FAILED masked = sliced"):
        assert said in words


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("width", [30, 76, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_nothing_is_cut_or_breaks(name: str, width: int, encoding: str) -> None:
    text = draw(RECORDS[name](), width, encoding)
    assert "…" not in text and "\x1b" not in text and "\x00" not in text
    assert max(map(len, text.splitlines())) <= width
    if name in ("example", "huge"):
        assert "0.363 ms" in text and "139 kB" in text


def test_markup_in_names_is_text() -> None:
    text = draw(replace(example.make_example(), model="[bold]net[/bold]"))
    assert "[bold]net[/bold]" in text
