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
    - `ratios`: shares of each group that may be kept; `multiple`: widths are multiples of this (heads and groups of
      channels count with all they hold); `least`: the smallest share, `minimum`: the smallest count.
    - `protect`: what keeps all positions: names of groups, or names or patterns of modules ("head*") for every group
      with a part in them.
    - `tie`: tuples of names or patterns of groups that keep the same count, as in `(("blocks.*.mlp.fc1",),)`.
    - `balance`: whether each head, or each group of channels, may lose other positions than the next (in `prune`;
      a `Plan` names the same ones for all).
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
    minimum: int = 1
    protect: tuple[str, ...] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    balance: bool = True
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
        for name in ("samples", "judges", "multiple", "minimum", "positions", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"Recipe {name}={getattr(self, name)} must be at least 1.")
        if isinstance(self.protect, str):
            raise InputError(
                f"Recipe protect={self.protect!r} must be a tuple of group names: protect=({self.protect!r},)."
            )
        if isinstance(self.tie, str) or any(isinstance(names, str) for names in self.tie):
            raise InputError(
                f'Recipe tie={self.tie!r} must be a tuple of tuples of names: tie=(("blocks.*.mlp.fc1",),).'
            )
        for name in ("steps", "corrections"):
            if getattr(self, name) < 0:
                raise InputError(f"Recipe {name}={getattr(self, name)} must not be negative.")
        if not self.ratios or any(not 0 < r <= 1 for r in self.ratios) or not 0 < self.least <= 1:
            raise InputError(f"Recipe ratios={self.ratios}, least={self.least} must be shares in (0, 1].")
