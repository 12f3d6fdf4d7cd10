"""What measuring every target on one network came to: the options, the recommended one, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jettison.core.errors import UnknownName
from jettison.core.record import Interval


@dataclass(frozen=True)
class Option:
    """One target and precision, measured.

    `latency_ms` is the median of one call with its 10th and 90th percentile, `speedup` is over the baseline and
    `over_float` over the same target in fp32 (None for fp32 itself), both with 95 % intervals from paired rounds.
    `agreement` is the share of held-out inputs given the original's class (None where the output is no class scores),
    `sqnr_db` the outputs' signal to noise against the original, `drop_points` what `evaluate` lost (None without).
    `good` says that it keeps the limits, `notes` what one should know before using it.
    """

    target: str
    precision: str
    file: Path
    size_bytes: int
    latency_ms: Interval
    speedup: Interval
    over_float: Interval | None
    agreement: float | None
    sqnr_db: float
    drop_points: float | None
    good: bool
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The target and the precision."""
        return f"{self.target} {self.precision}"


@dataclass(frozen=True)
class TargetChoice:
    """Every option, fastest first; `recommended` is the fastest that keeps the limits, and `reason` says why.

    Of options that are equally fast within the measurement, the most exact is recommended. `missing` maps targets that
    are not installed to the command that installs them, `failed` options to the reason. Files stand in `folder`.
    """

    options: tuple[Option, ...]
    recommended: Option
    reason: str
    baseline: str
    threads: int
    samples: int
    missing: Mapping[str, str]
    failed: Mapping[str, str]
    folder: Path

    def find(self, name: str) -> Option:
        """Return the option of that name, as "openvino bf16"; raises UnknownName."""
        for option in self.options:
            if option.name == name:
                return option
        raise UnknownName("measured option", name, [o.name for o in self.options])

    def __str__(self) -> str:
        """Return the table, the recommendation, and what could not be measured."""
        head = ("", "ms", "speed-up", "(95 %)", "agreement", "SQNR dB", "MB")
        rows = [head, *(_describe(o, o is self.recommended) for o in self.options)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines.append(f"Speed-up over {self.baseline}, {self.threads} thread(s), {self.samples} held-out inputs.")
        lines.append(f"Recommended: {self.recommended.name}. {self.reason}")
        lines += [f"{option.name}: {note}" for option in self.options for note in option.notes]
        lines += [f"Not here: {name}: {command}" for name, command in self.missing.items()]
        lines += [f"Failed: {name}: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)


def _describe(option: Option, chosen: bool) -> tuple[str, ...]:
    speedup = option.speedup
    return (
        f"{'*' if chosen else ' '} {option.name}",
        f"{option.latency_ms.value:.3f}",
        f"{speedup.value:.2f}x",
        f"({speedup.low:.2f} to {speedup.high:.2f})",
        "-" if option.agreement is None else f"{option.agreement:.1%}",
        "exact" if math.isinf(option.sqnr_db) else f"{option.sqnr_db:.1f}",
        f"{option.size_bytes / 1e6:.2f}",
    )
