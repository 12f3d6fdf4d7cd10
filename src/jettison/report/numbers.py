"""Numbers as a person reads them: with units, and with no more digits than were measured."""

from __future__ import annotations

import math
from datetime import datetime

from jettison.core.record import Interval

THIN = "\u202f"
"""A narrow space that does not break, between thousands."""
SPACE = "\u00a0"
"""A space that does not break, between a number and its unit."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNKNOWN = "–"
"""Stands where nothing was measured."""


def count_decimals(value: float, digits: int) -> int:
    """Decimals that show `value` with `digits` significant digits, at least 0."""
    if value == 0 or not math.isfinite(value):
        return 0
    # Formatting first: 9.996 has one digit before the point less than what is shown, 10.0.
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    return max(0, digits - 1 - exponent)


def format_fixed(value: float, decimals: int) -> str:
    """`value` with that many decimals, thousands apart; a true minus; words for what is not finite."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.{decimals}f}".replace(",", THIN)
    if text.startswith("-"):
        text = text[1:] if not text.strip("-0.") else "−" + text[1:]
    return text


def format_number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits; powers of ten below 0.001 and from ten million."""
    if value != 0 and math.isfinite(value) and not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.replace('-', '−')}{SPACE}×{SPACE}10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return format_fixed(value, count_decimals(value, digits))


def scale_number(value: float, units: tuple[str, ...], digits: int = 3) -> str:
    """`value` in the first of `units`, each a thousand times the one before, that keeps it below a thousand."""
    power = 0
    # What counts is the number shown: 999.7 kB reads 1.00 MB.
    while power < len(units) - 1 and abs(float(f"{value:.{digits - 1}e}")) >= 1000:
        value, power = value / 1000, power + 1
    decimals = count_decimals(value, digits) if power or value != int(value) else 0
    return f"{format_fixed(value, decimals)}{SPACE}{units[power]}".rstrip(SPACE)


def format_bytes(value: float) -> str:
    """Bytes in B, kB, MB or GB, powers of 1000."""
    return scale_number(value, ("B", "kB", "MB", "GB", "TB"))


def format_count(value: float) -> str:
    """A count of MACs or parameters, shortened to k, M (million) or G (10⁹)."""
    return scale_number(value, ("", "k", "M", "G", "T"))


def format_macs(value: float) -> str:
    """MACs in words: 17.2 million MACs."""
    return scale_number(value, ("", "thousand", "million", "billion", "trillion")) + " MACs"


def format_ms(value: float) -> str:
    """Milliseconds with three significant digits."""
    return f"{format_number(value)}{SPACE}ms"


def format_seconds(value: float) -> str:
    """Seconds below two minutes, then minutes and seconds, then hours and minutes."""
    if value < 120 or not math.isfinite(value):
        return f"{format_fixed(value, 1 if value < 10 else 0)}{SPACE}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {seconds}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def interval_decimals(interval: Interval) -> int:
    """Decimals worth showing: the first digits that the interval leaves open, at most three significant ones."""
    half = (interval.high - interval.low) / 2
    most = count_decimals(interval.value, 3)
    if not math.isfinite(half) or half <= 0:
        return most
    first = math.floor(math.log10(half))
    # A second digit where the first is small: 0.13 rounded to 0.1 would lose a quarter of what is known.
    return min(most, max(0, -first + (half < 3.55 * 10.0**first)))


def format_interval(interval: Interval, unit: str = "") -> tuple[str, str]:
    """The value with its unit, and "low to high" with the same decimals."""
    decimals = interval_decimals(interval)
    value, low, high = (format_fixed(x, decimals) for x in (interval.value, interval.low, interval.high))
    return value + unit, f"{low} to {high}"


def point_decimals(n: int | None) -> int:
    """Decimals of a percentage of `n` samples: one sample is 100 / n points; 2 where `n` is unknown."""
    return 2 if not n else max(0, min(3, math.ceil(math.log10(n)) - 2))


def format_points(value: float, n: int | None) -> str:
    """Points without unit, with the digits that `n` samples can show."""
    return format_fixed(value, point_decimals(n))


def format_bound(value: float, n: int | None) -> str:
    """An upper bound in points, rounded up: a bound rounded down would claim too much."""
    scale: int = 10 ** point_decimals(n)
    # The nudge keeps 0.41, which is not exact in binary, from turning into 0.42.
    return format_fixed(math.ceil(value * scale - 1e-6) / scale if math.isfinite(value) else value, point_decimals(n))


def format_ratio(value: float) -> str:
    """A ratio as a percentage with three significant digits."""
    return f"{format_number(100 * value)}{SPACE}%"


def format_tick(value: float) -> str:
    """A round number without the zeros that a measurement would carry."""
    text = f"{value:g}"
    return format_number(value, 1) if "e" in text else text


def format_even(value: float, top: float) -> str:
    """`value` with the decimals that show `top` with four digits, so that a column lines up; "< 0.001" below them."""
    decimals = count_decimals(top, 4)
    least = 10.0**-decimals
    return f"< {format_fixed(least, decimals)}" if 0 < value < least / 2 else format_fixed(value, decimals)


def format_date(text: str) -> str:
    """An ISO 8601 time as "22 November 2026, 18:04 UTC"; any other text stays as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def format_share(value: float, n: int | None) -> str:
    """A fraction in 0..1 as a percentage."""
    return f"{format_fixed(100 * value, max(1, point_decimals(n)))}{SPACE}%"


def make_visible(text: str) -> str:
    """Replace control characters and direction overrides, which could hide or move other text."""
    return "".join(
        "�"
        if (ord(c) < 32 and c not in "\n\t")
        or 127 <= ord(c) < 160
        or 0xD800 <= ord(c) < 0xE000
        or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f"
        else c
        for c in text
    )
