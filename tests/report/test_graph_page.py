"""The drawing of a network: it says what `explain` found, stays alone and quiet, and answers to mouse and keys."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from jettison.core.errors import StorageError
from jettison.core.record import FrozenPart
from jettison.graph.analyse import Member
from jettison.graph.explain import Coupled, Explanation, Mark, Row, Shares, Side, Unknown, Worth, explain
from jettison.graph.groups import trace
from jettison.report.graph_page import format_share, group_frozen, place_lanes, render_graph, write_graph
from jettison.testing import build_model

from .example import HOSTILE, LONG, RTL
from .test_browser import BOXES, CHROMIUM, CONTRAST, FLAGS, SCREENS, WIDTHS, visit
from .test_html import Page

torch.set_num_threads(1)


@cache
def make(name: str) -> Explanation:
    makers = {"big": make_big, "hostile": make_hostile, "empty": make_empty}
    return makers[name]() if name in makers else explain(trace(*build_model(name)))


def make_big() -> Explanation:
    """300 groups in 600 layers, a trunk that all of them leave and join, and an operator without a rule."""
    worth = Worth(Shares(0.01, 0.02), Shares(0.005, 0.01), Shares(0.009, 0.018))
    groups, rows = [], []
    for i in range(300):
        name = f"stage{i // 60}.blocks.{i}.mlp.fc1" if i else "stem"
        members = tuple(Member(f"{name}.part{k}.weight", k % 2) for k in range(2 if i else 600))
        groups.append(Coupled(name, 64 + i, bool(i % 7), (name, f"{name}.out"), members, worth))
        sides = (Side(64, (i,), ""), Side(32, (0,), ""), Side(3, (), "an input of the network"))
        marks = (Mark(0, "reads"), Mark(i, "makes")) if i else (Mark(0, "makes"),)
        back = (Mark(0, "makes"), Mark(i, "reads")) if i else (Mark(0, "keeps"),)
        rows.append(Row(name, "linear", "net.py:1", sides, marks, ("norm",), "", 10_000 + i, 2_500, 90, 30))
        rows.append(Row(f"{name}.out", "linear", "net.py:2", sides[:2], back, (), "", 10_000, 2_500, 90, 30))
    reason = "an operator without a rule: aten.strange"
    rows.insert(9, Row("stage0.strange", "strange", "net.py:9", (), (), (), reason, 0, 0, 0, 0))
    return replace(
        make("residual"),
        groups=tuple(groups),
        rows=tuple(rows),
        opaque=(Unknown("aten.strange", "net.py:9", reason, 2),),
        frozen=tuple(FrozenPart(f"layer{i}.weight (dimension 0)", "an input of the network", "") for i in range(40)),
    )


def make_hostile() -> Explanation:
    """Every string is an attack, or endless, or written from right to left."""
    bad = f"{HOSTILE} {RTL} \x1b[31m\x00"
    found = make("attention")
    return replace(
        found,
        shapes={bad: (2, 3)},
        groups=tuple(
            replace(g, name=f"{bad}.{i}", layers=(bad,), members=(Member(bad, 0), Member(LONG, 1)))
            for i, g in enumerate(found.groups)
        ),
        rows=tuple(
            replace(r, name=bad if i % 2 else LONG, operator=bad, where=bad, along=(bad, LONG), opaque=bad * (i == 3))
            for i, r in enumerate(found.rows)
        ),
        frozen=(FrozenPart(bad, bad, bad), FrozenPart(LONG, LONG, LONG)),
        opaque=(Unknown(bad, bad, bad, 2), Unknown(LONG, LONG, LONG, 1)),
    )


def make_empty() -> Explanation:
    return replace(make("residual"), macs=0, parameters=0, batch=2, groups=(), rows=(), frozen=(), opaque=())


NAMES = ("residual", "attention", "dense", "big", "hostile", "empty")


@pytest.mark.parametrize("name", NAMES)
def test_page_is_whole_and_alone(name: str) -> None:
    text = render_graph(make(name), name)
    script = text[text.index("<script>") + 8 : text.rindex("</script>")]
    page = Page(text.replace(script, ""))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert not {"iframe", "object", "embed", "img", "form", "base", "use", "image", "foreignobject"} & set(tags)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "style", "action", "xlink:href", "background"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
        assert attributes.get("href", "data:,") == "data:,"
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    assert not re.search(r"url\(|@import|http", style)
    assert not re.search(r"http|fetch|import|innerHTML|eval", script)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    for kind, content in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["residual", "attention", "dense", "big"])
def test_everything_is_on_the_page(name: str) -> None:
    found = make(name)
    page = Page(re.sub("(?s)<script>.*</script>", "", render_graph(found, name)))
    said = "\n".join(page.texts)
    for group in found.groups:
        for member in group.members:
            assert f"{member.tensor}:{member.dim}" in said
    for part in found.frozen:
        assert part.reason in said and part.what in said and part.where in said
    for unknown in found.opaque:
        assert unknown.operator in said and unknown.where in said
    values = [value for value, _ in page.data]
    worth = found.worth
    assert values[:3] == [worth.half.macs, worth.half.parameters, float(len(found.groups))]
    for group in found.groups:
        assert {float(group.size), group.worth.touched.macs, group.worth.half.parameters} <= set(values)
    rows = [a for tag, a in page.tags if tag == "li" and "data-row" in a]
    assert [set(a["data-g"].split()) for a in rows] == [{str(m.group) for m in r.marks} for r in found.rows]


@pytest.mark.parametrize("name", ["residual", "attention", "dense", "shuffle", "big"])
def test_lanes_never_lie_on_each_other(name: str) -> None:
    found = make(name)
    lanes = place_lanes(found)
    assert sorted(lane.group for lane in lanes) == list(range(len(found.groups)))
    assert find_overlaps(found) == 0
    for lane in lanes:
        marks = [i for i, row in enumerate(found.rows) if lane.group in {m.group for m in row.marks}]
        assert [stop.row for stop in lane.stops] == marks
    assert max(lane.lane for lane in lanes) < 8


def find_overlaps(found: Explanation, shift: int = 0) -> int:
    taken: set[tuple[int, int]] = set()
    overlaps = 0
    for lane in place_lanes(found):
        cells = {(lane.lane * (shift == 0), row) for row in range(lane.stops[0].row, lane.stops[-1].row + 1)}
        overlaps += len(cells & taken)
        taken |= cells
    return overlaps


def test_lanes_in_one_place_are_caught() -> None:
    assert find_overlaps(make("residual"), shift=1) > 0


def test_frozen_parts_are_told_once_for_each_reason() -> None:
    held = group_frozen([FrozenPart("a", "x", "1"), FrozenPart("b", "y", ""), FrozenPart("c", "x", "1")])
    assert [(h.reason, h.where, h.what) for h in held] == [("x", "1", ("a", "c")), ("y", "", ("b",))]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50.0 %"), (0.0004, "< 0.1 %"), (0.99999, "> 99.9 %"), (0.1234, "12.3 %")],
)
def test_shares_claim_neither_nothing_nor_all(share: float, text: str) -> None:
    assert format_share(share).replace("\u00a0", " ") == text


def test_write(tmp_path: Path) -> None:
    assert write_graph(make("residual"), tmp_path / "a.html", "net").read_text().startswith("<!doctype html>")
    with pytest.raises(StorageError):
        write_graph(make("residual"), tmp_path)


playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="No Chromium is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_graph(make(name), folder / f"{name}.html", name) for name in NAMES}


LOOKS = [("attention", screen, scheme) for screen in SCREENS for scheme in ("light", "dark")]
LOOKS += [(name, *look) for name in NAMES[2:] for look in (("desktop", "dark"), ("small", "light"))]


class TestBrowser:
    pytestmark = in_browser

    @pytest.mark.parametrize(("name", "screen", "scheme"), LOOKS)
    def test_page(self, browser: Any, pages: dict[str, Path], name: str, screen: str, scheme: str) -> None:
        opened = visit(browser, pages[name], screen, scheme)
        page = opened.page
        assert opened.messages == []
        assert [url for url in opened.requests if not url.startswith("data:")] == [pages[name].as_uri()]
        assert page.locator("h1").bounding_box()["y"] < SCREENS[screen][1]
        for opening in (False, True):
            if opening:
                page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
            width, inner = page.evaluate(WIDTHS)
            assert width <= inner
        seen, bad = page.evaluate(CONTRAST)
        assert seen > 30 and bad == []
        assert page.evaluate("() => window.alert.toString()").find("native code") > 0
        page.context.close()

    def test_bars_have_a_size(self, browser: Any, pages: dict[str, Path]) -> None:
        assert visit(browser, pages["attention"], "desktop", "light").page.evaluate(BOXES) == 0

    def test_pointing_shows_every_member_of_a_group(self, browser: Any, pages: dict[str, Path]) -> None:
        found, page = make("residual"), visit(browser, pages["residual"], "desktop", "light").page
        trunk = next(i for i, g in enumerate(found.groups) if g.name == "stem")
        lit = "() => [...document.querySelectorAll('.rows > li.on')].map(r => Number(r.dataset.row))"
        page.locator(f".dims .swatch[data-g='{trunk}']").first.hover()
        expected = [i for i, row in enumerate(found.rows) if trunk in {m.group for m in row.marks}]
        assert page.evaluate(lit) == expected
        assert page.locator("#shown").is_visible()
        assert "stem" in page.locator("#shown").inner_text()
        drawn = page.evaluate("() => [...document.querySelectorAll('.lane.on')].map(r => Number(r.dataset.g))")
        assert drawn == [trunk, trunk]
        page.mouse.move(1, 1)
        assert page.evaluate(lit) == []
        # Beside a line, not on it: three pixels off still hit.
        line = f"() => document.querySelector(\".sky .lane[data-g='{trunk}'] .hit\").getBoundingClientRect()"
        box = page.evaluate(line)
        page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + 3)
        assert page.evaluate(lit) == expected
        page.mouse.move(1, 1)
        assert page.evaluate(lit) == []
        assert not page.locator("#shown").is_visible()

    def test_taps_walk_through_the_groups_of_a_layer(self, browser: Any, pages: dict[str, Path]) -> None:
        found, page = make("residual"), visit(browser, pages["residual"], "phone", "light").page
        row = next(i for i, r in enumerate(found.rows) if len(r.marks) == 2)
        layer, name = page.locator(f".rows > li[data-row='{row}']"), page.locator("#shown .name")
        seen = []
        for _ in range(2):
            layer.click()
            seen.append(name.inner_text())
        assert seen == [found.groups[m.group].name for m in found.rows[row].marks]
        page.locator("#shown [data-do=members]").click()
        assert page.locator(".groups tr.on details").get_attribute("open") is not None
        page.keyboard.press("Escape")
        assert not page.locator("#shown").is_visible()

    def test_keys_alone_reach_everything(self, browser: Any, pages: dict[str, Path]) -> None:
        page = visit(browser, pages["big"], "desktop", "light").page
        at = "() => document.activeElement.closest('[data-row]')?.dataset.row ?? document.activeElement.id"
        page.keyboard.press("Tab")
        assert page.evaluate(at) == "0"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("PageDown")
        assert page.evaluate(at) == "11"
        assert page.locator("#shown").is_visible()
        page.keyboard.press("Enter")
        assert page.locator("#shown .name").inner_text() == "stem"
        page.keyboard.press("End")
        assert page.evaluate(at) == str(len(make("big").rows) - 1)
        page.keyboard.press("Tab")
        assert page.evaluate(at) == "find"

    def test_search_and_order(self, browser: Any, pages: dict[str, Path]) -> None:
        page = visit(browser, pages["big"], "desktop", "light").page
        page.locator("#find").fill("stage2 fc1")
        assert page.locator(".find output").inner_text() == "60 of 300"
        assert page.locator(".groups tbody tr:visible").count() == 60
        page.locator("#find").fill("part1.weight:1 blocks.299.")
        assert page.locator(".groups tbody tr:visible").count() == 1
        page.locator("#find").fill("")
        page.get_by_role("button", name="Positions").click()
        assert page.locator(".groups tbody tr").first.get_attribute("data-size") == "363"
        assert page.locator("th[aria-sort=descending]").inner_text().startswith("Positions")

    def test_a_request_is_noticed(self, browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
        text = pages["residual"].read_text(encoding="utf-8")
        planted = text.replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1>', 1)
        (tmp_path / "planted.html").write_text(planted, encoding="utf-8")
        opened = visit(browser, tmp_path / "planted.html", "phone", "light")
        assert any("Content Security Policy" in message for message in opened.messages)

    def test_a_changed_script_does_not_run(self, browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
        text = pages["residual"].read_text(encoding="utf-8").replace('"use strict";', '"use strict"; ', 1)
        (tmp_path / "planted.html").write_text(text, encoding="utf-8")
        opened = visit(browser, tmp_path / "planted.html", "desktop", "light")
        assert opened.messages
        assert not opened.page.locator("#find").is_visible()
