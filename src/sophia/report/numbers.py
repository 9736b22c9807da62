"""How numbers are written."""

import math

from sophia.report.reading import Estimate, number

MISSING = "–"
_MINUS = "−"


def loss(value: object) -> str:
    """Nats a token."""
    found = number(value)
    return MISSING if found is None else f"{found:.4f}"


def difference(value: object) -> str:
    """Of two losses, with its sign."""
    found = number(value)
    return MISSING if found is None else f"{found:+.4f}".replace("-", _MINUS)


def ratio(value: object) -> str:
    """Three digits: what a speed-up deserves."""
    found = number(value)
    if found is None:
        return MISSING
    return f"{found:.2f}" if abs(found) < 9.995 else f"{found:.1f}"


def rate(value: object) -> str:
    """A learning rate: 8e-3."""
    found = number(value)
    if found is None:
        return MISSING
    if found == 0:
        return "0"
    digits, _, exponent = f"{found:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def setting(name: str, value: object) -> str:
    """A setting's value, as in a study file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(setting(name, one) for one in value) or "none"
    found = number(value)
    if found is None or isinstance(value, int):
        return str(value)
    return rate(found) if name == "lr" or 0 < abs(found) < 0.01 else f"{found:.4g}"


def whole(value: object) -> str:
    """All digits, in groups of three."""
    found = number(value)
    return MISSING if found is None else f"{found:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def count(value: object) -> str:
    """Tokens, parameters, operations: 12.3 M."""
    found = number(value)
    if found is None:
        return MISSING
    if found == round(found) and abs(found) < 100_000:
        return whole(found)
    unit, prefix = _prefix(found, "kMBTPEZ")
    return f"{found / unit:.3g} {prefix}".rstrip()


def operations(value: object) -> str:
    """Floating-point operations: 1.23 TFLOP."""
    found = number(value)
    if found is None:
        return MISSING
    unit, name = operations_unit(found)
    return f"{found / unit:.3g} {name}"


def operations_unit(value: float) -> tuple[float, str]:
    """What to write so many operations in: its size and its name."""
    unit, prefix = _prefix(value, "kMGTPEZ")
    return unit, f"{prefix}FLOP"


def _prefix(value: float, prefixes: str) -> tuple[float, str]:
    # What three digits round up to 1000 has the next prefix already.
    power = min(len(prefixes), max(0, math.floor(math.log10(abs(value) or 1.0) + 2.2e-4) // 3))
    return 1000.0**power, ("", *prefixes)[power]


def seconds(value: object) -> str:
    """A duration in the unit that suits it."""
    found = number(value)
    if found is None:
        return MISSING
    if found < 1:
        return f"{1000 * found:.3g} ms"
    if found < 120:
        return f"{found:.3g} s"
    return f"{found / 60:.3g} min" if found < 7200 else f"{found / 3600:.3g} h"


def memory(value: object) -> str:
    """Bytes in binary units."""
    found = number(value)
    if found is None:
        return MISSING
    return f"{found / 2**20:.0f} MiB" if found < 2**30 else f"{found / 2**30:.2f} GiB"


def percent(value: object) -> str:
    """A share."""
    found = number(value)
    return MISSING if found is None else f"{100 * found:.1f} %"


def budget(tokens: object, whole: object) -> str:
    """Tokens in units of T: T/2, 2T."""
    found, unit = number(tokens), number(whole)
    if found is None or not unit:
        return MISSING if found is None else count(found)
    share = found / unit
    if math.isclose(share, 1):
        return "T"
    if share < 1 and math.isclose(1 / share, round(1 / share)):
        return f"T/{round(1 / share)}"
    return f"{share:.3g}T"


def speedup(found: Estimate | None) -> str:
    """A ratio that may be a bound only."""
    if found is None:
        return MISSING
    sign = {"at least": "≥ ", "at most": "≤ "}.get(found.bound or "", "")
    return f"{sign}{ratio(found.value)}"
