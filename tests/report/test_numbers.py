"""Numbers keep what was measured and claim no more."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jettison.core.record import Interval
from jettison.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.36271, "0.363"),
        (9.996, "10.0"),
        (123456, "123\u202f456"),
        (3.1e-14, "3.10\u00a0×\u00a010⁻¹⁴"),
        (-0.5, "−0.500"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert numbers.format_number(value) == text


@pytest.mark.parametrize(("value", "text"), [(812, "812 B"), (999_700, "1.00 MB"), (139_264, "139 kB"), (0, "0 B")])
def test_bytes(value: float, text: str) -> None:
    assert numbers.format_bytes(value).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(5.181, 5.042, 5.309), ("5.18×", "5.04 to 5.31")),
        (Interval(5.181, 4.1, 6.3), ("5.2×", "4.1 to 6.3")),
        (Interval(181.7, 150.0, 260.0), ("182×", "150 to 260")),
        (Interval(1.0, 1.0, 1.0), ("1.00×", "1.00 to 1.00")),
    ],
)
def test_interval(interval: Interval, text: tuple[str, str]) -> None:
    assert numbers.format_interval(interval, "×") == text


@pytest.mark.parametrize(("n", "text"), [(10_000, "0.41"), (1000, "0.4"), (50, "0"), (None, "0.41")])
def test_points_follow_the_samples(n: int | None, text: str) -> None:
    assert numbers.format_points(0.41, n) == text


@given(st.floats(0, 100), st.one_of(st.none(), st.integers(1, 10**7)))
def test_bound_is_never_understated(value: float, n: int | None) -> None:
    shown = float(numbers.format_bound(value, n))
    # 1e-6 of the last digit: what format_bound forgives, so that 0.41 in binary is not rounded to 0.42.
    assert shown >= value - 1e-6 * 10.0 ** -numbers.point_decimals(n) - 1e-12


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_float_has_a_text(value: float) -> None:
    for text in (numbers.format_number(value), numbers.format_ms(value), numbers.format_seconds(value)):
        assert text and "nan" not in text and "inf" not in text


@given(st.floats(1e-12, 1e12))
def test_three_digits_are_right(value: float) -> None:
    text = numbers.format_number(value).replace("\u202f", "").replace("\u00a0×\u00a010", "e")
    shown = float(text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    # Half of the third digit, relative to the value: at most 0.5 %.
    assert math.isclose(shown, value, rel_tol=0.00501)


def test_control_characters_become_visible() -> None:
    assert numbers.make_visible("a\x1b[31m\x00\u202e\ud800b\n") == "a�[31m���b\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-22T18:04:11+00:00", "22 November 2026, 18:04 UTC"),
        ("2026-11-02T08:04", "2 November 2026, 08:04"),
        ("then", "then"),
    ],
)
def test_date(text: str, shown: str) -> None:
    assert numbers.format_date(text) == shown
