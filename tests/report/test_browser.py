"""The page in a real Chromium: quiet, alone, readable, never wider than the screen, in light and in dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jettison.report.html import render_html

from .test_html import RECORDS

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="No Chromium is installed: apt-get install chromium"),
]

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SCREENS = {"desktop": (1280, 900), "phone": (390, 844), "small": (360, 640)}

# WCAG 2.2 AA: 4.5, and 3.0 for text from 24 px on. The background is the nearest ancestor's that has one.
CONTRAST = """() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = text => channels(text).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const clear = text => channels(text)[3] === 0;
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, svg = element.closest('svg');
    if (!node.data.trim() || ['title', 'desc', 'STYLE'].includes(element.tagName)) continue;
    const style = getComputedStyle(element), color = svg ? style.fill : style.color;
    let under = element;
    while (under && clear(getComputedStyle(under).backgroundColor)) under = under.parentElement;
    const light = [luminance(color), luminance(getComputedStyle(under).backgroundColor)].sort((a, b) => b - a);
    const ratio = (light[0] + 0.05) / (light[1] + 0.05);
    seen += 1;
    const least = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    if (ratio < least) bad.push(node.data.trim().slice(0, 40) + ' ' + ratio.toFixed(2));
  }
  return [seen, bad];
}"""
BOXES = """() => [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect())
  .filter(r => !(r.width > 0 && r.height > 0)).length"""
WIDTHS = "() => [document.scrollingElement.scrollWidth, innerWidth]"
OUTSIDE = """() => [...document.querySelectorAll('svg.plot text')].filter(t => {
  const r = t.getBoundingClientRect(); return r.left < 0 || r.right > innerWidth; }).map(t => t.textContent)"""


@dataclass
class Visit:
    """An open page and all it said and asked for."""

    page: Any
    messages: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests; Playwright gives each launch a new, empty profile."""
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        yield running
        running.close()


def visit(browser: Any, path: Path, screen: str, scheme: str) -> Visit:
    """Open the file and write down console messages, errors and requests."""
    width, height = SCREENS[screen]
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    found = Visit(page, [], [])
    page.on("console", lambda message: found.messages.append(message.text))
    page.on("pageerror", lambda error: found.messages.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.as_uri())
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All records drawn once."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in RECORDS}
    for name, path in paths.items():
        path.write_text(render_html(RECORDS[name]()), encoding="utf-8")
    return paths


LOOKS = [("example", screen, scheme) for screen in SCREENS for scheme in ("light", "dark")]
LOOKS += [(name, *look) for name in RECORDS if name != "example" for look in (("desktop", "dark"), ("small", "light"))]


@pytest.mark.parametrize(("name", "screen", "scheme"), LOOKS)
def test_page(browser: Any, pages: dict[str, Path], name: str, screen: str, scheme: str) -> None:
    opened = visit(browser, pages[name], screen, scheme)
    page = opened.page
    assert opened.messages == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.locator("h1").is_visible()
    assert page.locator("h1").bounding_box()["y"] < SCREENS[screen][1]
    width, inner = page.evaluate(WIDTHS)
    assert width <= inner
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
    width, inner = page.evaluate(WIDTHS)
    assert width <= inner
    assert page.evaluate(BOXES) == 0
    if name != "hostile":
        assert page.evaluate(OUTSIDE) == []
    seen, bad = page.evaluate(CONTRAST)
    assert seen > 30 and bad == []
    assert page.evaluate("() => window.alert.toString()").find("native code") > 0
    page.context.close()


def test_dark_is_dark(browser: Any, pages: dict[str, Path]) -> None:
    look = "() => getComputedStyle(document.body).backgroundColor"
    assert visit(browser, pages["example"], "desktop", "light").page.evaluate(look) == "rgb(251, 250, 247)"
    assert visit(browser, pages["example"], "desktop", "dark").page.evaluate(look) == "rgb(18, 19, 22)"


def test_bars_are_as_long_as_their_numbers(browser: Any, pages: dict[str, Path]) -> None:
    """Drawn widths of the MACs bars against the Record: half a pixel for rounding of percentages."""
    record = RECORDS["example"]()
    page = visit(browser, pages["example"], "desktop", "light").page
    widths = page.evaluate(
        "() => [...document.querySelectorAll('.chart:nth-child(3) rect')].map(r => r.getBoundingClientRect().width)"
    )
    most = max(v.macs for v in record.variants)
    full = max(widths)
    assert len(widths) == len(record.variants)
    for drawn, variant in zip(widths, record.variants, strict=True):
        assert abs(drawn - full * variant.macs / most) < 0.5


@pytest.mark.parametrize(
    ("find", "plant", "caught"),
    [
        ("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1>', "requests"),
        ("<h1>", f"<p class='num'>{'x' * 900}</p><h1>", "width"),
        ("--soft: #5f6065", "--soft: #bbbbbb", "messages"),
        ('width="100%" height="320"', 'width="0" height="320"', "boxes"),
    ],
)
def test_planted_mistakes_are_caught(
    browser: Any, pages: dict[str, Path], tmp_path: Path, find: str, plant: str, caught: str
) -> None:
    text = pages["example"].read_text(encoding="utf-8")
    assert find in text
    path = tmp_path / "planted.html"
    path.write_text(text.replace(find, plant, 1), encoding="utf-8")
    opened = visit(browser, path, "phone", "light")
    width, inner = opened.page.evaluate(WIDTHS)
    alarms = {
        "messages": opened.messages != [],
        "requests": any(url.startswith("http") for url in opened.requests),
        "width": width > inner,
        "boxes": opened.page.evaluate(BOXES) > 0,
    }
    assert alarms[caught]
    if caught == "requests":
        # The page wanted to ask, and its policy did not let it.
        assert any("Content Security Policy" in message for message in opened.messages)


def test_contrast_check_can_fail(browser: Any, pages: dict[str, Path]) -> None:
    page = visit(browser, pages["example"], "desktop", "light").page
    page.evaluate("() => document.documentElement.style.setProperty('--soft', '#999999')")
    assert page.evaluate(CONTRAST)[1]
