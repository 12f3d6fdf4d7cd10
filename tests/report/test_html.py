"""The page says what the Record says, escapes everything, and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jettison.core.errors import StorageError
from jettison.core.plain import to_plain
from jettison.core.record import Record
from jettison.report.findings import compare_sizes, describe_result, list_limits
from jettison.report.html import render_html, write_html

from . import example

RECORDS = {
    name: getattr(example, f"make_{name}") for name in ("example", "failed", "empty", "sparse", "huge", "hostile")
}
SECTIONS = ("compare", "front", "sensitivity", "widths", "layers", "time", "checks", "frozen", "notes", "use", "run")
UNITS = {"": 1.0, "ms": 1.0, "×": 1.0, "dB": 1.0, "points": 1.0, "point": 1.0, "s": 1.0, "%": 1e-2}
UNITS |= {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "k": 1e3, "M": 1e6, "G": 1e9}
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects tags, data elements, headings and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.data: list[tuple[float, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.value: float | None = None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.tags.append((tag, found))
        if tag == "data":
            self.value = float(found["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.texts.append(data)
        if self.value is not None:
            self.data.append((self.value, data))
            self.value = None


def collect_numbers(value: object) -> Iterator[float]:
    """All numbers of plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from collect_numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def derive_numbers(record: Record) -> Iterator[float]:
    """Numbers the page computes: the size ratio, what the limits reached, and sums of times."""
    ratio = compare_sizes(record)
    if ratio:
        yield from (ratio, 1 / ratio)
    yield from (limit.reached for limit in list_limits(record) if limit.reached is not None)
    sides = (record.time_before, record.time_after)
    names = {s.operator for side in sides for s in side}
    sums = {name: [sum(s.ms for s in side if s.operator == name) for side in sides] for name in names}
    yield from (x for pair in sums.values() for x in pair)
    if len(sums) > 10:
        rest = sorted(sums.values(), key=max)[: len(sums) - 9]
        yield from (sum(pair[side] for pair in rest) for side in (0, 1))
    for shares in sides:
        yield sum(s.ms for s in shares)
        yield sum(s.ms for s in sorted(shares, key=lambda s: -s.ms)[8:])


def read_text(text: str) -> tuple[float, float] | None:
    """The number a text shows and half a unit of its last digit; None for words such as 2 min 3 s."""
    match = re.fullmatch(r"(−?)([\d\u202f]+)(\.\d+)?(?:\u00a0×\u00a010([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?[\u00a0 ]?([^\d ]*)", text)
    if match is None or match[5] not in UNITS:
        return None
    exponent = int((match[4] or "⁰").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    scale = UNITS[match[5]] * 10.0**exponent
    number = float(match[2].replace("\u202f", "") + (match[3] or ""))
    return (-number if match[1] else number) * scale, 0.5 * 10.0 ** -len((match[3] or ".")[1:]) * scale


@pytest.mark.parametrize("name", RECORDS)
def test_page_is_whole_and_alone(name: str) -> None:
    text = render_html(RECORDS[name]())
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {
            "script",
            "iframe",
            "object",
            "embed",
            "img",
            "form",
            "base",
            "use",
            "image",
            "foreignobject",
        }
        for key, value in attributes.items():
            assert not key.startswith("on") and key not in {
                "src",
                "srcset",
                "style",
                "action",
                "xlink:href",
                "background",
            }
            assert key != "href" or value == "data:,"
    css = text[text.index("<style>") + 7 : text.index("</style>")]
    assert "url(" not in css and "@import" not in css and "http" not in css
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"style-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("name", RECORDS)
def test_every_section_has_a_heading_and_says_something(name: str) -> None:
    text = render_html(RECORDS[name]())
    assert text.count("<h1>") == 1
    for section in SECTIONS:
        assert f'<section id="{section}" aria-labelledby="{section}-title">' in text
        assert re.search(rf'<h2 id="{section}-title">\w', text)
    for body in re.findall(r'<div class="body">(.*?)</section>', text, re.DOTALL):
        assert re.sub(r"<[^>]+>|\s", "", body)
    assert text.count("<table") == text.count("<caption>")
    assert "None" not in Page(text).texts


@pytest.mark.parametrize("name", ["example", "failed", "sparse", "huge"])
def test_numbers_shown_are_the_records(name: str) -> None:
    record = RECORDS[name]()
    page = Page(render_html(record))
    known = [*collect_numbers(to_plain(record)), *derive_numbers(record)]
    assert len(page.data) > 50
    for value, text in page.data:
        assert any(math.isclose(value, k, rel_tol=1e-12) for k in known), (value, text)
        shown = read_text(text)
        if shown is not None:
            # A hair above half a unit, because halves are not exact in binary.
            assert abs(shown[0] - value) <= shown[1] * 1.0001 + 1e-12, (value, text)


def test_a_wrong_number_would_be_noticed() -> None:
    page = Page(render_html(example.make_example()).replace(">5.18<", ">5.28<"))
    assert any(s is not None and abs(s[0] - v) > s[1] * 1.0001 for v, s in ((v, read_text(t)) for v, t in page.data))


def test_hostile_strings_stay_text() -> None:
    text = render_html(example.make_hostile())
    assert "<script" not in text and text.count("</style>") == 1
    assert "{{7*7}}" in text
    assert not set(text) & set("\x00\x1b\u202e\u202c")
    assert sum(tag == "title" for tag, _ in Page(text).tags) > 1


def test_headline_says_what_happened() -> None:
    assert describe_result(example.make_example()) == (
        "The compressed network runs 5.18× faster, takes 10.6× less space and loses 0.41 points of accuracy."
    )
    assert "runs slower, at 0.85× the speed, takes 1.16× more space" in describe_result(example.make_failed())
    assert "runs about as fast as before and keeps its agreement" in describe_result(example.make_sparse())
    gained = replace(example.make_example(), drop=replace(example.make_example().drop, points=-0.2))
    assert "gains 0.20 points" in describe_result(gained)


def test_failures_are_never_hidden() -> None:
    record = example.make_failed()
    text = render_html(record)
    top = text[: text.index('<section id="compare"')]
    assert top.count('role="alert"') == 2
    for said in (
        "2 of 3 checks failed. Do not deploy",
        "The budget was missed.",
        "masked = sliced",
        "above the limit of",
    ):
        assert said in top
    for line in record.unmet:
        assert line.replace("'", "&#39;") in top
    assert "The budget was met" not in text
    assert 'role="alert"' not in render_html(example.make_example())


def test_a_record_that_contradicts_itself_is_not_believed() -> None:
    text = render_html(example.make_sparse())
    assert "The record calls the budget met, but a limit was passed." in text and "The budget was met." not in text


def test_long_lists_fold() -> None:
    text = render_html(example.make_huge())
    assert text.count("<details>") == 5
    # 1.5 MB: a page of 300 groups and 200 layers still opens at once on a phone.
    assert len(text) < 1_500_000


def test_same_record_same_page(tmp_path: Path) -> None:
    record = example.make_example()
    path = write_html(record, tmp_path / "run" / "report.html")
    assert path.read_text(encoding="utf-8") == render_html(record)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_unwritable_place_is_one_typed_error(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match="could not be written"):
        write_html(example.make_empty(), tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    record = replace(example.make_example(), model="weights-\udcff.pt")
    assert "weights-�.pt" in write_html(record, tmp_path / "r.html").read_text(encoding="utf-8")
