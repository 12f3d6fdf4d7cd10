"""The pages hold together: links lead somewhere, and every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = LINK.findall(page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_page_is_in_the_contents() -> None:
    contents = (DOCS / "index.md").read_text() + "".join(p.read_text() for p in DOCS.glob("*/index.md"))
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md")}
    missing = [p for p in pages if p.split("/")[-1] not in contents and not p.startswith("decisions/")]
    assert not missing


def test_every_term_of_the_glossary_stands_once_and_in_order() -> None:
    terms = re.findall(r"^\*\*(.+?)\*\*$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 15
    assert [t.lower() for t in terms] == sorted({t.lower() for t in terms})
