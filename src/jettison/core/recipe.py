"""The Recipe: how thorough each stage is. The defaults suit a small CNN on two cores."""

from __future__ import annotations

from dataclasses import dataclass

from jettison.core.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; all have defaults.

    - `criterion`: how positions are ranked, a name from `jettison.pruning.CRITERIA`.
    - `quantize`: whether the result computes in int8; `prune`: whether widths may shrink.
    - `samples`: calibration inputs for statistics, ranges and refitting; `judges`: further ones that only judge.
    - `ratios`: shares of each group that may be kept; `multiple`: kept counts are multiples of this;
      `least`: the smallest share.
    - `protect`: names of groups that keep all positions.
    - `positions`: output positions (pixels, tokens) per layer that statistics are drawn from.
    - `steps`, `learning_rate`, `temperature`, `features`: distillation; `steps=0` leaves it out.
    - `half`: distil in bfloat16 where the processor computes it; None decides by the processor.
    - `corrections`: how often a plan is built, measured and planned again before it is taken.
    - `rounds`: rounds of the final latency measurement.
    """

    criterion: str = "obs"
    prune: bool = True
    quantize: bool = True
    samples: int = 512
    judges: int = 256
    ratios: tuple[float, ...] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
    multiple: int = 8
    least: float = 0.125
    protect: tuple[str, ...] = ()
    positions: int = 40_000
    steps: int = 800
    learning_rate: float = 2e-3
    temperature: float = 2.0
    features: float = 0.0
    half: bool | None = None
    corrections: int = 2
    rounds: int = 200

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("samples", "judges", "multiple", "positions", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"Recipe {name}={getattr(self, name)} must be at least 1.")
        if isinstance(self.protect, str):
            raise InputError(
                f"Recipe protect={self.protect!r} must be a tuple of group names: protect=({self.protect!r},)."
            )
        for name in ("steps", "corrections"):
            if getattr(self, name) < 0:
                raise InputError(f"Recipe {name}={getattr(self, name)} must not be negative.")
        if not self.ratios or any(not 0 < r <= 1 for r in self.ratios) or not 0 < self.least <= 1:
            raise InputError(f"Recipe ratios={self.ratios}, least={self.least} must be shares in (0, 1].")
