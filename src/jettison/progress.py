"""Progress bars for whatever takes longer than two seconds; silent in pipes and where switched off."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

_shown: ContextVar[bool] = ContextVar("jettison_progress", default=True)
PATIENCE_S = 2.0
"""A wait shorter than this shows nothing."""


@contextmanager
def show_progress(shown: bool) -> Iterator[None]:
    """Switch progress bars on or off for the calls inside the `with` block."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def announce(what: str) -> Iterator[None]:
    """Show a spinner with `what` on stderr while the `with` block runs."""
    if not (_shown.get() and sys.stderr.isatty()):
        yield
        return
    with _open_console().status(what):
        yield


@cache
def _open_console() -> Console:
    """Return the one console: rich nests a bar below a spinner only where both share it."""
    from rich.console import Console

    return Console(stderr=True)


def track(items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
    """Yield `items`, drawing a bar on stderr once the wait has lasted two seconds."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not (_shown.get() and sys.stderr.isatty()):
        yield from items
        return
    from rich.progress import Progress

    start = time.monotonic()
    with Progress(console=_open_console(), transient=True) as bar:
        task = bar.add_task(what, total=total, visible=False)
        for item in items:
            yield item
            bar.update(task, advance=1, visible=time.monotonic() - start > PATIENCE_S)
