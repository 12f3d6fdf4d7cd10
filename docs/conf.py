"""Sphinx's settings, and the two directives that write the reference from the code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sort_names = importlib.import_module("public_names").sort_names
to_rst = importlib.import_module("plain_docstrings").to_rst

project = "jettison"
copyright = "2026, the jettison authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = "jettison"
html_static_path = ["_static"]
html_css_files = ["jettison.css"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
add_module_names = False
default_role = "literal"  # docstrings are written with single backticks
python_maximum_signature_line_length = 80


class PublicNames(SphinxDirective):
    """Show every name in `jettison.__all__` with its signature and docstring."""

    def run(self) -> list[nodes.Node]:
        """Write an autodoc directive for each name and let Sphinx expand it."""
        jettison = importlib.import_module("jettison")
        kinds = {"Classes": "autoclass", "Errors": "autoexception", "Values": "autodata"}
        shown: list[nodes.Node] = []
        for heading, names in sort_names(jettison).items():
            section = make_section(heading)
            kind = kinds.get(heading, "autofunction")
            section += self.parse_text_to_nodes("\n".join(f".. {kind}:: jettison.{name}\n" for name in names))
            shown.append(section)
        return shown


class CommandHelp(SphinxDirective):
    """Show each command's own --help text."""

    def run(self) -> list[nodes.Node]:
        """Ask click for the texts, so that page and program say the same."""
        main = importlib.import_module("jettison.cli").main
        top = click.Context(main, info_name="jettison", terminal_width=88, **main.context_settings)
        shown: list[nodes.Node] = [nodes.literal_block(main.get_help(top), main.get_help(top), language="text")]
        for name in sorted(main.commands):
            context = click.Context(main.commands[name], info_name=name, parent=top)
            text = main.commands[name].get_help(context)
            section = make_section(f"jettison {name}")
            section += nodes.literal_block(text, text, language="text")
            shown.append(section)
        return shown


def make_section(title: str) -> nodes.section:
    """Return an empty section with a title and an address of its own."""
    section = nodes.section(ids=[title.lower().replace(" ", "-")])
    section += nodes.title(text=title)
    return section


def rewrite_docstring(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Let Sphinx read plain docstrings."""
    lines[:] = to_rst(lines)


def setup(app: Sphinx) -> None:
    """Add the directives."""
    app.connect("autodoc-process-docstring", rewrite_docstring)
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-help", CommandHelp)
