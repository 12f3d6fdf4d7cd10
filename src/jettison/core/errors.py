"""Every error a caller can meet, and what it means.

    JettisonError
    ├── InputError            what was given is wrong (also a ValueError; the command line exits with 2)
    │   ├── ShapeError        inputs the network does not take
    │   ├── CalibrationError  no items, or not enough of them, to calibrate with
    │   ├── NonFiniteError    NaN or infinity in weights, inputs or outputs
    │   ├── UnknownName       no model, group, target or criterion of that name (nearest names are given)
    │   └── CheckpointError   a file of weights or a saved run that is corrupt or belongs to something else
    ├── TraceError            torch.export cannot follow the network
    ├── FixedSize             a size written into the network's source stands in the way
    ├── ExportError           the runtime's file could not be made
    ├── TargetMissing         a runtime that is not installed here
    ├── EvaluateError         the caller's `evaluate` raised
    ├── StorageError          a file could not be written (also an OSError)
    ├── VerificationError     an oracle found the result wrong: never deploy it
    └── BudgetError           the budget cannot be met; `.result` holds the best that can

Messages have three sentences: what is wrong, with the value; where; what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class JettisonError(Exception):
    """The root of all errors jettison raises on purpose."""


class InputError(JettisonError, ValueError):
    """Something the caller gave is wrong."""


class ShapeError(InputError):
    """Inputs have a shape or type the network does not take."""


class CalibrationError(InputError):
    """There are no calibration items, or too few."""


class NonFiniteError(InputError):
    """A tensor holds NaN or infinity."""


class UnknownName(InputError):
    """A name nobody answers to."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Say that `name` is no `kind`, with the nearest of `known`."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(names[:12])}."
        super().__init__(f"There is no {kind} named {name!r}. {hint}")


class CheckpointError(InputError):
    """A file of weights or a saved run is corrupt, or belongs to another network."""


class TraceError(JettisonError):
    """torch.export cannot follow the network."""


class FixedSize(JettisonError):
    """A size written into the network's source stands in the way."""


class ExportError(JettisonError):
    """The runtime's file could not be made."""


class TargetMissing(JettisonError):
    """The runtime is not installed on this machine."""


class EvaluateError(JettisonError):
    """The caller's `evaluate` raised; the original error is the `__cause__`."""


class StorageError(JettisonError, OSError):
    """A file could not be written; nothing half-written was kept."""


class VerificationError(JettisonError):
    """An oracle found the result wrong."""


class BudgetError(JettisonError):
    """The budget cannot be met; `result` is the best that was reached, or None where nothing was built."""

    def __init__(self, message: str, result: Any = None) -> None:
        """Carry the message and the best result."""
        super().__init__(message)
        self.result = result
