"""The page's essentials as a plain table in the terminal: no number cut short, no colour needed to understand it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jettison.core.record import Record, Variant
from jettison.report.findings import (
    describe_bound,
    describe_checks,
    describe_result,
    describe_verdict,
    find_variant,
    list_failed,
    list_limits,
)
from jettison.report.numbers import (
    SPACE,
    THIN,
    UNKNOWN,
    format_bytes,
    format_count,
    format_interval,
    format_number,
    format_points,
    format_share,
    make_visible,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NARROW = 76
"""Below this many columns the table would break its numbers; variants are then listed one below the other."""
ASCII = {"×": "x", "–": "-", "−": "-", "≤": "<=", "∞": "inf", "→": "->", SPACE: " ", THIN: " ", "�": "?"}
"""What stands for our own signs where the terminal cannot show them."""
PLAIN_SPACES = str.maketrans({SPACE: " ", THIN: " "})
EXPONENTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
COLUMNS = ("latency", "speed-up", "file", "MACs", "score")


def print_table(record: Record, console: Console) -> None:
    """Print the result, the variants, the budget, the checks and the files; works in pipes and without colour."""
    narrow = console.width < NARROW
    say(console, f"{record.model or 'Unnamed network'} for {record.target or 'an unknown target'}", "dim")
    say(console, describe_result(record), "bold")
    console.print()
    if not record.variants:
        say(console, "No variant was measured, so there is nothing to compare.")
    elif narrow:
        for variant in record.variants:
            print_variant(record, variant, console)
    else:
        console.print(make_table(record, console))
        say(console, "Below latency: 10 to 90 %. Below speed-up: 95 % confidence interval.", "dim")
    console.print()
    drop = record.drop
    verb = "gained" if drop.points < 0 else "lost"
    points = format_points(abs(drop.points), drop.n)
    say(console, f"{drop.metric}: {points} points {verb}, {describe_bound(drop)}")
    console.print()
    print_budget(record, console)
    console.print()
    print_checks(record, console)
    console.print()
    after = find_variant(record, record.compressed)
    if after is not None and after.file is not None:
        say(console, f"File: {after.file}")


def fit_text(text: str, console: Console) -> str:
    """`text` without control characters, and without signs that the terminal's encoding lacks."""
    text = make_visible(text)
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        for sign, plain in ASCII.items():
            text = text.replace(sign, plain)
        text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda m: f"^{m[0].translate(EXPONENTS)}", text)
        text = text.encode("ascii", "backslashreplace").decode("ascii")
    return text


def say(console: Console, text: str, style: str = "", indent: int = 0) -> None:
    """Print one paragraph as plain text: no markup, no highlighting, words wrapped, long names folded."""
    from rich.text import Text

    # Wrapped here and not by rich's Padding, which would fill each line with spaces: pipes want none.
    for line in Text(fit_text(text, console), style=style).wrap(console, console.width - indent, overflow="fold"):
        # Plain spaces only now, so that no line breaks between a number and its unit, and grep still finds both.
        plain = line.plain.rstrip().translate(PLAIN_SPACES)
        console.print(Text(" " * indent + plain, style=style), no_wrap=True, crop=False)


def list_cells(record: Record, variant: Variant) -> tuple[tuple[str, str], ...]:
    """A variant's values in the order of COLUMNS, each with its second line."""
    latency, spread = format_interval(variant.latency_ms, f"{SPACE}ms")
    speedup, ends = format_interval(variant.speedup, "×")
    score = variant.score
    return (
        (latency, spread.replace(" to ", "–")),
        (speedup, "baseline" if variant.name == record.baseline else ends.replace(" to ", "–")),
        (UNKNOWN if variant.size_bytes is None else format_bytes(variant.size_bytes), ""),
        (format_count(variant.macs), ""),
        (UNKNOWN if score is None else format_share(score.value, score.n), "" if score is None else score.metric),
    )


def make_table(record: Record, console: Console) -> Table:
    """All variants; names fold, numbers never do."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, safe_box=True)
    table.add_column("variant", overflow="fold", min_width=12)
    for name in COLUMNS[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    # Below the score stands the metric, a name that may be of any length.
    table.add_column(COLUMNS[-1], justify="right", overflow="fold", min_width=9, max_width=10)
    for variant in record.variants:
        style = "bold" if variant.name == record.compressed else ""
        cells = []
        title = (variant.name, f"{variant.runtime} {variant.precision}")
        for first, second in (title, *list_cells(record, variant)):
            cell = Text(fit_text(first, console).translate(PLAIN_SPACES), style=style)
            cell.append(fit_text(f"\n{second}", console) if second else "", style="dim not bold")
            cells.append(cell)
        table.add_row(*cells)
    return table


def print_variant(record: Record, variant: Variant, console: Console) -> None:
    """One variant as lines, for narrow terminals."""
    style = "bold" if variant.name == record.compressed else ""
    say(console, f"{variant.name} ({variant.runtime} {variant.precision})", style)
    for name, (first, second) in zip(COLUMNS, list_cells(record, variant), strict=True):
        say(console, f"{name:9} {first}{f'  ({second})' if second else ''}", indent=2)


def print_budget(record: Record, console: Console) -> None:
    """The verdict, what was missed, and each limit beside what was reached."""
    say(console, describe_verdict(record), "" if record.met else "bold red")
    for line in record.unmet:
        say(console, f"- {line}", "red", indent=2)
    for limit in list_limits(record):
        relation = "above the limit of" if limit.over else "of at most"
        say(console, f"{limit.label}: {limit.reached_text} {relation} {limit.limit_text}", indent=2)


def print_checks(record: Record, console: Console) -> None:
    """The verdict on the checks and one line for each, the failed ones first."""
    failed = list_failed(record)
    say(console, describe_checks(record), "bold red" if failed else "")
    for check in sorted(record.checks, key=lambda c: c.passed):
        value, tolerance = format_number(check.value, 2), format_number(check.tolerance, 2)
        state = "passed" if check.passed else "FAILED"
        relation = "of at most" if check.passed else "against an allowed"
        say(console, f"{state}  {check.name}: {value} {relation} {tolerance}", "" if check.passed else "red", indent=2)
