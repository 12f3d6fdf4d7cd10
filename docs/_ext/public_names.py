"""Which public names the reference shows, and under which heading; needs no Sphinx, so tests can read it."""

from __future__ import annotations

import inspect
from types import ModuleType


def sort_names(module: ModuleType) -> dict[str, list[str]]:
    """Return the names in `module.__all__` (dunders left out) by heading, in the order the page shows them."""
    sections: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": [], "Values": []}
    for name in module.__all__:
        if name.startswith("__"):
            continue
        value = getattr(module, name)
        if inspect.isclass(value):
            sections["Errors" if issubclass(value, Exception) else "Classes"].append(name)
        else:
            sections["Functions" if callable(value) else "Values"].append(name)
    return {heading: names for heading, names in sections.items() if names}
