"""A diagnosis as a table in the terminal and as one self-contained page."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.plain import write_bytes
from jettison.quantization.diagnose import Diagnosis, TensorLoss
from jettison.report.html import HERE, make_environment
from jettison.report.numbers import SPACE, UNKNOWN, format_fixed, format_number
from jettison.report.terminal import NARROW, PLAIN_SPACES, fit_text, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = 12
"""Tensors listed before the rest is only counted."""
WIDTH = 110
COLUMNS = ("gain", "share", "output", "alone", "all before")
LEGEND = (
    "gain: loss given back when this tensor alone stays float; share: of the whole loss; output: what its signal-to-"
    "noise ratio gains; alone, all before: that ratio at the tensor with only it, or all up to it, rounded."
)


def draw_diagnosis(found: Diagnosis, *, every: bool = False) -> str:
    """Return what `print_diagnosis` prints on a console without colour."""
    from rich.console import Console

    text = io.StringIO()
    print_diagnosis(found, Console(file=text, width=WIDTH, color_system=None), every=every)
    return text.getvalue().rstrip("\n")


def print_diagnosis(found: Diagnosis, console: Console, *, every: bool = False) -> None:
    """Print the verdict, the costliest tensors and, for those that raise an alarm, the cause and the remedy."""
    say(console, found.verdict, "bold" if found.healthy else "bold red")
    say(console, describe_whole(found), "dim")
    alarms = [row for row in found.tensors if row.alarm]
    for row in alarms[:SHOWN]:
        console.print()
        say(console, f"{row.tensor}: {format_part(row.share)} of the loss", "bold")
        for cause in row.causes:
            say(console, cause.words, indent=2)
        for text in list_remedies(row):
            say(console, f"-> {text}", indent=2)
    shown = found.tensors if every else found.tensors[: max(SHOWN, len(alarms))]
    if not shown:
        say(console, "No tensor of this network is quantized.")
        return
    console.print()
    if console.width < NARROW:
        for row in shown:
            say(console, row.tensor, "bold" if row.alarm else "")
            for name, cell in zip(COLUMNS, list_cells(row), strict=True):
                say(console, f"{name:11} {cell}", indent=2)
    else:
        console.print(make_table(shown, console))
    if len(shown) < len(found.tensors):
        say(console, f"... and {len(found.tensors) - len(shown)} more that cost less.", "dim")
    say(console, LEGEND, "dim")


def make_table(rows: tuple[TensorLoss, ...], console: Console) -> Table:
    """One line for each tensor; names fold, numbers never do."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, safe_box=True)
    table.add_column("", no_wrap=True)
    table.add_column("tensor", overflow="fold", min_width=16)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = (fit_text(cell, console).translate(PLAIN_SPACES) for cell in list_cells(row))
        table.add_row(
            "!" if row.alarm else "", fit_text(row.tensor, console), *cells, style="bold" if row.alarm else ""
        )
    return table


def list_cells(row: TensorLoss) -> tuple[str, ...]:
    """A tensor's values in the order of COLUMNS."""
    sign = "+" if row.gain_db > 0 else ""
    return (
        format_number(row.gain, 2),
        format_part(row.share),
        f"{sign}{format_fixed(row.gain_db, 1)}{SPACE}dB",
        format_decibels(row.local_db),
        format_decibels(row.cumulative_db),
    )


def list_remedies(row: TensorLoss) -> tuple[str, ...]:
    """What mends a tensor, each once, the first cause's remedy first."""
    stated = dict.fromkeys(cause.remedy for cause in row.causes)
    keep = f"exclude={list(row.exclude)!r} keeps it in float"
    return tuple(stated) or ((keep,) if row.exclude else ())


def describe_whole(found: Diagnosis) -> str:
    """The whole network's loss in one line."""
    parts = [f"loss {format_number(found.loss)}", f"output {format_decibels(found.output_db)}"]
    if found.agreement is not None:
        parts.append(f"largest score agrees on {format_fixed(100 * found.agreement, 1)}{SPACE}%")
    return f"{', '.join(parts)}, on {found.samples} samples, {len(found.tensors)} quantized tensors".translate(
        PLAIN_SPACES
    )


def format_decibels(value: float | None) -> str:
    """A ratio in dB; None is a tensor without noise."""
    return "no noise" if value is None else f"{format_fixed(value, 1)}{SPACE}dB"


def format_part(share: float) -> str:
    """A share of the loss in whole percent; what is next to nothing, or less, as a dash."""
    return f"{format_fixed(100 * share, 0)}{SPACE}%" if share >= 0.005 else UNKNOWN


def render_diagnosis(found: Diagnosis, name: str = "") -> str:
    """Draw the page; `name` is the network's. Strings are escaped, control characters replaced."""
    style = (HERE / "page.css").read_text(encoding="utf-8") + (HERE / "diagnosis.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    most = max((row.gain for row in found.tensors), default=0.0)
    view: dict[str, Any] = {
        "found": found,
        "name": name,
        "style": style,
        "style_hash": f"sha256-{digest}",
        "alarms": [row for row in found.tensors if row.alarm],
        "remedies": {row.tensor: list_remedies(row) for row in found.tensors},
        "cells": {row.tensor: list_cells(row) for row in found.tensors},
        "bars": {row.tensor: round(100 * max(0.0, row.gain) / most, 2) if most > 0 else 0.0 for row in found.tensors},
        "whole": describe_whole(found),
        "legend": LEGEND,
        "columns": COLUMNS,
    }
    environment = make_environment()
    environment.filters.update(part=format_part)
    return str(environment.get_template("diagnosis.html.jinja").render(view))


def write_diagnosis(found: Diagnosis, path: Path, name: str = "") -> Path:
    """Write the page in one step and return its path; raises StorageError where it cannot be written."""
    write_bytes(render_diagnosis(found, name).encode("utf-8", "replace"), path)
    return path
