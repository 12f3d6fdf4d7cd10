"""What the caller can spend: the limits a compressed network must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from jettison.core.errors import InputError

RELATIVE = ("latency", "size", "macs")
"""The limits that are shares of the original's value."""


@dataclass(frozen=True)
class Budget:
    """Limits, each optional: shares of the original, absolute values, and the accuracy that may be lost.

    `latency`, `size` and `macs` are shares in (0, 1] of the fp32 original's value on the same target;
    `latency_ms`, `size_mb` (10⁶ bytes) and `mmacs` (10⁶ MACs) are absolute.
    `drop` is in points: 1.0 is one percentage point of the metric. Raises InputError on values out of range.
    """

    latency: float | None = None
    size: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    size_mb: float | None = None
    mmacs: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits nobody can mean."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"Budget {field.name}={value!r} is not a number. Give a number, or leave it out.")
            if field.name in RELATIVE and not 0 < value <= 1:
                raise InputError(
                    f"Budget {field.name}={value} is a share of the original and must be in (0, 1]. "
                    f"For an absolute limit use latency_ms, size_mb or mmacs."
                )
            if value < 0 or (value == 0 and field.name != "drop"):
                raise InputError(f"Budget {field.name}={value} must be positive.")
        if all(getattr(self, f.name) is None for f in fields(self)):
            raise InputError("The budget is empty. Say what must be met, for example Budget(latency=0.5, drop=1.0).")
