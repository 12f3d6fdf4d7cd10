"""Rules that ranges, grids and roundings keep whatever the numbers are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.quantization.gptq import damp, measure_error, revisit, round_gptq, round_to
from jettison.quantization.ladder import narrow
from jettison.quantization.ranges import RANGERS, Histogram, choose_scale
from jettison.targets.integer import Levels, fake_quantize
from jettison.targets.onnxruntime import scheme

QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SCHEME = scheme(frozenset({"avx512_vnni"}))
HALF_STEP_TOLERANCE = 1e-5
"""Relative: a value between two steps is at most half a step away, and the step is a float32 number."""


def draw_values(seed: int, power: float, shift: float, count: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    return x.sign() * x.abs().pow(power) + shift


@QUICK
@given(
    st.sampled_from(sorted(RANGERS)),
    st.integers(0, 1000),
    st.floats(0.3, 4.0),
    st.floats(-3.0, 3.0),
    st.sampled_from([Levels(0, 255, False), Levels(0, 15, False), Levels(-128, 127, False), Levels(-127, 127, True)]),
)
def test_a_range_holds_zero_and_nothing_that_was_not_seen(
    name: str, seed: int, power: float, shift: float, levels: Levels
) -> None:
    values, histogram = draw_values(seed, power, shift), Histogram()
    histogram.add(values, "here")
    low, high = RANGERS[name](histogram, levels)
    assert min(0.0, histogram.low) <= low <= 0.0 <= high <= max(0.0, histogram.high)
    scale, zero_point = choose_scale(torch.tensor([low]), torch.tensor([high]), levels)
    assert fake_quantize(torch.zeros(1), scale, zero_point, levels).item() == 0.0
    inside = values[(values >= low) & (values <= high)]
    gap = (fake_quantize(inside, scale, zero_point, levels) - inside).abs()
    # The zero point is rounded, so that an end may lie half a step outside.
    assert inside.numel() == 0 or float(gap.max()) <= float(scale) * (1 + HALF_STEP_TOLERANCE)


@QUICK
@given(st.integers(0, 1000), st.floats(0.3, 4.0))
def test_clipping_by_error_is_never_worse_than_none(seed: int, power: float) -> None:
    values, levels, histogram = draw_values(seed, power, 0.0), Levels(0, 15, False), Histogram()
    histogram.add(values, "here")
    errors = {}
    for name in ("mse", "minmax"):
        low, high = RANGERS[name](histogram, levels)
        scale, zero_point = choose_scale(torch.tensor([low]), torch.tensor([high]), levels)
        errors[name] = float((fake_quantize(values, scale, zero_point, levels) - values).square().sum())
    # The histogram knows a value to its bin only.
    assert errors["mse"] <= errors["minmax"] * 1.02


@QUICK
@given(st.integers(2, 8), st.integers(4, 8))
def test_fewer_bits_lie_within_the_targets_levels(weight_bits: int, activation_bits: int) -> None:
    found, note = narrow(SCHEME, weight_bits, activation_bits)
    assert found.weight.q_max == 2 ** (weight_bits - 1) - 1 == -found.weight.q_min
    assert (found.activation.q_min, found.activation.q_max) == (0, 2**activation_bits - 1)
    assert bool(note) == (weight_bits < 8 or activation_bits < 8)
    assert found.weighted == SCHEME.weighted


@QUICK
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 12), st.integers(2, 5))
def test_revisiting_never_raises_the_error(seed: int, rows: int, inputs: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, inputs, 40, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, rows, inputs, generator=generator, dtype=torch.float64)
    levels = Levels(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1, True)
    hessian = damp(x @ x.mT / 40, 0.01)
    scale = weight.abs().amax(-1) / levels.q_max
    for start in (round_to(weight, scale.unsqueeze(-1), levels), round_gptq(weight, hessian, scale, levels)):
        found = revisit(weight, start, hessian, scale, levels)
        assert float(found.abs().max()) <= levels.q_max and torch.equal(found, found.round())
        before, after = (measure_error(weight, q, hessian, scale) for q in (start, found))
        assert bool((after <= before * (1 + 1e-9) + 1e-12).all())
