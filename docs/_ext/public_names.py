"""Which public names the reference shows, and under which heading; needs no Sphinx, so tests can read it."""

from __future__ import annotations

import inspect
from types import ModuleType

STAGES = {
    "All at once": ("compress", "prune", "load", "accuracy"),
    "Decide": ("trace", "profile", "sensitivity", "plan", "choose_bits"),
    "Do": ("apply", "recover", "quantize", "train_quantized", "export"),
    "Prove": ("measure", "verify", "diagnose"),
}
"""The functions by what they are for; a function that stands in none of these is shown under Functions."""


def sort_names(module: ModuleType) -> dict[str, list[str]]:
    """Return the names in `module.__all__` (dunders left out) by heading, in the order the page shows them."""
    known = [name for name in module.__all__ if not name.startswith("__")]
    sections = {heading: [name for name in names if name in known] for heading, names in STAGES.items()}
    placed = {name for names in sections.values() for name in names}
    sections |= {"Functions": [], "Classes": [], "Errors": [], "Values": []}
    for name in known:
        if name in placed:
            continue
        value = getattr(module, name)
        if inspect.isclass(value):
            sections["Errors" if issubclass(value, Exception) else "Classes"].append(name)
        else:
            sections["Functions" if callable(value) else "Values"].append(name)
    return {heading: names for heading, names in sections.items() if names}
