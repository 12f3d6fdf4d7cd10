"""The public names: sorted, present, explained, and in the reference."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import jettison

ROOT = Path(__file__).parents[2]


def test_all_is_sorted_and_without_repeats() -> None:
    assert list(jettison.__all__) == sorted(set(jettison.__all__))


def test_every_public_name_resolves_and_is_listed_by_dir() -> None:
    missing = [name for name in jettison.__all__ if not hasattr(jettison, name)]
    assert not missing
    assert set(jettison.__all__) <= set(dir(jettison))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="compres"):
        jettison.compres  # noqa: B018


def test_every_public_name_has_a_docstring() -> None:
    values = {name: getattr(jettison, name) for name in jettison.__all__ if not name.startswith("__")}
    bare = [name for name, value in values.items() if callable(value) and not (value.__doc__ or "").strip()]
    generated = [
        name
        for name, value in values.items()
        # A dataclass without a docstring is given its signature as one.
        if inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")
    ]
    assert not bare + generated


def test_every_public_name_is_in_the_reference() -> None:
    sections = _reference().sort_names(jettison)
    shown = [name for names in sections.values() for name in names]
    assert sorted(shown) == sorted(name for name in jettison.__all__ if not name.startswith("__"))


def test_the_reference_leaves_nothing_out_silently() -> None:
    """A value that is neither function, class nor error still gets a section."""
    module = ModuleType("planted")
    module.__all__ = ["LIMIT", "act"]  # type: ignore[attr-defined]
    module.LIMIT, module.act = 3, len  # type: ignore[attr-defined]
    assert _reference().sort_names(module) == {"Functions": ["act"], "Values": ["LIMIT"]}


def _reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("public_names", ROOT / "docs" / "_ext" / "public_names.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
