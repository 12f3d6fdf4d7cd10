"""One self-contained HTML page from a Record: no script, no request, nothing but text, CSS and inline SVG."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.core.plain import write_bytes
from jettison.core.record import Record
from jettison.report import findings, numbers, plots

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

HERE = Path(__file__).parent
SHOWN = 24
"""A list longer than this shows its weightiest entries and folds the whole away."""


def render_html(record: Record) -> str:
    """Draw the record as one HTML page; strings of the record are escaped, control characters replaced."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    group_plots, group_axis = plots.plot_groups(record)
    curves = {p.name: p for p in group_plots}
    groups = plots.pick_largest(record.groups, SHOWN, lambda g: g.before - g.after)
    operators = plots.plot_operators(record)
    view: dict[str, Any] = {
        "record": record,
        "style": style,
        "style_hash": f"sha256-{digest}",
        "sentence": findings.describe_result(record),
        "verdict": findings.describe_verdict(record),
        "checked": findings.describe_checks(record),
        "failed": findings.list_failed(record),
        "figures": findings.list_figures(record),
        "limits": findings.list_limits(record),
        "before": findings.find_variant(record, record.baseline),
        "after": findings.find_variant(record, record.compressed),
        "charts": plots.plot_variants(record),
        "front": plots.plot_front(record),
        "group_axis": group_axis,
        "group_plots": group_plots,
        "shown_plots": [curves[g.name] for g in groups if g.name in curves],
        "widths": plots.make_pairs([(g.name, g.before, g.after, i) for i, g in enumerate(record.groups)]),
        "shown_widths": {g.name for g in groups},
        "layer_macs": plots.make_pairs([(x.name, x.macs_before, x.macs_after, i) for i, x in enumerate(record.layers)]),
        "shown_layers": {x.name for x in plots.pick_largest(record.layers, SHOWN, lambda x: x.macs_before)},
        "sqnr_top": max([60.0, *(x.sqnr_db for x in record.layers if x.sqnr_db is not None)]),
        "operators": operators,
        "time_top": max((p.before for p in operators), default=0.0) or max((p.after for p in operators), default=0.0),
        "slowest_before": plots.list_slowest(record.time_before),
        "slowest_after": plots.list_slowest(record.time_after),
        "untouched": sum(g.before == g.after for g in record.groups),
        "stages": plots.make_pairs([(s.name, s.seconds, 0.0, 1) for s in record.stages]),
        "many": SHOWN,
    }
    return str(make_environment().get_template("page.html.jinja").render(view))


def write_html(record: Record, path: Path) -> Path:
    """Write the page in one step and return its path; raises StorageError where it cannot be written."""
    write_bytes(render_html(record).encode("utf-8", "replace"), path)
    return path


def make_environment() -> Environment:
    """Jinja with escaping on everywhere, an error on every unknown name, and our number formats as filters."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize_text,
    )
    environment.filters.update(
        data=mark_data,
        bytes=numbers.format_bytes,
        count=numbers.format_count,
        macs=numbers.format_macs,
        ms=numbers.format_ms,
        seconds=numbers.format_seconds,
        number=numbers.format_number,
        share=numbers.format_share,
        whole=lambda value: numbers.format_fixed(value, 0),
        even=numbers.format_even,
        date=numbers.format_date,
        interval=numbers.format_interval,
    )
    return environment


def finalize_text(value: object) -> object:
    """Make control characters of plain strings visible; what is already markup is ours."""
    return numbers.make_visible(value) if type(value) is str else value


def mark_data(value: float, text: str) -> Markup:
    """`text` with the exact value beside it for machines, as HTML's data element."""
    from markupsafe import Markup

    return Markup('<data value="{}">{}</data>').format(repr(value), text)
