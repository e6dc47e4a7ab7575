"""A stage's figures as a person reads them, for every place that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def size(nbytes: float) -> str:
    """Bytes in the unit that keeps the figure short."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":  # noqa: PLR2004 - the step of the units
            return f"{nbytes:.0f} {unit}" if unit in ("B", "kB") else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "not measured yet"
    for most, unit, of in ((120, "s", 1), (7200, "min", 60)):
        if seconds < most:
            return f"{seconds / of:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


# Figures that are not shown as their name and four digits, in the order of the line.
_FORMS: Mapping[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4g}",
    "validation_loss": lambda value: f"validation {value:.4g}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "gradient_norm": lambda value: f"gradient {value:.3g}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "rows_per_second": lambda value: f"{value:,.0f} rows/s",
    "resident_bytes": lambda value: f"memory {size(value)}",
    "peak_bytes": lambda value: f"peak {size(value)}",
    "cuda_peak_bytes": lambda value: f"GPU peak {size(value)}",
}
# What a bar has no room for.
_ASIDE = frozenset({"gradient_norm", "peak_bytes"})


def line(figures: Mapping[str, float], *, short: bool) -> str:
    """The figures on one line; a `short` one leaves out what a bar has no room for."""
    order = {name: place for place, name in enumerate(_FORMS)}
    names = sorted((name for name in figures if not (short and name in _ASIDE)), key=lambda name: order.get(name, 99))
    return ", ".join(_FORMS[name](figures[name]) if name in _FORMS else f"{name} {figures[name]:.4g}" for name in names)
