"""Docstrings are plain text: `code` in backticks, indented blocks as they stand. Sphinx wants more."""

from __future__ import annotations

import re

CODE = re.compile(r"(`+[^`]+`+)")
MARKUP = re.compile(r"([*|\\]|_\b|\b_)")


def to_rst(lines: list[str]) -> list[str]:
    """Return `lines` so that Sphinx shows them as a reader of the source sees them."""
    shown: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not literal and (not shown or not shown[-1].strip()):
            shown += ["::", ""]
            literal = True
        elif line.strip() and not indented:
            literal = False
        shown.append(line if literal else _escape(line))
    return shown


def _escape(line: str) -> str:
    """Take the meaning from characters that reStructuredText reads as markup, outside code."""
    bullet = re.match(r"\s*\* ", line)
    start = bullet.end() if bullet else 0
    parts = CODE.split(line[start:])
    return line[:start] + "".join(p if p.startswith("`") else MARKUP.sub(r"\\\1", p) for p in parts)
